# The kernels: moments, normalization and their gradients, for one element type and one
# instruction set. `setup.py` compiles this file once for each pair of them.
#
# 1. Data. A call is a `Task` on (G, N, C, S) views. With *planes* a row is one plane, S
#    contiguous values of one channel; with *channels last* it is one sample, C contiguous
#    columns. A channel's values are cut into chunks that depend on shape and element type alone.
#    A reduction gives two sums for each (chunk, channel), merged later in the order of chunks; a
#    map is elementwise. So neither threads nor blocking nor the kind of store can change a bit.
# 2. Lanes. Work goes 16 elements at a time (simd.h). Planes: lane l sums the values at
#    l, l + 16, ... of a plane and goes on over the planes of the chunk; the lanes are added up
#    once a chunk. Channels last: each column has a lane of its own, and rows follow each other.
# 3. Sums are float64, whatever the elements are. Moments are sums of d = x - shift and d*d with the
#    channel's first value as the shift: mean = shift + m and var = sum(d*d)/n - m*m, m = sum(d)/n,
#    lose 1 + (m/s)**2 roundings, little unless that value is far out. Then (and where float64
#    squares overflow) the channel is summed again about the mean just found, right for any data.
# 4. Channels that are pooled share their statistics, as in group norm. For moments a group is summed
#    as one plane where it is one in memory; else, and on the way back, each channel is summed by
#    itself, and finalize puts those of a group together. So a block is of whole groups.
# 5. A row (of layer norm) is a plane whose gamma and beta are by column: maps multiply by them after
#    or, back, before all else.
# 6. One chapter a file: reduce.pxi (sums), finalize.pxi (from sums to coefficients),
#    elementwise.pxi (y and dx), drive.pxi (the order of work).

from cython.parallel cimport parallel
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport ldexp, sqrt
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy, memset

from fastbn._ext.task cimport (
    ACTIVATION, ACTIVATION_GRAD, AFFINE, AHEAD, BY_COLUMN, DRESIDUAL, GENERAL, GRADIENT_MOMENTS,
    INPUT_GRADIENT, KINDS, MASKED, MOMENTS, MOST_MASKED_ROWS, NO_MAP, NO_REDUCE, PACKED, RESIDUAL,
    WIDE, WITH_X, Operand, Table, Task, sums_pitch,
)

include "headers.pxi"


# ---- Where things are ----

cdef inline element* at(const Operand* a, Py_ssize_t g, Py_ssize_t n, Py_ssize_t c) noexcept nogil:
    return <element*> a.data + g * a.g + n * a.n + c * a.c


cdef inline double entry(const Table* t, Py_ssize_t g, Py_ssize_t c, double default) noexcept nogil:
    if t.data == NULL:
        return default
    if t.pool > 1:
        c //= t.pool
    if t.period > 0:
        c = (c + t.phase) % t.period
    if t.single:
        return (<const float*> (t.data + g * t.g + c * t.c))[0]
    return (<const double*> (t.data + g * t.g + c * t.c))[0]


cdef inline double* sums(const Task* t, Py_ssize_t g, Py_ssize_t j) noexcept nogil:
    """Chunk j's two rows of sums."""
    return t.partial + (g * t.n_partials + min(j, t.n_partials - 1)) * 2 * t.pitch


cdef inline real* packed(const Task* t, Py_ssize_t g) noexcept nogil:
    """Run g's rows of coefficients."""
    return <real*> t.packed + g * PACKED * t.pitch


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


cdef struct Selected:
    # Which places count, and what weighs there: the mask where the work is, whether vectors of it
    # end before it does, how a row is read, the weights from its first sample on, if there are any,
    # and how many samples a row has.
    const unsigned char* mask
    const unsigned char* mask_end
    bint whole, weighed
    mask16 numbers
    weights weighs
    Py_ssize_t samples

cdef struct Marked:
    # The same of a few rows of one sample each.
    mask16[MOST_MASKED_ROWS] some
    double[MOST_MASKED_ROWS] weight

cdef double unweighed = 1


cdef inline Selected selected_at(const Task* t, Py_ssize_t g, Py_ssize_t n,
                                 Py_ssize_t s) noexcept nogil:
    """At value s of plane n, or at row n."""
    cdef Selected p
    cdef Py_ssize_t sample = n * t.fold
    memset(&p.numbers, 0, sizeof(mask16))
    p.samples, p.weighed = t.fold, t.weights != NULL
    p.mask, p.mask_end = t.mask + g * t.mask_g + sample * t.S + s, t.mask + t.G * t.mask_g
    p.whole = p.mask_end - p.mask >= (MOST_MASKED_ROWS + 1) * t.fold + 16
    p.weighs.first, p.weighs.end, p.weighs.left, p.weighs.each = &unweighed, &unweighed + 1, 16, 16
    if p.weighed:
        p.weighs.first = t.weights + g * t.weights_g + sample // t.weight_samples
        p.weighs.end = t.weights + t.G * t.weights_g
        p.weighs.each = t.weight_samples
        p.weighs.left = t.weight_samples - sample % t.weight_samples
    return p


cdef inline void pass_samples(Selected* p, Py_ssize_t samples) noexcept nogil:
    p.mask += samples
    if p.weighed:
        p.weighs.left -= samples
        while p.weighs.left <= 0:
            p.weighs.first += 1
            p.weighs.left += p.weighs.each


cdef inline Selected at_columns(const Task* t, const Selected* row, Py_ssize_t c) noexcept nogil:
    """At sixteen columns of a row: each is of the sample that it belongs to."""
    cdef Selected p = row[0]
    pass_samples(&p, t.samples[c])
    p.numbers = sample_numbers(t.numbers + c)
    return p


cdef inline mask16 mask_at(const Selected* p) noexcept nogil:
    """Of sixteen columns those that count."""
    return mask_permute(p.numbers, mask_load(p.mask) if p.whole
                        else mask_load_before(p.mask_end, p.mask))


cdef inline bint mark(const Task* t, Selected p, Py_ssize_t rows, Marked* marked) noexcept nogil:
    """A few rows from this one on, and whether they are of one sample each."""
    cdef Py_ssize_t r
    if t.fold > 1:
        return False
    for r in range(rows):
        marked.some[r], marked.weight[r] = mask_broadcast(p.mask), p.weighs.first[0]
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
