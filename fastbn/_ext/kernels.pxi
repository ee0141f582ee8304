# The kernels: moments, normalization and their gradients, for one element type and one
# instruction set. `setup.py` compiles this file once for each pair of them.
#
# 1. Data. A call is a `Task` on (G, N, C, S) views. With *channels outside* a row is one plane, S
#    contiguous values of one channel; with *channels inside* it is one sample, C contiguous
#    columns. A channel's values are cut into chunks that depend on shape and element type alone.
#    A reduction gives two sums for each (chunk, channel), merged later in the order of chunks; a
#    map is elementwise. So neither threads nor blocking nor the kind of store can change a bit.
# 2. Lanes. Work goes 16 elements at a time (simd.h). Channels outside: lane l sums the values at
#    l, l + 16, ... of a plane and goes on over the planes of the chunk; the lanes are added up
#    once a chunk. Channels inside: each column has a lane of its own, and rows follow each other.
# 3. Sums are float64, for float32 too. Moments are sums of d = x - shift and d*d with the channel's
#    first value as the shift: mean = shift + m and var = sum(d*d)/n - m*m, m = sum(d)/n, lose
#    1 + (m/s)**2 roundings, little unless that value is far out. Then (and where float64 squares
#    overflow) the channel is summed again about the mean just found, which is right for any data.
# 4. Elementwise work is done in the element type. The mean is a pair, mean = hi + lo: x - hi is
#    exact near the mean, and lo goes into the last constant, so that y = (x - hi) * scale +
#    (beta - lo * scale) keeps what one multiply-add of x would lose. Powers of two (`near`, `far`)
#    keep extreme scales in the range of the element type; multiplying by them is exact.
# 5. A trip over planes runs both passes on one block of channels, the second walk in reverse, so
#    that it starts on what the cache still holds. Rows are walked in the order of memory, by all
#    threads together, which meet between the passes; so are planes where single blocks would leave
#    threads idle (few channels).

from cython.parallel cimport parallel
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport fabs, ldexp
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy, memset

from fastbn._ext.task cimport (
    AFFINE, AHEAD, GRADIENT_MOMENTS, INPUT_GRADIENT, MOMENTS, NO_MAP, NO_REDUCE, PACKED,
    Operand, Table, Task,
)

cdef extern from "simd.h" nogil:
    ctypedef float real     # or double: C knows; so mixed expressions are double here
    ctypedef struct vec:
        pass
    ctypedef struct wide:
        pass
    vec vload(const real* p)
    vec vload_part(const real* p, long n)
    void vstore(real* p, vec v)
    void vstore_part(real* p, vec v, long n)
    void vstream(real* p, vec v)
    void vsplat_each(vec* v, const real* p, long pitch, int count)
    void vload_each(vec* v, const real* p, long pitch, int count)
    vec affine(vec x, const vec* k)
    vec gradient(vec dy, vec x, const vec* k)
    wide wload_table(const double* p)
    wide wload_table_part(const double* p, long n)
    void wstore_table(double* p, wide w)
    wide wsplat(double a)
    wide wadd(wide a, wide b)
    wide wsub(wide a, wide b)
    double wsum(wide a)
    void add_moments(const real* x, long n, wide shift, wide unit, wide* first, wide* second)
    void add_gradients(const real* dy, const real* x, long n, wide mean, wide* first, wide* second)
    const double FARTHEST   # the mean times `near` stays below
    double inverse_root(double a)
    double power_of_two(double a)
    double rough_root(double a)
    double half_way(double a)
    double inverse_of_power(double a)
    double saturated(double a)
    double product(double difference, double factor)
    double choose(bint condition, double a, double b)
    bint is_finite(double a)
    ctypedef struct fp_mode:
        pass
    fp_mode usual_mode()
    void restore_mode(fp_mode mode)
    void stream_fence()
    void prefetch(const real* p, bint wanted)
    long fetch_add(long* counter, long by)
    int thread_number()
    int team_size()
    void team_barrier()


# ---- Where things are ----

cdef inline const real* at(const Operand* a, Py_ssize_t g, Py_ssize_t n, Py_ssize_t c) noexcept nogil:
    return <const real*> a.data + g * a.g + n * a.n + c * a.c


cdef inline double entry(const Table* t, Py_ssize_t g, Py_ssize_t c, double default) noexcept nogil:
    if t.data == NULL:
        return default
    if t.single:
        return (<const float*> (t.data + g * t.g + c * t.c))[0]
    return (<const double*> (t.data + g * t.g + c * t.c))[0]


cdef inline double* sums(const Task* t, Py_ssize_t g, Py_ssize_t j) noexcept nogil:
    """Chunk j's two rows of sums."""
    return t.partial + (g * t.chunks + j) * 2 * t.pitch


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


# ---- Reductions ----

cdef inline Py_ssize_t ahead_values() noexcept nogil:
    return AHEAD // <Py_ssize_t> sizeof(real)


cdef inline Py_ssize_t later(const Task* t, const Operand* a, Py_ssize_t n) noexcept nogil:
    """From a value of plane n to the one that comes about AHEAD bytes later: in the same plane,
    a few planes on or, past the last, in the next channel."""
    if t.planes_ahead == 0:
        return ahead_values()
    if n + t.planes_ahead < t.N:
        return t.planes_ahead * a.n
    return (t.planes_ahead - t.N) * a.n + a.c


cdef void moments_outside(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                          Py_ssize_t j) noexcept nogil:
    """The sums of channels [c0, c1) over chunk j."""
    cdef Chunk k = chunk(t, j)
    cdef Py_ssize_t c, n, s, size = k.s1 - k.s0, whole = size // 16 * 16
    cdef const double* shift = t.shift + g * t.pitch
    cdef const double* unit = t.unit + g * t.pitch
    cdef double* sum = sums(t, g, j)
    cdef wide shifts, units, first, second
    cdef const real* x
    cdef const real* ahead
    for c in range(c0, c1):
        shifts, units = wsplat(shift[c]), wsplat(unit[c])
        first, second = wsplat(0), wsplat(0)
        x = at(&t.x, g, k.n0, c) + k.s0
        for n in range(k.n0, k.n1):
            ahead = x + later(t, &t.x, n)
            for s in range(0, whole, 16):
                prefetch(ahead + s, t.fetch)
                add_moments(x + s, 16, shifts, units, &first, &second)
            if whole < size:
                add_moments(x + whole, size - whole, shifts, units, &first, &second)
            x += t.x.n
        sum[c], sum[t.pitch + c] = wsum(first), wsum(second)


cdef void gradients_outside(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                            Py_ssize_t j) noexcept nogil:
    """The gradient sums of channels [c0, c1) over chunk j."""
    cdef Chunk k = chunk(t, j)
    cdef Py_ssize_t c, n, s, size = k.s1 - k.s0, whole = size // 16 * 16
    cdef const double* mean = t.shift + g * t.pitch
    cdef double* sum = sums(t, g, j)
    cdef wide means, first, second
    cdef const real* x
    cdef const real* dy
    cdef const real* ahead_x
    cdef const real* ahead_dy
    for c in range(c0, c1):
        means, first, second = wsplat(mean[c]), wsplat(0), wsplat(0)
        x, dy = at(&t.x, g, k.n0, c) + k.s0, at(&t.dy, g, k.n0, c) + k.s0
        for n in range(k.n0, k.n1):
            ahead_x, ahead_dy = x + later(t, &t.x, n), dy + later(t, &t.dy, n)
            for s in range(0, whole, 16):
                prefetch(ahead_x + s, t.fetch)
                prefetch(ahead_dy + s, t.fetch)
                add_gradients(dy + s, x + s, 16, means, &first, &second)
            if whole < size:
                add_gradients(dy + whole, x + whole, size - whole, means, &first, &second)
            x += t.x.n
            dy += t.dy.n
        sum[c], sum[t.pitch + c] = wsum(first), wsum(second)


cdef void add_moments_rows(const real* x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t width,
                           const double* shift, const double* unit, double* first,
                           double* second, bint fetch, Py_ssize_t ahead) noexcept nogil:
    """Add a few rows to the sums of `width` columns, whose tables start at the first; meanwhile
    the rows `ahead` are fetched."""
    cdef Py_ssize_t c, r, part = width % 16
    cdef wide k, u, a, b
    cdef const real* at
    for c in range(0, width - part, 16):
        at = x + c
        k, u = wload_table(shift + c), wload_table(unit + c)
        a, b = wload_table(first + c), wload_table(second + c)
        for r in range(rows):
            prefetch(at + ahead * stride, fetch)
            add_moments(at, 16, k, u, &a, &b)
            at += stride
        wstore_table(first + c, a)
        wstore_table(second + c, b)
    if part > 0:
        c = width - part
        k, u = wload_table(shift + c), wload_table(unit + c)
        a, b = wload_table(first + c), wload_table(second + c)
        for r in range(rows):
            add_moments(x + r * stride + c, part, k, u, &a, &b)
        wstore_table(first + c, a)
        wstore_table(second + c, b)


cdef void add_gradients_rows(const real* dy, Py_ssize_t dy_stride, const real* x,
                             Py_ssize_t x_stride, Py_ssize_t rows, Py_ssize_t width,
                             const double* mean, double* first, double* second, bint fetch,
                             Py_ssize_t ahead) noexcept nogil:
    """Add a few rows to the gradient sums of `width` columns, whose tables start at the first."""
    cdef Py_ssize_t c, r, part = width % 16
    cdef wide k, a, b
    for c in range(0, width - part, 16):
        k, a, b = wload_table(mean + c), wload_table(first + c), wload_table(second + c)
        for r in range(rows):
            prefetch(dy + (r + ahead) * dy_stride + c, fetch)
            prefetch(x + (r + ahead) * x_stride + c, fetch)
            add_gradients(dy + r * dy_stride + c, x + r * x_stride + c, 16, k, &a, &b)
        wstore_table(first + c, a)
        wstore_table(second + c, b)
    if part > 0:
        c = width - part
        k, a, b = wload_table(mean + c), wload_table(first + c), wload_table(second + c)
        for r in range(rows):
            add_gradients(dy + r * dy_stride + c, x + r * x_stride + c, part, k, &a, &b)
        wstore_table(first + c, a)
        wstore_table(second + c, b)


cdef inline void add_rows(const Task* t, Py_ssize_t g, Py_ssize_t n, Py_ssize_t rows, Py_ssize_t c0,
                          Py_ssize_t width, double* sum, Py_ssize_t ahead) noexcept nogil:
    if t.reduce == MOMENTS:
        add_moments_rows(at(&t.x, g, n, c0), t.x.n, rows, width, t.shift + g * t.pitch + c0,
                         t.unit + g * t.pitch + c0, sum + c0, sum + t.pitch + c0, t.fetch, ahead)
    else:
        add_gradients_rows(at(&t.dy, g, n, c0), t.dy.n, at(&t.x, g, n, c0), t.x.n, rows, width,
                           t.shift + g * t.pitch + c0, sum + c0, sum + t.pitch + c0, t.fetch,
                           ahead)


cdef void reduce_inside(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                        Py_ssize_t j) noexcept nogil:
    """The sums of columns [c0, c1) over chunk j; whole rows are walked, a few at a time."""
    cdef Chunk k = chunk(t, j)
    cdef double* sum = sums(t, g, j)
    cdef Py_ssize_t n = k.n0, rows, padded = (c1 - c0 + 15) // 16 * 16
    cdef Py_ssize_t ahead = (ahead_values() // (t.few * padded) + 1) * t.few    # in whole steps
    memset(sum + c0, 0, padded * sizeof(double))
    memset(sum + t.pitch + c0, 0, padded * sizeof(double))
    while n < k.n1:
        rows = min(t.few, k.n1 - n)
        add_rows(t, g, n, rows, c0, c1 - c0, sum, ahead)
        n += rows
    if k.n1 == t.N and c0 < t.tail:
        add_rows(t, g, t.N, 1, c0, min(c1, t.tail) - c0, sum, 0)


cdef void reduce_chunk(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                       Py_ssize_t j) noexcept nogil:
    if t.inside:
        reduce_inside(t, g, c0, c1, j)
    elif t.reduce == MOMENTS:
        moments_outside(t, g, c0, c1, j)
    else:
        gradients_outside(t, g, c0, c1, j)


cdef void merge(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Add the chunks' sums up in order, carrying what rounding loses (Knuth's two-sum)."""
    cdef double* total = t.total + g * 2 * t.pitch
    cdef Py_ssize_t row, c, j, v
    cdef wide s, lost, p, r, was
    cdef double[16] lanes
    for row in range(2):
        for c in range(c0, c1, 16):
            s = wload_table_part(sums(t, g, 0) + row * t.pitch + c, c1 - c)
            lost = wsplat(0)
            for j in range(1, t.chunks):
                p = wload_table_part(sums(t, g, j) + row * t.pitch + c, c1 - c)
                r = wadd(s, p)
                was = wsub(r, s)
                lost = wadd(lost, wadd(wsub(s, wsub(r, was)), wsub(p, was)))
                s = r
            wstore_table(lanes, wadd(s, lost))
            # No more than the block's own channels: the next ones are another thread's.
            memcpy(total + row * t.pitch + c, lanes, min(16, c1 - c) * sizeof(double))
        for c in range(t.channels if t.fold > 1 else 0):
            for v in range(1, t.fold):
                total[row * t.pitch + c] += total[row * t.pitch + v * t.channels + c]


# ---- The small step: from sums to coefficients, in float64, for channels [c0, c1) of run g ----

# Channels are finished sixteen at a time, in arrays of their own and without branches, so that
# the compiler does square roots and divisions for several at once.

cdef inline Py_ssize_t channels_of_run(const Task* t, Py_ssize_t c1) noexcept nogil:
    """Where the channels of a block of columns end: folded rows hold each several times."""
    return min(c1, t.channels)


cdef inline void load_doubles(double* values, const double* row, Py_ssize_t count) noexcept nogil:
    if count == 16:
        memcpy(values, row, 16 * sizeof(double))
    else:
        memset(values, 0, 16 * sizeof(double))
        memcpy(values, row, count * sizeof(double))


cdef inline void store_doubles(double* row, const double* values, Py_ssize_t count) noexcept nogil:
    if count == 16:
        memcpy(row, values, 16 * sizeof(double))
    else:
        memcpy(row, values, count * sizeof(double))


cdef inline void gather(const Table* table, Py_ssize_t g, Py_ssize_t c, Py_ssize_t count,
                        double default, double* values) noexcept nogil:
    """`count` entries from channel c on; the default where there are none."""
    cdef const char* row = table.data + g * table.g + c * table.c
    cdef Py_ssize_t i
    if table.data == NULL:
        for i in range(16):
            values[i] = default
    elif table.single and table.c == sizeof(float):
        for i in range(count):
            values[i] = (<const float*> row)[i]
    elif not table.single and table.c == sizeof(double):
        load_doubles(values, <const double*> row, count)
    else:
        for i in range(count):
            values[i] = entry(table, g, c + i, default)


cdef inline void scatter(const Table* table, Py_ssize_t g, Py_ssize_t c, Py_ssize_t count,
                         const double* values) noexcept nogil:
    """`count` entries of a dense table of results, from channel c on."""
    cdef char* row = table.data + g * table.g + c * table.c
    cdef Py_ssize_t i
    if table.single:
        for i in range(count):
            (<float*> row)[i] = <float> values[i]
    else:
        store_doubles(<double*> row, values, count)


cdef inline void first_values(const real* x, Py_ssize_t stride, Py_ssize_t count,
                              double* values) noexcept nogil:
    """The values of some channels at one place."""
    cdef Py_ssize_t i
    if stride == 1:
        for i in range(count):
            values[i] = x[i]
    else:
        for i in range(count):
            values[i] = x[i * stride]


cdef void set_shift(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """What is subtracted before summing: each channel's first value, or its given mean."""
    cdef Py_ssize_t c, count, end = channels_of_run(t, c1)
    cdef double* shift = t.shift + g * t.pitch
    cdef double* unit = t.unit + g * t.pitch
    cdef double[16] values
    for c in range(c0, c1):
        unit[c] = 1
    for c in range(c0, end, 16):
        count = min(16, end - c)
        if t.reduce == MOMENTS:
            first_values(at(&t.x, g, 0, c), t.x.c, count, values)
        else:
            gather(&t.mean, g, c, count, 0, values)
        store_doubles(shift + c, values, count)
    for c in range(t.channels, t.C if t.fold > 1 else 0):
        shift[c] = shift[c - t.channels]


cdef inline bint is_doubtful(const Task* t, Py_ssize_t g, Py_ssize_t c,
                             double per_value) noexcept nogil:
    """Whether the shift was too far from the mean, or the squares too large, for the sums."""
    cdef double m = t.total[g * 2 * t.pitch + c]
    cdef double square = t.total[(g * 2 + 1) * t.pitch + c]
    # The mean of d*d is (1 + (m/s)**2) variances: beyond 16 deviations digits go missing.
    cdef bint fits = is_finite(square) & (m * (m * per_value) * (257 / 256.) <= square)
    return is_finite(m) & (not fits)


cdef void sum_again(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Sum the doubtful channels about the mean just found; the others come out as they were."""
    cdef Py_ssize_t c, v, j
    cdef double m, per_value = 1 / t.count
    cdef bint any_doubtful = False
    for c in range(c0, channels_of_run(t, c1)):
        any_doubtful |= is_doubtful(t, g, c, per_value)
    if not any_doubtful:
        return
    for c in range(c0, channels_of_run(t, c1)):
        if is_doubtful(t, g, c, per_value):
            m = t.total[g * 2 * t.pitch + c] / t.count
            for v in range(t.fold):
                t.shift[g * t.pitch + v * t.channels + c] += m
                if not is_finite(t.total[(g * 2 + 1) * t.pitch + c]):
                    t.unit[g * t.pitch + v * t.channels + c] = ldexp(1, -600)
    for j in range(t.chunks):
        reduce_chunk(t, g, c0, c1, j)
    merge(t, g, c0, c1)


cdef inline void store_rounded(real* row, const double* values, Py_ssize_t count) noexcept nogil:
    cdef real[16] rounded
    cdef Py_ssize_t i
    for i in range(16):
        rounded[i] = <real> values[i]
    if count == 16:
        memcpy(row, rounded, 16 * sizeof(real))
    else:
        memcpy(row, rounded, count * sizeof(real))


cdef void finish_moments(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Sums -> mean and biased variance, into the results."""
    cdef Py_ssize_t c, i, count, end = channels_of_run(t, c1)
    cdef const double* total = t.total + g * 2 * t.pitch
    cdef double[16] mean, var, shift, unit
    cdef double m
    sum_again(t, g, c0, c1)
    for c in range(c0, end, 16):
        count = min(16, end - c)
        load_doubles(mean, total + c, count)
        load_doubles(var, total + t.pitch + c, count)
        load_doubles(shift, t.shift + g * t.pitch + c, count)
        load_doubles(unit, t.unit + g * t.pitch + c, count)
        for i in range(16):
            m = mean[i] / t.count
            unit[i] = inverse_of_power(unit[i])
            mean[i] = shift[i] + m * unit[i]
            m = var[i] / t.count - m * m
            var[i] = choose(m < 0, 0, m) * unit[i] * unit[i]
        scatter(&t.first, g, c, count, mean)
        scatter(&t.second, g, c, count, var)


cdef inline void invert_deviations(double* var, Py_ssize_t count, double eps) noexcept nogil:
    """1 / sqrt(var + eps), and 0 where that sum is 0: the channel is constant, y = beta."""
    cdef Py_ssize_t i
    for i in range(count):
        var[i] = inverse_root(var[i] + eps)


cdef inline void given_deviations(const Task* t, Py_ssize_t g, Py_ssize_t c, Py_ssize_t count,
                                  double* rstd) noexcept nogil:
    """The same for the given variances; 1 without any, when gamma already is the scale."""
    gather(&t.var, g, c, count, 1, rstd)
    if t.var.data != NULL:
        invert_deviations(rstd, count, t.eps)


cdef inline void pack_affine(real* row, Py_ssize_t pitch, Py_ssize_t count, double* mean,
                             double* scale, double* beta) noexcept nogil:
    """Some channels' coefficients near, hi, scale, shift of y = (x*near - hi)*scale + shift."""
    cdef double[16] near
    cdef double hi
    cdef Py_ssize_t i
    for i in range(16):
        near[i] = half_way(scale[i])
    for i in range(16):
        mean[i] *= near[i]
        scale[i] *= inverse_of_power(near[i])
        hi = <real> mean[i]
        beta[i] -= product(mean[i] - hi, scale[i])
    for i in range(16):
        scale[i] = saturated(scale[i])
    store_rounded(row, near, count)
    store_rounded(row + pitch, mean, count)
    store_rounded(row + 2 * pitch, scale, count)
    store_rounded(row + 3 * pitch, beta, count)


cdef void finish_affine(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """mean, var, gamma, beta -> the packed coefficients of y."""
    cdef Py_ssize_t c, i, count, end = channels_of_run(t, c1)
    cdef double[16] mean, scale, gamma, beta
    for c in range(c0, end, 16):
        count = min(16, end - c)
        if t.reduce == MOMENTS:
            gather(&t.first, g, c, count, 0, mean)
            gather(&t.second, g, c, count, 0, scale)
            invert_deviations(scale, count, t.eps)
        else:
            gather(&t.mean, g, c, count, 0, mean)
            given_deviations(t, g, c, count, scale)
        gather(&t.gamma, g, c, count, 1, gamma)
        gather(&t.beta, g, c, count, 0, beta)
        for i in range(16):
            scale[i] *= gamma[i]
        pack_affine(packed(t, g) + c, t.pitch, count, mean, scale, beta)
    repeat(t, packed(t, g), c0, 4)


cdef struct Gradients:
    # Sixteen channels' dx = a*(dy - dy_mean) + b*xhat, xhat = (x - mean)*rstd.
    double[16] a, b, dy_mean, mean, rstd


cdef inline void sums_to_gradients(const Task* t, Py_ssize_t g, Py_ssize_t c, Py_ssize_t count,
                                   Gradients* k) noexcept nogil:
    """Sums -> dgamma and dbeta, into the results, and what dx is made of."""
    cdef const double* total = t.total + g * 2 * t.pitch
    cdef double[16] dgamma, dbeta
    cdef Py_ssize_t i
    load_doubles(dgamma, total + c, count)
    load_doubles(dbeta, total + t.pitch + c, count)
    given_deviations(t, g, c, count, k.rstd)
    gather(&t.gamma, g, c, count, 1, k.a)
    for i in range(16):
        dgamma[i] *= k.rstd[i]
        k.a[i] *= k.rstd[i]
        k.b[i] = -k.a[i] * (dgamma[i] / t.count)
        k.dy_mean[i] = dbeta[i] / t.count
    scatter(&t.first, g, c, count, dgamma)
    scatter(&t.second, g, c, count, dbeta)


cdef void finish_gradients(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Sums, or given coefficients -> results, and the packed coefficients of dx.

    Without gradients through the statistics dx is the affine map of dy with scale a.
    """
    cdef Py_ssize_t c, count, end = channels_of_run(t, c1)
    cdef real* row = packed(t, g)
    cdef Gradients k
    for c in range(c0, end, 16):
        count = min(16, end - c)
        gather(&t.mean, g, c, count, 0, k.mean)
        if t.reduce == GRADIENT_MOMENTS:
            sums_to_gradients(t, g, c, count, &k)
        else:
            gather(&t.a, g, c, count, 0, k.a)
            gather(&t.b, g, c, count, 0, k.b)
            gather(&t.dy_mean, g, c, count, 0, k.dy_mean)
            gather(&t.rstd, g, c, count, 1, k.rstd)
        if t.map == INPUT_GRADIENT:
            pack_gradient(row + c, t.pitch, count, &k)
        elif t.map == AFFINE:
            memset(k.mean, 0, sizeof(k.mean))
            memset(k.b, 0, sizeof(k.b))
            pack_affine(row + c, t.pitch, count, k.mean, k.a, k.b)
    repeat(t, row, c0, PACKED if t.map == INPUT_GRADIENT else 4)


cdef inline void pack_gradient(real* row, Py_ssize_t pitch, Py_ssize_t count,
                               Gradients* k) noexcept nogil:
    """Some channels' coefficients of dx = (dy*far - dhi)*a + (((x*near - hi) - lo)*b + rest):
    mean(dy) is taken off where a value of dy equal to it leaves 0, and all of x - mean is kept,
    in hi, lo and, in the rest, what remains."""
    cdef double[16] far, near, lo, rest
    cdef double half, wanted, most, hi
    cdef Py_ssize_t i
    for i in range(16):
        far[i] = half_way(k.a[i])
    for i in range(16):
        # b*xhat is ((x - mean)*near)*b': `near` goes half of b's way, so that all stays in range.
        half = rough_root(k.b[i])
        wanted = k.rstd[i] * choose(k.b[i] != 0, half, 1)
        most = FARTHEST / fabs(k.mean[i])
        near[i] = power_of_two(choose(wanted < most, wanted, most))
    for i in range(16):
        k.a[i] *= inverse_of_power(far[i])
        k.dy_mean[i] *= far[i]
        k.b[i] *= k.rstd[i] * inverse_of_power(near[i])
        k.mean[i] *= near[i]
        hi = <real> k.mean[i]
        lo[i] = k.mean[i] - hi
        hi = <real> lo[i]
        rest[i] = product(lo[i] - hi, k.b[i])
        hi = <real> k.dy_mean[i]
        rest[i] = -product(k.dy_mean[i] - hi, k.a[i]) - rest[i]
    for i in range(16):
        k.a[i] = saturated(k.a[i])
        k.b[i] = saturated(k.b[i])
    store_rounded(row, far, count)
    store_rounded(row + pitch, k.dy_mean, count)
    store_rounded(row + 2 * pitch, k.a, count)
    store_rounded(row + 3 * pitch, near, count)
    store_rounded(row + 4 * pitch, k.mean, count)
    store_rounded(row + 5 * pitch, lo, count)
    store_rounded(row + 6 * pitch, k.b, count)
    store_rounded(row + 7 * pitch, rest, count)


cdef void repeat(const Task* t, real* row, Py_ssize_t c0, int rows) noexcept nogil:
    """The channels' coefficients once for each sample in a row of memory, and their beginning
    once more behind the end, for vectors that reach into the next row."""
    cdef Py_ssize_t i, c
    for i in range(rows):
        for c in range(t.channels, t.C if t.fold > 1 else 0):
            row[i * t.pitch + c] = row[i * t.pitch + c - t.channels]
        if c0 == 0 and t.inside:
            for c in range(t.C, t.pitch):
                row[i * t.pitch + c] = row[i * t.pitch + c - t.C]


cdef void finish(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """What stands between the passes."""
    if t.reduce != NO_REDUCE:
        merge(t, g, c0, c1)
    if t.reduce == MOMENTS:
        finish_moments(t, g, c0, c1)
    if t.reduce == GRADIENT_MOMENTS or t.map == INPUT_GRADIENT:
        finish_gradients(t, g, c0, c1)
    elif t.map == AFFINE:
        finish_affine(t, g, c0, c1)


# ---- Maps ----

cdef inline Py_ssize_t unaligned(const real* p, Py_ssize_t n) noexcept nogil:
    """How many of the n elements from p on lie before the first whole 64-byte line."""
    return min((-(<uintptr_t> p) & 63) // sizeof(real), <size_t> n)


cdef inline void put(real* out, vec y, bint stream) noexcept nogil:
    if stream:
        vstream(out, y)
    else:
        vstore(out, y)


cdef struct Line:
    # The line of a streamed run that is not full yet: what waits, after what is not the run's own.
    real[32] values
    Py_ssize_t foreign, waiting


cdef inline void begin_run(Line* line, const real* out) noexcept nogil:
    line.foreign = -unaligned(out, 16) & 15
    line.waiting = line.foreign


cdef inline void end_run(Line* line, real* end) noexcept nogil:
    cdef Py_ssize_t own = line.waiting - line.foreign
    if own > 0:
        vstore_part(end - own, vload(line.values + line.foreign), own)


cdef inline void fill_line(Line* line, real* out, vec y, Py_ssize_t n) noexcept nogil:
    """The next n values of the run, no more than the line takes; they belong at `out`."""
    vstore(line.values + line.waiting, y)
    line.waiting += n
    out += n
    if line.waiting < 16:
        return
    if line.foreign > 0:
        end_run(line, out)
    else:
        vstream(out - 16, vload(line.values))
    line.foreign = line.waiting = 0


cdef void affine_plane(const real* x, real* out, Py_ssize_t n, const real* row, Py_ssize_t pitch,
                       bint stream, Line* line, bint fetch, Py_ssize_t ahead) noexcept nogil:
    """n contiguous values of one channel, whose coefficients stand `pitch` apart; meanwhile those
    `ahead` of x are fetched."""
    cdef vec[PACKED] k
    cdef Py_ssize_t s = 0
    vsplat_each(k, row, pitch, 4)
    if stream and line.waiting > 0:
        s = min(16 - line.waiting, n)
        fill_line(line, out, affine(vload_part(x, s), k), s)
    while s + 16 <= n:
        prefetch(x + s + ahead, fetch)
        put(out + s, affine(vload(x + s), k), stream)
        s += 16
    if s == n:
        return
    if stream:
        fill_line(line, out + s, affine(vload_part(x + s, n - s), k), n - s)
    else:
        vstore_part(out + s, affine(vload_part(x + s, n - s), k), n - s)


cdef void gradient_plane(const real* dy, const real* x, real* out, Py_ssize_t n, const real* row,
                         Py_ssize_t pitch, bint stream, Line* line, bint fetch,
                         Py_ssize_t dy_ahead, Py_ssize_t x_ahead) noexcept nogil:
    """n contiguous values of one channel, whose coefficients stand `pitch` apart; meanwhile those
    ahead of dy and x are fetched."""
    cdef vec[PACKED] k
    cdef Py_ssize_t s = 0
    cdef vec y
    vsplat_each(k, row, pitch, PACKED)
    if stream and line.waiting > 0:
        s = min(16 - line.waiting, n)
        fill_line(line, out, gradient(vload_part(dy, s), vload_part(x, s), k), s)
    while s + 16 <= n:
        prefetch(dy + s + dy_ahead, fetch)
        prefetch(x + s + x_ahead, fetch)
        put(out + s, gradient(vload(dy + s), vload(x + s), k), stream)
        s += 16
    if s == n:
        return
    y = gradient(vload_part(dy + s, n - s), vload_part(x + s, n - s), k)
    if stream:
        fill_line(line, out + s, y, n - s)
    else:
        vstore_part(out + s, y, n - s)


cdef inline void map_plane(const Task* t, Py_ssize_t g, Py_ssize_t n, Py_ssize_t c, Py_ssize_t s0,
                           Py_ssize_t s1, Line* line, Py_ssize_t ahead) noexcept nogil:
    """Values s0 to s1 of one plane, while those of the channels `ahead` are fetched."""
    cdef const real* row = packed(t, g) + c
    cdef const real* source = at(&t.source, g, n, c) + s0
    cdef real* out = <real*> at(&t.out, g, n, c) + s0
    if t.map == AFFINE:
        affine_plane(source, out, s1 - s0, row, t.pitch, t.stream, line, t.fetch,
                     ahead * t.source.c)
    else:
        gradient_plane(at(&t.dy, g, n, c) + s0, source, out, s1 - s0, row, t.pitch, t.stream,
                       line, t.fetch, ahead * t.dy.c, ahead * t.source.c)


cdef void map_outside(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t j,
                      Py_ssize_t ahead) noexcept nogil:
    """Chunk j of channels [c0, c1), while that of the channels `ahead` is fetched.

    Planes that follow each other are streamed as one run, or what they share lines with.
    """
    cdef Chunk k = chunk(t, j)
    cdef Py_ssize_t n, c
    cdef Line line
    for n in range(k.n0, k.n1):
        for c in range(c0, c1):
            if t.stream and (c == c0 or not t.joined):
                begin_run(&line, at(&t.out, g, n, c) + k.s0)
            map_plane(t, g, n, c, k.s0, k.s1, &line, ahead)
            if t.stream and (c + 1 == c1 or not t.joined):
                end_run(&line, <real*> at(&t.out, g, n, c) + k.s1)


cdef void affine_part(const real* x, Py_ssize_t x_stride, real* out, Py_ssize_t stride,
                      Py_ssize_t rows, Py_ssize_t width, const real* row, Py_ssize_t pitch) noexcept nogil:
    """Fewer than 16 columns of a few rows."""
    cdef vec[PACKED] k
    cdef Py_ssize_t r
    vload_each(k, row, pitch, 4)
    for r in range(rows):
        vstore_part(out + r * stride, affine(vload_part(x + r * x_stride, width), k), width)


cdef void affine_rows(const real* x, Py_ssize_t x_stride, real* out, Py_ssize_t stride,
                      Py_ssize_t rows, Py_ssize_t width, const real* row, Py_ssize_t pitch,
                      bint stream, bint fetch) noexcept nogil:
    """`width` columns of a few rows; the columns' coefficients stand in rows `pitch` apart."""
    cdef vec[PACKED] k
    cdef Py_ssize_t r, c = unaligned(out, width) if stream else 0
    cdef const real* source
    cdef real* target
    if c > 0:
        affine_part(x, x_stride, out, stride, rows, c, row, pitch)
    while c + 16 <= width:
        vload_each(k, row + c, pitch, 4)
        source, target = x + c, out + c
        for r in range(rows):
            prefetch(source + 2 * ahead_values(), fetch)
            put(target, affine(vload(source), k), stream)
            source += x_stride
            target += stride
        c += 16
    if c < width:
        affine_part(x + c, x_stride, out + c, stride, rows, width - c, row + c, pitch)


cdef void gradient_part(const real* dy, Py_ssize_t dy_stride, const real* x, Py_ssize_t x_stride,
                        real* out, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t width,
                        const real* row, Py_ssize_t pitch) noexcept nogil:
    """Fewer than 16 columns of a few rows."""
    cdef vec[PACKED] k
    cdef Py_ssize_t r
    cdef vec d, v
    vload_each(k, row, pitch, PACKED)
    for r in range(rows):
        d, v = vload_part(dy + r * dy_stride, width), vload_part(x + r * x_stride, width)
        vstore_part(out + r * stride, gradient(d, v, k), width)


cdef void gradient_rows(const real* dy, Py_ssize_t dy_stride, const real* x, Py_ssize_t x_stride,
                        real* out, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t width,
                        const real* row, Py_ssize_t pitch, bint stream,
                        bint fetch) noexcept nogil:
    """`width` columns of a few rows; the columns' coefficients stand in rows `pitch` apart."""
    cdef vec[PACKED] k
    cdef Py_ssize_t r, c = unaligned(out, width) if stream else 0
    cdef const real* source
    cdef const real* slope
    cdef real* target
    if c > 0:
        gradient_part(dy, dy_stride, x, x_stride, out, stride, rows, c, row, pitch)
    while c + 16 <= width:
        vload_each(k, row + c, pitch, PACKED)
        source, slope, target = x + c, dy + c, out + c
        for r in range(rows):
            prefetch(source + 2 * ahead_values(), fetch)
            prefetch(slope + 2 * ahead_values(), fetch)
            put(target, gradient(vload(slope), vload(source), k), stream)
            source += x_stride
            slope += dy_stride
            target += stride
        c += 16
    if c < width:
        gradient_part(dy + c, dy_stride, x + c, x_stride, out + c, stride, rows, width - c,
                      row + c, pitch)


cdef void map_rows(const Task* t, Py_ssize_t g, Py_ssize_t n, Py_ssize_t rows, Py_ssize_t c,
                   Py_ssize_t width) noexcept nogil:
    """`rows` rows from row n on, `width` columns from column c on."""
    cdef const real* row = packed(t, g) + c
    cdef real* out = <real*> at(&t.out, g, n, c)
    if t.map == AFFINE:
        affine_rows(at(&t.source, g, n, c), t.source.n, out, t.out.n, rows, width, row, t.pitch,
                    t.stream, t.fetch)
    else:
        gradient_rows(at(&t.dy, g, n, c), t.dy.n, at(&t.source, g, n, c), t.source.n, out, t.out.n,
                      rows, width, row, t.pitch, t.stream, t.fetch)


cdef inline bint is_dense(const Task* t) noexcept nogil:
    """Whether rows follow each other in memory without a gap, in every array."""
    return t.out.n == t.C and t.source.n == t.C and (t.map == AFFINE or t.dy.n == t.C)


cdef void map_inside(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                     Py_ssize_t j) noexcept nogil:
    """Chunk j of columns [c0, c1).

    Streaming wants whole lines. Where lines begin at the same column in every row, the rows are
    taken from that column on, each with the beginning of the next.
    """
    cdef Chunk k = chunk(t, j)
    cdef bint whole_lines = t.stream and t.out.n * sizeof(real) % 64 == 0
    # Rows whose lines begin at different columns are streamed one by one.
    cdef Py_ssize_t together = t.together if whole_lines or not t.stream else 1
    cdef Py_ssize_t n = k.n0, n1 = k.n1, c = c0, rows
    if whole_lines and c1 - c0 == t.C and is_dense(t) and n1 > n:
        c = unaligned(at(&t.out, g, n, 0), t.C)
        n1 -= 1
        if c > 0:
            map_rows(t, g, n, 1, 0, c)
    while n < n1:
        rows = min(together, n1 - n)
        map_rows(t, g, n, rows, c, c1 - c0)
        n += rows
    if n1 < k.n1:
        map_rows(t, g, n1, 1, c, c1 - c)
    if k.n1 == t.N and c0 < t.tail:
        map_rows(t, g, t.N, 1, c0, min(c1, t.tail) - c0)


cdef void map_chunk(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t j,
                    Py_ssize_t ahead) noexcept nogil:
    if t.inside:
        map_inside(t, g, c0, c1, j)
    else:
        map_outside(t, g, c0, c1, j, ahead)


# ---- Order of work ----

cdef struct Block:
    Py_ssize_t g, c0, c1    # channels [c0, c1) of run g


cdef inline Block block(const Task* t, Py_ssize_t b, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t per_run = (t.C + size - 1) // size
    cdef Block k
    k.g = b // per_run
    k.c0 = b % per_run * size
    k.c1 = min(k.c0 + size, t.C)
    return k


cdef inline Py_ssize_t count_blocks(const Task* t, Py_ssize_t size) noexcept nogil:
    return t.G * ((t.C + size - 1) // size)


cdef inline Py_ssize_t next_block(Task* t, Py_ssize_t b, Py_ssize_t end) noexcept nogil:
    """The block after b, whose next owner is free to be anyone or is known; `end` if none."""
    return min(fetch_add(&t.next_block, 1) if t.shared else b + 1, end)


cdef void run_blocks(Task* t, Py_ssize_t thread, Py_ssize_t team) noexcept nogil:
    """Each thread takes a block of channels at a time through the whole trip; the second walk may
    fetch the block that comes after it."""
    cdef Block k
    cdef Py_ssize_t blocks = count_blocks(t, t.block), later, ahead, j
    cdef Py_ssize_t end = blocks if t.shared else blocks * (thread + 1) // team
    cdef Py_ssize_t b = next_block(t, blocks * thread // team - 1, end)
    while b < end:
        k = block(t, b, t.block)
        if t.reduce != NO_REDUCE:
            set_shift(t, k.g, k.c0, k.c1)
            for j in range(t.chunks):
                reduce_chunk(t, k.g, k.c0, k.c1, j)
        finish(t, k.g, k.c0, k.c1)
        later = next_block(t, b, end)
        ahead = (later - b) * t.block if t.lookahead and later < end else 0
        if t.map != NO_MAP:
            for j in range(t.chunks - 1, -1, -1):
                map_chunk(t, k.g, k.c0, k.c1, j, ahead)
        b = later


cdef void run_split(Task* t, Py_ssize_t thread, Py_ssize_t team) noexcept nogil:
    """All threads share the chunks of all channels, in the order in which memory has them: unit
    u is chunk u // blocks of block u % blocks."""
    cdef Py_ssize_t blocks = count_blocks(t, t.block), units = blocks * t.chunks, u, b
    cdef Py_ssize_t b0 = blocks * thread // team, b1 = blocks * (thread + 1) // team
    cdef Block k
    if t.reduce != NO_REDUCE:
        for b in range(b0, b1):
            k = block(t, b, t.block)
            set_shift(t, k.g, k.c0, k.c1)
        team_barrier()
        for u in range(units * thread // team, units * (thread + 1) // team):
            k = block(t, u % blocks, t.block)
            reduce_chunk(t, k.g, k.c0, k.c1, u // blocks)
        team_barrier()
    for b in range(b0, b1):
        k = block(t, b, t.block)
        finish(t, k.g, k.c0, k.c1)
    if t.map == NO_MAP:
        return
    team_barrier()
    blocks = count_blocks(t, t.map_block)
    units = blocks * t.chunks
    for u in range(units * thread // team, units * (thread + 1) // team):
        k = block(t, u % blocks, t.map_block)
        map_chunk(t, k.g, k.c0, k.c1, u // blocks, 0)


cdef void work(Task* t, int thread, int team) noexcept nogil:
    cdef fp_mode mode = usual_mode()
    if t.split:
        run_split(t, thread, team)
    else:
        run_blocks(t, thread, team)
    if t.stream:
        stream_fence()
    restore_mode(mode)


cdef long _calls = 0


cdef void run(Task* t) noexcept nogil:
    """Run the task on its team of threads."""
    fetch_add(&_calls, 1)
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
