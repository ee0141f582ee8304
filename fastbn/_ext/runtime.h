/* What calls share in a process: how many are in flight, and what a fork leaves of the threads. */
#ifndef FASTBN_RUNTIME_H
#define FASTBN_RUNTIME_H

/* Calls in flight at once share the cores, each taking a part of its threads. */
static int in_flight = 0;
static int enter_call(void) { return __atomic_add_fetch(&in_flight, 1, __ATOMIC_RELAXED); }
static void leave_call(void) { __atomic_sub_fetch(&in_flight, 1, __ATOMIC_RELAXED); }

/* libgomp's threads do not exist in a forked child, which would wait for them for ever. So the
 * pool is given up before a fork (whoever's work made it) and made anew by the next
 * computation. Runtimes that cannot do that leave the child on one thread. Of the calls in
 * flight none goes on in the child: only the thread that forks is there. */
static int is_serial = 0;
#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
static int pause_all(int) __attribute__((weakref("omp_pause_resource_all")));
static __thread int is_paused = 0;  /* several threads may fork at once */
static void before_fork(void) {
    enum { OMP_PAUSE_SOFT = 1 };
    is_paused = !omp_in_parallel() && pause_all && pause_all(OMP_PAUSE_SOFT) == 0;
}
static void in_child(void) {
    is_serial |= !is_paused;
    in_flight = 0;
}
static int guard_forks(void) { return pthread_atfork(before_fork, NULL, in_child); }
#else
static int guard_forks(void) { return 0; }
#endif

/* Whether the caller's floating-point mode may take small numbers for 0. */
#ifdef __SSE__
static int flushes(void) { return (__builtin_ia32_stmxcsr() & 0x8040) != 0; }
#else
static int flushes(void) { return 1; }
#endif

#endif
