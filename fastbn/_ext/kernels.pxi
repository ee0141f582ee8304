# The kernels: moments, normalization and their gradients, for one element type and one
# instruction set. `setup.py` compiles this file once for each pair of them.
#
# 1. Data. A call is a `Task` on (G, N, C, S) views: G runs (virtual batches), N samples, C
#    channels, S values. *Planes*: the S values of a channel and sample lie side by side. *Channels
#    last*: S = 1, and a row is a sample, its C columns side by side. A call has a *reduce* (two
#    sums of each channel), a *map* (y or dx of each value), or both, with *finalize* between.
#    Chunks of a channel depend on shape and element type alone, and their sums are merged in order:
#    no bit depends on threads, blocks or kind of store.
# 2. Lanes. Work goes 16 elements at a time (simd.h). Planes: lane l sums the values at
#    l, l + 16, ... of a plane and goes on over the planes of the chunk; the lanes are added up
#    once a chunk. Channels last: each column has a lane of its own, and rows follow each other.
# 3. Sums are float64. With d = x - shift and m = sum(d) / n: mean = shift + m, and var = sum(d*d) /
#    n - m*m. The subtraction costs a factor 1 + (m/s)**2 of precision, s the standard deviation.
#    shift is the channel's first value, so that is little unless the value is an outlier. Where |m|
#    > 16 s, or a square overflows, the channel is summed again about shift + m.
# 4. Channels that are pooled share their statistics, as in group norm. For moments a group is
#    summed as one plane where it is one in memory; else, and on the way back, each channel is
#    summed by itself, and finalize puts those of a group together. So a block is of whole groups.
# 5. By column (layer norm of (N, C)): each sample's group is a plane with statistics of its own,
#    and gamma and beta belong to columns. y = xhat*gamma + beta is done after the affine map;
#    backward, dy is first multiplied by gamma.
# 6. Constants. setup.py makes every "cdef inline" function always_inline. So an argument that the
#    caller gives as a literal, as kind or n = 16, is a constant in the loop: "if kind & MASKED"
#    costs nothing, and each literal makes a loop of its own, as templates would.
# 7. One chapter a file: reduce.pxi (sums), finalize.pxi (from sums to coefficients),
#    elementwise.pxi (y and dx), pieces.pxi (other types and orders), drive.pxi (the order of work).

from cython.parallel cimport parallel
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport ldexp, sqrt
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy, memset

from fastbn._ext.task cimport (
    ACTIVATION, ACTIVATION_GRAD, AFFINE, AHEAD, BY_COLUMN, DRESIDUAL, GENERAL, GRADIENT_MOMENTS,
    INPUT_GRADIENT, INTEGER_SUMS, KINDS, MASKED, MOMENTS, MOST_MASKED_ROWS, NO_MAP, NO_REDUCE,
    PACKED, RESIDUAL, STORED_ELEMENT, WIDE, WITH_X, Frame, Operand, Table, Task, pitch_of,
    sums_pitch,
)

include "headers.pxi"


# ---- Where things are ----

cdef inline element* at(const Operand* a, Py_ssize_t g, Py_ssize_t n, Py_ssize_t c) noexcept nogil:
    return <element*> a.data + g * a.g + n * a.n + c * a.c


cdef inline double table_value(const Table* t, Py_ssize_t g, Py_ssize_t c,
                               double default) noexcept nogil:
    """A table's entry for channel c of run g."""
    if t.data == NULL:
        return default
    if t.pool > 1:
        c //= t.pool
    if t.period > 0:
        c = (c + t.phase) % t.period
    if t.single:
        return (<const float*> (t.data + g * t.g + c * t.c))[0]
    return (<const double*> (t.data + g * t.g + c * t.c))[0]


cdef inline double count_at(const Task* t, Py_ssize_t g) noexcept nogil:
    """How many values of a channel of run g count."""
    return t.count if t.counts == NULL else t.counts[g]


cdef inline double* chunk_sums(const Task* t, Py_ssize_t g, Py_ssize_t j) noexcept nogil:
    """Chunk j's two rows of sums; all chunks share one pair where n_partials is 1."""
    return t.partial + (g * t.n_partials + min(j, t.n_partials - 1)) * 2 * t.pitch


cdef inline real* packed(const Task* t, Py_ssize_t g) noexcept nogil:
    """Run g's rows of coefficients."""
    return <real*> t.packed + g * PACKED * t.pitch


cdef struct Strip:
    # Columns [left, left + width) of rows [n0, n1).
    Py_ssize_t n0, n1, left, width


cdef struct Chunk:
    Py_ssize_t n0, n1   # samples
    Py_ssize_t s0, s1   # values of each


cdef inline Chunk chunk(const Task* t, Py_ssize_t j) noexcept nogil:
    cdef Chunk k
    k.n0 = j // t.pieces * t.rows
    k.n1 = min(k.n0 + t.rows, t.N)
    k.s0 = j % t.pieces * t.piece
    k.s1 = min(k.s0 + t.piece, t.S)
    return k


cdef struct Selection:
    # Which places count, and what their samples weigh, from some value or row on.
    const unsigned char* mask       # the byte of the first value or sample here
    const unsigned char* mask_end
    bint in_range                   # sixteen bytes may be loaded in MOST_MASKED_ROWS rows from here
    bint weighed
    mask16 numbers                  # of sixteen columns, which sample of the row each belongs to
    weights weighs                  # the weights from this sample on
    Py_ssize_t samples              # in a row of memory

cdef struct RowMasks:
    # The masks and weights of a few rows of one sample each.
    mask16[MOST_MASKED_ROWS] mask
    double[MOST_MASKED_ROWS] weight

cdef double unweighed = 1


cdef inline Selection selection_at(const Task* t, Py_ssize_t g, Py_ssize_t n,
                                 Py_ssize_t s) noexcept nogil:
    """At value s of plane n, or at row n."""
    cdef Selection p
    cdef Py_ssize_t sample = n * t.fold
    memset(&p.numbers, 0, sizeof(mask16))
    p.samples, p.weighed = t.fold, t.weights != NULL
    p.mask, p.mask_end = t.mask + g * t.mask_g + sample * t.S + s, t.mask + t.G * t.mask_g
    p.in_range = p.mask_end - p.mask >= (MOST_MASKED_ROWS + 1) * t.fold + 16
    p.weighs.first, p.weighs.end, p.weighs.left, p.weighs.each = &unweighed, &unweighed + 1, 16, 16
    if p.weighed:
        p.weighs.first = t.weights + g * t.weights_g + sample // t.weight_samples
        p.weighs.end = t.weights + t.G * t.weights_g
        p.weighs.each = t.weight_samples
        p.weighs.left = t.weight_samples - sample % t.weight_samples
    return p


cdef inline void pass_samples(Selection* p, Py_ssize_t samples) noexcept nogil:
    p.mask += samples
    if p.weighed:
        p.weighs.left -= samples
        while p.weighs.left <= 0:
            p.weighs.first += 1
            p.weighs.left += p.weighs.each


cdef inline Selection at_columns(const Task* t, const Selection* row, Py_ssize_t c) noexcept nogil:
    """At sixteen columns of a row: each is of the sample that it belongs to."""
    cdef Selection p = row[0]
    pass_samples(&p, t.samples[c])
    p.numbers = sample_numbers(t.numbers + c)
    return p


cdef inline mask16 mask_at(const Selection* p) noexcept nogil:
    """Of sixteen columns those that count."""
    return mask_permute(p.numbers, mask_load(p.mask) if p.in_range
                        else mask_load_before(p.mask_end, p.mask))


cdef inline bint masks_of_rows(const Task* t, Selection p, Py_ssize_t rows,
                               RowMasks* masks) noexcept nogil:
    """Those of a few rows from this one on; whether these are of one sample each."""
    cdef Py_ssize_t r
    if t.fold > 1:
        return False
    for r in range(rows):
        masks.mask[r], masks.weight[r] = mask_broadcast(p.mask), p.weighs.first[0]
        pass_samples(&p, 1)
    return True


cdef inline Py_ssize_t row_of_gamma(const Task* t, Py_ssize_t c) noexcept nogil:
    """Where plane c's gamma and beta are, which go by column."""
    return (c + t.phase) % t.period


cdef inline Py_ssize_t ahead_values() noexcept nogil:
    return AHEAD // <Py_ssize_t> sizeof(element)


cdef inline Py_ssize_t later(const Task* t, const Operand* a, Py_ssize_t n) noexcept nogil:
    """From a value of plane n to the one that comes about AHEAD bytes later: in the same plane,
    a few planes on or, past the last, in the next channel."""
    if t.planes_ahead == 0:
        return ahead_values()
    if t.N == 1:
        return t.planes_ahead * a.c
    if n + t.planes_ahead < t.N:
        return t.planes_ahead * a.n
    return (t.planes_ahead - t.N) * a.n + a.c


include "reduce.pxi"
include "finalize.pxi"
include "elementwise.pxi"
include "pieces.pxi"
include "drive.pxi"


cdef long _calls = 0


cdef void run(Task* t) noexcept nogil:
    """Run the task on its team of threads."""
    fetch_add(&_calls, 1)
    resolve_operands(t)
    if t.threads == 1:
        work(t, 0, 1)
    else:
        with parallel(num_threads=t.threads):
            work(t, thread_number(), team_size())


def calls():
    """How often these kernels have run: tests prove by it which variant did the work."""
    return _calls


api = PyCapsule_New(<void*> run, "fastbn.run", NULL)
"""The entry point, for `fastbn._ext.entry`."""
