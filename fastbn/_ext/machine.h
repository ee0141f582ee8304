/* What loops need of the machine: its floating-point mode, its caches, its threads.
 */
#ifndef FASTBN_MACHINE_H
#define FASTBN_MACHINE_H

#include "simd.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef FASTBN_PORTABLE
#include <fenv.h>
#endif

/* Set the default floating-point mode, which flushes no subnormals, and return what was set: a
 * thread of the team has the mode of whoever called first; the caller may have another by now. */
#ifdef FASTBN_PORTABLE
typedef fenv_t fp_mode;
INLINE fp_mode enter_usual_mode(void) {
    fp_mode was;
    fegetenv(&was);
    fesetenv(FE_DFL_ENV);
    return was;
}
INLINE void leave_mode(fp_mode was) { fesetenv(&was); }
#else
typedef unsigned fp_mode;
INLINE fp_mode enter_usual_mode(void) {
    fp_mode was = _mm_getcsr();
    _mm_setcsr(_MM_MASK_MASK);
    return was;
}
INLINE void leave_mode(fp_mode was) { _mm_setcsr(was); }
#endif

INLINE void prefetch(const element *p, int wanted) {
    if (!wanted)
        return;
    __builtin_prefetch(p, 0, 2);
#ifdef FASTBN_F64 /* sixteen elements are two lines */
    __builtin_prefetch(p + 8, 0, 2);
#endif
}
INLINE void set_flag(unsigned char *flag) { __atomic_store_n(flag, 1, __ATOMIC_RELAXED); }
INLINE long fetch_add(long *counter, long by) {
    return __atomic_fetch_add(counter, by, __ATOMIC_RELAXED);
}
INLINE int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}
INLINE int team_size(void) {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}
/* All threads of the team wait for each other; what they wrote is then visible to all. */
INLINE void team_barrier(void) {
#ifdef _OPENMP
    _Pragma("omp barrier")
#endif
}

#endif
