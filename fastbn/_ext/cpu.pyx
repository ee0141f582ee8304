"""What the processor and its operating system can run, and what OpenMP says of threads.

Built without any instruction-set flag, and imported before any variant that was built with one.
"""

cimport cython

cdef extern from *:
    """
    #ifdef __x86_64__
    #define IS_X86_64 1
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
    #define IS_X86_64 0
    #define runs_sse2() 0
    #define runs_avx2() 0
    #define runs_avx512() 0
    #endif
    #ifdef _OPENMP
    #include <omp.h>
    #define HAS_OPENMP 1
    #else
    #define HAS_OPENMP 0
    #define omp_get_max_threads() 1
    #define omp_get_num_procs() 1
    #define omp_get_num_places() 0
    #define omp_get_place_num_procs(place) 0
    #define omp_get_place_proc_ids(place, ids) ((void)(ids))
    #endif
    """
    bint IS_X86_64
    bint runs_sse2()
    bint runs_avx2()
    bint runs_avx512()
    bint HAS_OPENMP
    int omp_get_max_threads()
    int omp_get_num_procs()
    int omp_get_num_places()
    int omp_get_place_num_procs(int place)
    void omp_get_place_proc_ids(int place, int* ids)


def instruction_sets():
    """Those of this architecture by name, the best first, and whether the processor runs each; the
    flags they stand for are in setup.py."""
    sets = {"portable": True}
    if IS_X86_64:
        sets = {"avx512": runs_avx512(), "avx2": runs_avx2(), "sse2": runs_sse2()} | sets
    return sets


def has_openmp():
    """Whether the kernels were built with OpenMP."""
    return HAS_OPENMP


@cython.binding(False)  # called in every call of a verb
def at_most(int threads):
    """A number of threads, or OpenMP's for the calling thread where that is less."""
    cdef int most = omp_get_max_threads()
    return most if 0 < most < threads else threads


def processors():
    """How many processors OpenMP's threads may run on. Unlike the affinity mask it does not change
    when OpenMP, as it is loaded, binds the thread that loads it."""
    bound = set()
    for place in range(omp_get_num_places()):
        ids = bytearray(sizeof(int) * omp_get_place_num_procs(place))
        omp_get_place_proc_ids(place, <int*> <char*> ids)
        bound.update(memoryview(ids).cast("i"))
    return min(omp_get_num_procs(), len(bound) or omp_get_num_procs())
