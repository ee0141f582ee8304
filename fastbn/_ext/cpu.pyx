"""The instruction sets that this processor and its operating system can run.

Built without any instruction-set flag, and imported before any variant that was built with one.
"""

cdef extern from *:
    """
    #ifdef __x86_64__
    #include <cpuid.h>
    static int has_f16c(void) {
        unsigned a, b, c = 0, d;
        return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
    }
    #define runs_sse2() 1
    #define runs_avx2() (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") \
        && has_f16c())
    #define runs_avx512() (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") \
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_f16c())
    #else
    #define runs_sse2() 0
    #define runs_avx2() 0
    #define runs_avx512() 0
    #endif
    #ifdef _OPENMP
    #define HAS_OPENMP 1
    #else
    #define HAS_OPENMP 0
    #endif
    """
    bint runs_sse2()
    bint runs_avx2()
    bint runs_avx512()
    bint HAS_OPENMP


def instruction_sets():
    """Their names, the best first; the flags they stand for are in setup.py."""
    sets = {"avx512": runs_avx512(), "avx2": runs_avx2(), "sse2": runs_sse2(), "portable": True}
    return tuple(name for name, runs in sets.items() if runs)


def has_openmp():
    """Whether the kernels were built with OpenMP."""
    return HAS_OPENMP
