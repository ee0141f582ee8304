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
# 3. Sums are float64, whatever the elements are. Moments are sums of d = x - shift and d*d with the
#    channel's first value as the shift: mean = shift + m and var = sum(d*d)/n - m*m, m = sum(d)/n,
#    lose 1 + (m/s)**2 roundings, little unless that value is far out. Then (and where float64
#    squares overflow) the channel is summed again about the mean just found, right for any data.
# 4. Elementwise work is done in the element type, of half types in float32. The mean is a pair,
#    mean = hi + lo: x - hi is exact near the mean, and lo goes into the last constant, so that
#    y = (x - hi) * scale + (beta - lo * scale) keeps what one multiply-add of x would lose. Powers
#    of two (`near`, `far`) keep extreme scales in that type's range; multiplying by them is exact.
# 5. What precedes or follows normalization in a network is fused: a residual and an activation on
#    the way out, on the way back the activation's slope where it gave y. Loops take what they do
#    as a constant, `kind`; each is compiled once for each kind, without a branch in it.
#    Places that do not count are masked: of what was loaded, and of what is stored, only their
#    bits are cleared, so that nothing that stands there gets anywhere. All channels share a mask:
#    what counts of a row is known once if it is one sample; else each column's sample tells.
# 6. Channels that are pooled share their statistics, as in group norm. For moments a group is summed
#    as one plane where it is one in memory; else, and on the way back, each channel is summed by
#    itself, and the small step puts those of a group together. So a block is of whole groups.
# 7. A row (of layer norm) is a plane whose gamma and beta are by column: maps multiply by them after
#    or, back, before all else. The sums of columns are taken in the same walk as the row's, one row
#    after the other: theirs stay in memory, the row's in registers. They are kept for as many rows
#    as depend on shape alone.
# 8. A trip over planes runs both passes on one block of channels, the second walk in reverse, so
#    that it starts on what the cache still holds. Rows are walked in the order of memory, by all
#    threads together, which meet between the passes and then turn back; so are planes where single
#    blocks would leave threads idle (few channels). A map alone goes forward: it has seen nothing.

from cython.parallel cimport parallel
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport fabs, ldexp
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy, memset

from fastbn._ext.task cimport (
    ACTIVE, AFFINE, AHEAD, BY_COLUMN, GATED, GRADIENT_MOMENTS, INPUT_GRADIENT, KEEPS,
    KINDS, MOMENTS, NO_MAP, NO_REDUCE, PACKED, RESIDUAL, ROWS_PICKED, SELECTED, WIDE, WITH_X,
    Operand, Table, Task,
)

cdef extern from "simd.h" nogil:
    ctypedef float real     # or double: C knows; so mixed expressions are double here
    ctypedef float element  # what memory holds: a real, or a half type
    ctypedef struct vec:
        pass
    ctypedef struct wide:
        pass
    ctypedef struct bends:  # an activation
        pass
    bends bends_of(double slope, double top)
    vec vload(const element* p)
    vec vload_some(const element* p, long n)
    void vstore(element* p, vec v)
    void vstore_part(element* p, vec v, long n)
    void vstore_some(element* p, vec v, long n)
    void vstream(element* p, vec v)
    const int BOUND         # bytes; streaming starts at a multiple
    void vsplat_each(vec* v, const real* p, long pitch, int count)
    void vload_each(vec* v, const real* p, long pitch, int count)
    ctypedef struct picks:  # which of sixteen places count
        pass
    ctypedef struct lanes:  # the same, as a mask
        pass
    picks picks_of(const unsigned char* p)
    picks picks_alike(const unsigned char* p)
    picks picks_before(const unsigned char* end, const unsigned char* p)
    picks picks_by(picks numbers, picks some)
    picks numbers_of(const unsigned char* p)
    lanes lanes_of(picks some)
    vec vand(vec v, lanes mask)
    ctypedef struct weights:  # what samples weigh
        const double* first
        const double* end
        long left, each
    wide weights_by(const weights* p, picks numbers)
    vec vweights_by(const weights* p, picks numbers)
    vec vsplat(real a)
    vec affine(vec x, const vec* k)
    vec gradient_weighed(vec dy, vec x, vec w, const vec* k)
    vec gradient(vec dy, vec x, const vec* k)
    vec vadd(vec a, vec b)
    vec vmul(vec a, vec b)
    vec activate(vec v, const bends* b)
    vec gate(vec dy, vec y, const bends* b)
    wide wload_table(const double* p)
    wide wload_table_part(const double* p, long n)
    void wstore_table(double* p, wide w)
    wide wsplat(double a)
    wide wadd(wide a, wide b)
    wide wsub(wide a, wide b)
    double wsum(wide a)
    double value_of(const element* p)
    void add_moments(const element* x, long n, wide shift, wide unit, wide* first, wide* second)
    void add_gradients(const element* dy, const element* x, const element* y, long n, wide mean,
                       const bends* b, wide* first, wide* second)
    void add_both_ways(const element* dy, const element* x, const element* y, long n, double mean,
                       double rstd, const double* gamma, const bends* b, wide* first, wide* second,
                       double* column_first, double* column_second)
    void add_picked_moments(const element* x, picks some, wide weight, long n, wide shift,
                            wide unit, wide* first, wide* second)
    void add_picked_gradients(const element* dy, const element* x, const element* y, picks some,
                              long n, wide mean, const bends* b, wide* first, wide* second)
    const double FARTHEST   # the mean times `near` stays below
    double inverse_root(double a)
    double power_of_two(double a)
    double rough_root(double a)
    bint is_usual_scale(double a)
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
    void prefetch(const element* p, bint wanted)
    long fetch_add(long* counter, long by)
    int thread_number()
    int team_size()
    void team_barrier()


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
    return t.partial + (g * t.kept + min(j, t.kept - 1)) * 2 * t.pitch


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
    bint inside, weighed
    picks numbers
    weights weighs
    Py_ssize_t samples

cdef struct Marked:
    # The same of a few rows of one sample each.
    picks[ROWS_PICKED] some
    double[ROWS_PICKED] weight

cdef double unweighed = 1


cdef inline Selected selected_at(const Task* t, Py_ssize_t g, Py_ssize_t n,
                                 Py_ssize_t s) noexcept nogil:
    """At value s of plane n, or at row n."""
    cdef Selected p
    cdef Py_ssize_t sample = n * t.fold
    memset(&p.numbers, 0, sizeof(picks))
    p.samples, p.weighed = t.fold, t.weights != NULL
    p.mask, p.mask_end = t.mask + g * t.mask_g + sample * t.S + s, t.mask + t.G * t.mask_g
    p.inside = p.mask_end - p.mask >= (ROWS_PICKED + 1) * t.fold + 16
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
    p.numbers = numbers_of(t.numbers + c)
    return p


cdef inline picks picks_at(const Selected* p) noexcept nogil:
    """Of sixteen columns those that count."""
    return picks_by(p.numbers, picks_of(p.mask) if p.inside else picks_before(p.mask_end, p.mask))


cdef inline bint mark(const Task* t, Selected p, Py_ssize_t rows, Marked* marked) noexcept nogil:
    """A few rows from this one on, and whether they are of one sample each."""
    cdef Py_ssize_t r
    if t.fold > 1:
        return False
    for r in range(rows):
        marked.some[r], marked.weight[r] = picks_alike(p.mask), p.weighs.first[0]
        pass_samples(&p, 1)
    return True


# ---- Reductions ----

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


cdef struct Summed:
    # Where a sum is in x, dy and the y that gates it, and how far ahead it fetches.
    const element* x
    const element* dy
    const element* y
    Py_ssize_t x_row, dy_row, y_row
    Py_ssize_t x_ahead, dy_ahead, y_ahead
    bint fetch
    bends activation
    picks some      # of the next sixteen
    wide weight     # the same, for moments


cdef inline void fetch_summed(int kind, const Summed* p, Py_ssize_t s) noexcept nogil:
    prefetch(p.x + s + p.x_ahead, p.fetch)
    if kind & WITH_X:
        prefetch(p.dy + s + p.dy_ahead, p.fetch)
    if kind & GATED:
        prefetch(p.y + s + p.y_ahead, p.fetch)


cdef inline void add(int kind, const Summed* p, Py_ssize_t s, Py_ssize_t n, wide shift, wide unit,
                     wide* first, wide* second) noexcept nogil:
    """Add n values to the moments or, with dy beside x, to the sums of gradients."""
    if kind & SELECTED and kind & WITH_X:
        add_picked_gradients(p.dy + s, p.x + s, p.y + s, p.some, n, shift,
                             &p.activation if kind & GATED else NULL, first, second)
    elif kind & SELECTED:
        add_picked_moments(p.x + s, p.some, p.weight, n, shift, unit, first, second)
    elif not kind & WITH_X:
        add_moments(p.x + s, n, shift, unit, first, second)
    elif kind & GATED:
        add_gradients(p.dy + s, p.x + s, p.y + s, n, shift, &p.activation, first, second)
    else:
        add_gradients(p.dy + s, p.x + s, p.x, n, shift, NULL, first, second)


cdef inline Summed summed_at(const Task* t, Py_ssize_t g, Py_ssize_t n, Py_ssize_t c,
                             Py_ssize_t s) noexcept nogil:
    cdef Summed p
    p.x, p.dy, p.y = at(&t.x, g, n, c) + s, at(&t.source, g, n, c) + s, at(&t.other, g, n, c) + s
    p.x_row, p.dy_row, p.y_row = t.x.n, t.source.n, t.other.n
    p.fetch, p.activation = t.fetch, bends_of(t.slope, t.top)
    return p


cdef inline void sum_planes(int kind, const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                            Py_ssize_t j) noexcept nogil:
    """Channels outside: the sums of channels [c0, c1) over chunk j."""
    cdef Chunk k = chunk(t, j)
    cdef Py_ssize_t c, n, s, size = k.s1 - k.s0, whole = size // 16 * 16
    cdef const double* shift = t.shift + g * t.pitch
    cdef const double* unit = t.unit + g * t.pitch
    cdef double* sum = sums(t, g, j)
    cdef wide shifts, units, first, second
    cdef Summed p
    cdef Selected selected
    for c in range(c0, c1):
        shifts, units = wsplat(shift[c]), wsplat(unit[c])
        first, second = wsplat(0), wsplat(0)
        for n in range(k.n0, k.n1):
            p = summed_at(t, g, n, c, k.s0)
            p.x_ahead, p.dy_ahead = later(t, &t.x, n), later(t, &t.source, n)
            p.y_ahead = later(t, &t.other, n)
            if kind & SELECTED:
                selected = selected_at(t, g, n, k.s0)
                p.weight = wsplat(selected.weighs.first[0])
            for s in range(0, whole, 16):
                fetch_summed(kind, &p, s)
                if kind & SELECTED:
                    p.some = picks_of(selected.mask + s)
                add(kind, &p, s, 16, shifts, units, &first, &second)
            if whole < size:
                if kind & SELECTED:
                    p.some = picks_before(selected.mask_end, selected.mask + whole)
                add(kind, &p, whole, size - whole, shifts, units, &first, &second)
        sum[c], sum[t.pitch + c] = wsum(first), wsum(second)


cdef inline void sum_columns(int kind, Summed p, Selected selected, const Marked* marked,
                             Py_ssize_t rows, Py_ssize_t width, const double* shift,
                             const double* unit, double* first, double* second) noexcept nogil:
    """Up to 16 columns of a few rows, whose tables start here."""
    cdef wide k = wload_table(shift), u = wload_table(unit)
    cdef wide sum = wload_table(first), other = wload_table(second)
    cdef Py_ssize_t r
    p.weight = wsplat(1)
    for r in range(rows):
        fetch_summed(kind, &p, 0)
        if kind & SELECTED and marked != NULL:
            p.some, p.weight = marked.some[r], wsplat(marked.weight[r])
        elif kind & SELECTED:
            p.some = picks_at(&selected)
            if not kind & WITH_X and selected.weighed:
                p.weight = weights_by(&selected.weighs, selected.numbers)
            pass_samples(&selected, selected.samples)
        add(kind, &p, 0, width, k, u, &sum, &other)
        p.x += p.x_row
        p.dy += p.dy_row
        p.y += p.y_row
    wstore_table(first, sum)
    wstore_table(second, other)


cdef inline void sum_one_row(int kind, const Summed* p, Py_ssize_t width, const double* shift,
                             const double* unit, double* first, double* second) noexcept nogil:
    """Of a single row, sums are added where they are: each is needed once."""
    cdef Py_ssize_t s, whole = width // 16 * 16
    for s in range(0, whole, 16):
        fetch_summed(kind, p, s)
        add(kind, p, s, 16, wload_table(shift + s), wload_table(unit + s), <wide*> (first + s),
            <wide*> (second + s))
    if whole < width:
        add(kind, p, whole, width - whole, wload_table(shift + whole), wload_table(unit + whole),
            <wide*> (first + whole), <wide*> (second + whole))


cdef inline void sum_rows(int kind, const Task* t, Py_ssize_t g, Py_ssize_t n, Py_ssize_t rows,
                          Py_ssize_t c0, Py_ssize_t width, double* sum,
                          Py_ssize_t ahead) noexcept nogil:
    """Channels inside: add a few rows to the sums of `width` columns from c0 on; meanwhile the
    rows `ahead` are fetched."""
    cdef const double* shift = t.shift + g * t.pitch
    cdef const double* unit = t.unit + g * t.pitch
    cdef Summed p = summed_at(t, g, n, c0, 0)
    cdef Selected row, selected
    cdef Marked marked
    cdef bint known = False
    cdef Py_ssize_t c, end = c0 + width, whole = end - width % 16
    cdef double* second = sum + t.pitch
    p.x_ahead, p.dy_ahead, p.y_ahead = ahead * p.x_row, ahead * p.dy_row, ahead * p.y_row
    if kind & SELECTED:
        row = selected_at(t, g, n, 0)
        known = mark(t, row, rows, &marked)
    elif rows == 1:
        sum_one_row(kind, &p, width, shift + c0, unit + c0, sum + c0, second + c0)
        return
    for c in range(c0, whole, 16):
        if kind & SELECTED and not known:
            selected = at_columns(t, &row, c)
        sum_columns(kind, p, selected, &marked if known else NULL, rows, 16, shift + c, unit + c,
                    sum + c, second + c)
        p.x += 16
        p.dy += 16
        p.y += 16
    if whole < end:
        if kind & SELECTED and not known:
            selected = at_columns(t, &row, whole)
        sum_columns(kind, p, selected, &marked if known else NULL, rows, end - whole, shift + whole,
                    unit + whole, sum + whole, second + whole)


cdef inline void sum_chunk_rows(int kind, const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                                Py_ssize_t j) noexcept nogil:
    """Channels inside: the sums of columns [c0, c1) over chunk j, a few whole rows at a time."""
    cdef Chunk k = chunk(t, j)
    cdef double* sum = sums(t, g, j)
    cdef Py_ssize_t n = k.n0, rows, padded = (c1 - c0 + 15) // 16 * 16
    cdef Py_ssize_t ahead = (ahead_values() // (t.few * padded) + 1) * t.few    # in whole steps
    memset(sum + c0, 0, padded * sizeof(double))
    memset(sum + t.pitch + c0, 0, padded * sizeof(double))
    while n < k.n1:
        rows = min(t.few, k.n1 - n)
        sum_rows(kind, t, g, n, rows, c0, c1 - c0, sum, ahead)
        n += rows
    if k.n1 == t.N and c0 < t.tail:
        sum_rows(kind, t, g, t.N, 1, c0, min(c1, t.tail) - c0, sum, 0)


cdef inline void sum_chunk(int kind, const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                           Py_ssize_t j) noexcept nogil:
    if t.inside:
        sum_chunk_rows(kind, t, g, c0, c1, j)
    else:
        sum_planes(kind, t, g, c0, c1, j)


cdef void reduce_chunk(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                       Py_ssize_t j) noexcept nogil:
    if t.mask != NULL and t.reduce == MOMENTS:
        sum_chunk(SELECTED, t, g, c0, c1, j)
    elif t.mask != NULL and t.kind & GATED:
        sum_chunk(WITH_X | GATED | SELECTED, t, g, c0, c1, j)
    elif t.mask != NULL:
        sum_chunk(WITH_X | SELECTED, t, g, c0, c1, j)
    elif t.reduce == MOMENTS:
        sum_chunk(0, t, g, c0, c1, j)
    elif t.kind & GATED:
        sum_chunk(WITH_X | GATED, t, g, c0, c1, j)
    else:
        sum_chunk(WITH_X, t, g, c0, c1, j)


cdef inline void store_wide(double* row, wide values, Py_ssize_t count) noexcept nogil:
    """No more than the block's own channels: the next ones are another thread's."""
    cdef double[16] lanes
    wstore_table(lanes, values)
    store_doubles(row, lanes, count)


cdef inline void add_sums(wide p, wide* s, wide* lost) noexcept nogil:
    """s += p, and what rounding loses (Knuth's two-sum)."""
    cdef wide r = wadd(s[0], p), was = wsub(r, s[0])
    lost[0] = wadd(lost[0], wadd(wsub(s[0], wsub(r, was)), wsub(p, was)))
    s[0] = r


cdef void add_chunk(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                    Py_ssize_t j) noexcept nogil:
    """Chunk j's sums, where only they are kept, onto those of the chunks before."""
    cdef double* total = t.total + g * 2 * t.pitch
    cdef double* gone = t.lost + g * 2 * t.pitch
    cdef Py_ssize_t row, c, count
    cdef wide s, lost, p
    for row in range(2):
        for c in range(c0, c1, 16):
            count = min(16, c1 - c)
            p = wload_table_part(sums(t, g, 0) + row * t.pitch + c, count)
            s, lost = p, wsplat(0)
            if j > 0:
                s = wload_table_part(total + row * t.pitch + c, count)
                lost = wload_table_part(gone + row * t.pitch + c, count)
                add_sums(p, &s, &lost)
            store_wide(total + row * t.pitch + c, s, count)
            store_wide(gone + row * t.pitch + c, lost, count)


cdef void merge(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Add the chunks' sums up in order."""
    cdef double* total = t.total + g * 2 * t.pitch
    cdef Py_ssize_t row, c, j, v, count
    cdef wide s, lost
    for row in range(2):
        for c in range(c0, c1, 16):
            count = min(16, c1 - c)
            if t.kept < t.chunks:
                s = wload_table_part(total + row * t.pitch + c, count)
                lost = wload_table_part(t.lost + (g * 2 + row) * t.pitch + c, count)
            else:
                s = wload_table_part(sums(t, g, 0) + row * t.pitch + c, count)
                lost = wsplat(0)
                for j in range(1, t.chunks):
                    add_sums(wload_table_part(sums(t, g, j) + row * t.pitch + c, count), &s, &lost)
            store_wide(total + row * t.pitch + c, wadd(s, lost), count)
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


cdef inline void gather_pooled(const Table* table, Py_ssize_t g, Py_ssize_t c, Py_ssize_t count,
                               double* values) noexcept nogil:
    cdef Py_ssize_t i, left = table.pool - c % table.pool
    cdef double value = entry(table, g, c, 0)
    for i in range(count):
        if left == 0:
            left, value = table.pool, entry(table, g, c + i, 0)
        values[i] = value
        left -= 1


cdef void gather_periodic(const Table* table, Py_ssize_t g, Py_ssize_t c, Py_ssize_t count,
                          double* values) noexcept nogil:
    cdef Py_ssize_t i, place = (c + table.phase) % table.period
    cdef const char* row = table.data + g * table.g
    for i in range(count):
        if table.single:
            values[i] = (<const float*> (row + place * table.c))[0]
        else:
            values[i] = (<const double*> (row + place * table.c))[0]
        place = place + 1 if place + 1 < table.period else 0


cdef inline void gather(const Table* table, Py_ssize_t g, Py_ssize_t c, Py_ssize_t count,
                        double default, double* values) noexcept nogil:
    """`count` entries from channel c on; the default where there are none."""
    cdef const char* row = table.data + g * table.g + c * table.c
    cdef Py_ssize_t i
    if table.data == NULL:
        for i in range(16):
            values[i] = default
    elif table.pool > 1:
        gather_pooled(table, g, c, count, values)
    elif table.period > 0:
        gather_periodic(table, g, c, count, values)
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
    """`count` entries of a dense table of results, from channel c on, if it is wanted."""
    cdef char* row = table.data + g * table.g + c * table.c
    cdef Py_ssize_t i
    if table.data == NULL:
        return
    if table.single:
        for i in range(count):
            (<float*> row)[i] = <float> values[i]
    else:
        store_doubles(<double*> row, values, count)


cdef inline void first_values(const element* x, Py_ssize_t stride, Py_ssize_t count,
                              double* values) noexcept nogil:
    """The values of some channels at one place."""
    cdef Py_ssize_t i
    if stride == 1:
        for i in range(count):
            values[i] = value_of(x + i)
    else:
        for i in range(count):
            values[i] = value_of(x + i * stride)


cdef inline const element* first_place(const Task* t, Py_ssize_t g, Py_ssize_t c) noexcept nogil:
    """Channel c's first value that weighs anything."""
    cdef Py_ssize_t step = t.fold if t.inside else t.S
    cdef Py_ssize_t n = t.starts[g] // step, rest = t.starts[g] % step
    if t.inside:
        return at(&t.x, g, n, c + rest * t.channels)
    return at(&t.x, g, n, c) + rest


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
            first_values(first_place(t, g, c), t.x.c, count, values)
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
        if t.kept < t.chunks:
            add_chunk(t, g, c0, c1, j)
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
        if t.pool > 1:
            store_doubles(each_of(t, g) + c, mean, count)
            store_doubles(each_of(t, g) + t.pitch + c, var, count)
        else:
            scatter(&t.first, g, c, count, mean)
            scatter(&t.second, g, c, count, var)
    for c in range((end - c0) // t.pool if t.pool > 1 else 0):
        pool_moments(t, g, c0 // t.pool + c)


cdef inline double* each_of(const Task* t, Py_ssize_t g) noexcept nogil:
    return t.each + g * 2 * t.pitch


cdef void pool_moments(const Task* t, Py_ssize_t g, Py_ssize_t group) noexcept nogil:
    """Its channels' means and variances -> a group's: no two large squares are subtracted (Chan,
    Golub & LeVeque 1983, equation 2.1)."""
    cdef const double* mean = each_of(t, g) + group * t.pool
    cdef const double* var = mean + t.pitch
    cdef Py_ssize_t i
    cdef double together = 0, square = 0
    for i in range(t.pool):
        together += mean[i] - mean[0]
    together = mean[0] + together / t.pool
    for i in range(t.pool):
        square += (var[i] + (mean[i] - together) * (mean[i] - together)) * (1. / t.pool)
    scatter(&t.first, g, group, 1, &together)
    scatter(&t.second, g, group, 1, &square)


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
    cdef bint usual = True
    cdef Py_ssize_t i
    for i in range(count):
        usual &= is_usual_scale(scale[i])
    for i in range(16):
        near[i] = 1
    if not usual:
        for i in range(16):
            near[i] = half_way(scale[i])
            mean[i] *= near[i]
            scale[i] *= inverse_of_power(near[i])
    for i in range(16):
        hi = <real> mean[i]
        beta[i] -= product(mean[i] - hi, scale[i])
    if not usual:
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
    # Sixteen channels' dx = a*(dy - dy_mean) + b*xhat + rest, xhat = (x - mean)*rstd.
    double[16] a, b, dy_mean, mean, rstd, rest


cdef inline void sums_to_gradients(const Task* t, Py_ssize_t g, Py_ssize_t c, Py_ssize_t count,
                                   Gradients* k) noexcept nogil:
    """Sums -> dgamma and dbeta, into the results, and what dx is made of."""
    cdef double* total = t.total + g * 2 * t.pitch
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
        k.rest[i] = 0
    scatter(&t.first, g, c, count, dgamma)
    scatter(&t.second, g, c, count, dbeta)
    if t.pool > 1:
        store_doubles(total + c, dgamma, count)


cdef void pool_gradients(const Task* t, Py_ssize_t g, Py_ssize_t c0) noexcept nogil:
    """dgamma and dbeta of a group's channels -> the means of gamma*dy*xhat and gamma*dy, instead."""
    cdef double* total = t.total + g * 2 * t.pitch
    cdef double dy_xhat = 0, dy = 0, gamma
    cdef Py_ssize_t c
    for c in range(c0, c0 + t.pool):
        gamma = entry(&t.gamma, g, c, 1)
        dy_xhat += gamma * total[c]
        dy += gamma * total[t.pitch + c]
    for c in range(c0, c0 + t.pool):
        total[c], total[t.pitch + c] = dy_xhat / (t.count * t.pool), dy / (t.count * t.pool)


cdef inline void pooled_to_gradients(const Task* t, Py_ssize_t g, Py_ssize_t c, Py_ssize_t count,
                                     Gradients* k) noexcept nogil:
    """The same as `sums_to_gradients` of means over groups: nothing is taken off dy before gamma
    multiplies it, which is a channel's own."""
    cdef const double* total = t.total + g * 2 * t.pitch
    cdef Py_ssize_t i
    load_doubles(k.b, total + c, count)
    load_doubles(k.rest, total + t.pitch + c, count)
    given_deviations(t, g, c, count, k.rstd)
    gather(&t.gamma, g, c, count, 1, k.a)
    for i in range(16):
        k.a[i] *= k.rstd[i]
        k.b[i] *= -k.rstd[i]
        k.rest[i] *= -k.rstd[i]
        k.dy_mean[i] = 0


cdef void finish_gradients(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Sums, or given coefficients -> results, and the packed coefficients of dx.

    Without gradients through the statistics dx is the affine map of dy with scale a.
    """
    cdef Py_ssize_t c, count, end = channels_of_run(t, c1)
    cdef real* row = packed(t, g)
    cdef Gradients k
    if t.pool > 1:
        for c in range(c0, end, 16):
            sums_to_gradients(t, g, c, min(16, end - c), &k)
        for c in range((end - c0) // t.pool):
            pool_gradients(t, g, c0 + c * t.pool)
    for c in range(c0, end, 16):
        count = min(16, end - c)
        gather(&t.mean, g, c, count, 0, k.mean)
        if t.pool > 1:
            pooled_to_gradients(t, g, c, count, &k)
        elif t.reduce == GRADIENT_MOMENTS:
            sums_to_gradients(t, g, c, count, &k)
        else:
            gather(&t.a, g, c, count, 0, k.a)
            gather(&t.b, g, c, count, 0, k.b)
            gather(&t.dy_mean, g, c, count, 0, k.dy_mean)
            gather(&t.rstd, g, c, count, 1, k.rstd)
            gather(&t.rest, g, c, count, 0, k.rest)
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
        rest[i] = k.rest[i] - product(k.dy_mean[i] - hi, k.a[i]) - rest[i]
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
    cdef Py_ssize_t i, done, more, end = t.pitch if c0 == 0 and t.inside else t.C
    for i in range(rows):
        done = t.channels
        while done < end:
            more = min(done, end - done)
            memcpy(row + done, row, more * sizeof(real))
            done += more
        row += t.pitch


cdef void unpack(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Coefficients that were packed before, for rows of memory that hold several samples."""
    cdef const real* row = <const real*> t.prepared
    cdef Py_ssize_t i, pitch = (t.channels + 15) // 16 * 16 + 16, end = channels_of_run(t, c1)
    if t.fold == 1:
        return
    for i in range(4):
        memcpy(packed(t, g) + i * t.pitch + c0, row + i * pitch + c0, (end - c0) * sizeof(real))
    repeat(t, packed(t, g), c0, 4)


cdef void finish(const Task* t, const Task* summed, Py_ssize_t g, Py_ssize_t c0,
                 Py_ssize_t c1) noexcept nogil:
    """What stands between the passes; `summed` is the task, or all of its groups."""
    cdef Py_ssize_t first = 0 if t.grouped else c0, end = summed.C if t.grouped else c1
    if t.prepared != NULL:
        unpack(t, g, c0, c1)
        return
    if t.reduce != NO_REDUCE:
        merge(summed, g, first, end)
    if t.reduce == MOMENTS:
        finish_moments(summed, g, first, end)
    if t.reduce == GRADIENT_MOMENTS or t.map == INPUT_GRADIENT:
        finish_gradients(t, g, c0, c1)
    elif t.map == AFFINE:
        finish_affine(t, g, c0, c1)


# ---- Maps ----

cdef struct Piece:
    # Chunk j of channels [c0, c1) of run g, while that of the channels `ahead` is fetched.
    Py_ssize_t g, c0, c1, j, ahead


cdef inline Py_ssize_t unaligned(const element* p, Py_ssize_t n) noexcept nogil:
    """How many of the n elements from p on lie before the first place where streaming may begin."""
    return min((-(<uintptr_t> p) & (BOUND - 1)) // sizeof(element), <size_t> n)


cdef inline void put(element* out, vec y, bint stream) noexcept nogil:
    if stream:
        vstream(out, y)
    else:
        vstore(out, y)


cdef struct Line:
    # The line of a streamed run that is not full yet: what waits, after what is not the run's own.
    element[32] values
    Py_ssize_t foreign, waiting


cdef inline void begin_run(Line* line, const element* out) noexcept nogil:
    line.foreign = -unaligned(out, 16) & 15
    line.waiting = line.foreign


cdef inline void end_run(Line* line, element* end) noexcept nogil:
    cdef Py_ssize_t own = line.waiting - line.foreign
    if own > 0:
        vstore_part(end - own, vload(line.values + line.foreign), own)


cdef inline void fill_line(Line* line, element* out, vec y, Py_ssize_t n) noexcept nogil:
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


cdef struct Place:
    # Where a map is in its operands, and how far ahead it fetches. `source` is x or, on the way
    # back, dy; `other` the residual or, on the way back, the y that gates. Copies of what the task
    # has: that would be read again after every store.
    const element* source
    const element* x
    const element* other
    element* out
    element* dresidual
    Py_ssize_t source_row, x_row, other_row, out_row, dresidual_row
    Py_ssize_t source_ahead, x_ahead, other_ahead
    bint fetch, stream_dresidual
    bends activation
    const real* columns         # gamma and, `after` it, beta, where they go by column
    Py_ssize_t after
    lanes kept      # of the next sixteen
    vec weight      # the same, for the gradient of the statistics


cdef inline Place place(const Task* t, Py_ssize_t g, Py_ssize_t n, Py_ssize_t c,
                        Py_ssize_t s) noexcept nogil:
    cdef Place p
    p.source, p.x = at(&t.source, g, n, c) + s, at(&t.x, g, n, c) + s
    p.other = at(&t.other, g, n, c) + s
    p.out, p.dresidual = at(&t.out, g, n, c) + s, at(&t.dresidual, g, n, c) + s
    p.source_row, p.x_row, p.other_row = t.source.n, t.x.n, t.other.n
    p.out_row, p.dresidual_row = t.out.n, t.dresidual.n
    p.fetch, p.stream_dresidual = t.fetch, t.stream_dresidual
    p.activation = bends_of(t.slope, t.top)
    return p


cdef inline void forward(Place* p, Py_ssize_t n) noexcept nogil:
    """On by n values of a row."""
    p.source += n
    p.x += n
    p.other += n
    p.out += n
    p.dresidual += n


cdef inline void fetch_place(int kind, const Place* p, Py_ssize_t s) noexcept nogil:
    prefetch(p.source + s + p.source_ahead, p.fetch)
    if kind & WITH_X:
        prefetch(p.x + s + p.x_ahead, p.fetch)
    if kind & (RESIDUAL | GATED):
        prefetch(p.other + s + p.other_ahead, p.fetch)


cdef inline vec result(int kind, const Place* p, Py_ssize_t s, Py_ssize_t n, const vec* k,
                       bint whole) noexcept nogil:
    """n values of y, or of dx; the residual's gradient is stored on the way."""
    cdef vec v = vload_some(p.source + s, n)
    cdef vec[2] column
    if kind & BY_COLUMN:
        vload_each(column, p.columns + s, p.after, 1 if kind & WITH_X else 2)
    if kind & SELECTED:
        v = vand(v, p.kept)
    if kind & GATED:
        v = gate(v, vload_some(p.other + s, n), &p.activation)
    if kind & KEEPS and whole and p.stream_dresidual:
        vstream(p.dresidual + s, v)
    elif kind & KEEPS:
        vstore_some(p.dresidual + s, v, n)
    if kind & BY_COLUMN and kind & WITH_X:
        v = vmul(v, column[0])
    if kind & WITH_X and kind & SELECTED:
        return vand(gradient_weighed(v, vload_some(p.x + s, n), p.weight, k), p.kept)
    if kind & WITH_X:
        return gradient(v, vload_some(p.x + s, n), k)
    v = affine(v, k)
    if kind & BY_COLUMN:
        v = vadd(vmul(v, column[0]), column[1])
    if kind & RESIDUAL:
        v = vadd(v, vload_some(p.other + s, n))
    if kind & ACTIVE:
        v = activate(v, &p.activation)
    if kind & SELECTED:
        v = vand(v, p.kept)
    return v


cdef inline int coefficients(int kind) noexcept nogil:
    return PACKED if kind & WITH_X else 4


cdef inline vec of_plane(int kind, Place* p, const Selected* selected, Py_ssize_t s, Py_ssize_t n,
                         const vec* k, bint whole) noexcept nogil:
    if kind & SELECTED and whole:
        p.kept = lanes_of(picks_of(selected.mask + s))
    elif kind & SELECTED:
        p.kept = lanes_of(picks_before(selected.mask_end, selected.mask + s))
    return result(kind, p, s, n, k, whole)


cdef inline void map_plane(int kind, const Task* t, Place* p, const Selected* selected,
                           Py_ssize_t n, const real* row, Line* line) noexcept nogil:
    """n contiguous values of one channel, whose coefficients stand `pitch` apart."""
    cdef bint stream = t.stream
    cdef vec[PACKED] k
    cdef Py_ssize_t s = 0
    vsplat_each(k, row, t.pitch, coefficients(kind))
    if stream and line.waiting > 0:
        s = min(16 - line.waiting, n)
        fill_line(line, p.out, of_plane(kind, p, selected, 0, s, k, False), s)
    while s + 16 <= n:
        fetch_place(kind, p, s)
        put(p.out + s, of_plane(kind, p, selected, s, 16, k, True), stream)
        s += 16
    if s == n:
        return
    if stream:
        fill_line(line, p.out + s, of_plane(kind, p, selected, s, n - s, k, False), n - s)
    else:
        vstore_part(p.out + s, of_plane(kind, p, selected, s, n - s, k, False), n - s)


cdef inline void map_planes(int kind, const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                            Py_ssize_t j, Py_ssize_t ahead) noexcept nogil:
    """Channels outside: chunk j of channels [c0, c1), while that of the channels `ahead` is
    fetched.

    Planes that follow each other are streamed as one run, or what they share lines with.
    """
    cdef Chunk k = chunk(t, j)
    cdef Py_ssize_t n, c, size = k.s1 - k.s0
    cdef Line line
    cdef Place p
    cdef Selected selected
    for n in range(k.n0, k.n1):
        if kind & SELECTED:
            selected = selected_at(t, g, n, k.s0)
        for c in range(c0, c1):
            p = place(t, g, n, c, k.s0)
            if kind & SELECTED:
                p.weight = vsplat(<real> selected.weighs.first[0])
            if kind & BY_COLUMN:
                p.columns = <const real*> t.columns + row_of_gamma(t, c) * t.places + k.s0
                p.after = t.period * t.places
            p.source_ahead, p.x_ahead = ahead * t.source.c, ahead * t.x.c
            p.other_ahead = ahead * t.other.c
            if t.stream and (c == c0 or not t.joined):
                begin_run(&line, p.out)
            map_plane(kind, t, &p, &selected, size, packed(t, g) + c, &line)
            if t.stream and (c + 1 == c1 or not t.joined):
                end_run(&line, p.out + size)


cdef inline void next_row(Place* p) noexcept nogil:
    p.source += p.source_row
    p.x += p.x_row
    p.other += p.other_row
    p.out += p.out_row
    p.dresidual += p.dresidual_row


cdef inline void pick_columns(int kind, Place* p, const Selected* here) noexcept nogil:
    """What counts, and weighs, of sixteen columns."""
    p.kept = lanes_of(picks_at(here))
    if kind & WITH_X:
        p.weight = vweights_by(&here.weighs, here.numbers)


cdef inline void map_columns(int kind, Place p, const Selected* selected, Py_ssize_t rows,
                             Py_ssize_t width, const real* row, Py_ssize_t pitch,
                             bint stream) noexcept nogil:
    """Up to 16 columns of a few rows; the columns' coefficients stand in rows `pitch` apart. NULL
    in place of what is selected: it is picked already."""
    cdef vec[PACKED] k
    cdef Selected here
    cdef Py_ssize_t r
    vload_each(k, row, pitch, coefficients(kind))
    if kind & SELECTED and selected != NULL:
        here = selected[0]
    for r in range(rows):
        fetch_place(kind, &p, 0)
        if kind & SELECTED and selected != NULL:
            pick_columns(kind, &p, &here)
            pass_samples(&here, here.samples)
        if stream:
            vstream(p.out, result(kind, &p, 0, 16, k, True))
        else:
            vstore_some(p.out, result(kind, &p, 0, width, k, False), width)
        next_row(&p)


cdef inline Py_ssize_t map_picked(int kind, const Task* t, Place p, Selected selected,
                                  Py_ssize_t rows, Py_ssize_t c, Py_ssize_t width,
                                  const real* row) noexcept nogil:
    """Whole vectors of a few rows from column c on, row by row: what is picked of a row is the same
    as far as its columns are of one sample. How many columns that were."""
    cdef Py_ssize_t r, s, whole = width // 16 * 16
    cdef Py_ssize_t pitch = t.pitch, alike = min(t.C - c, whole) // 16 * 16 if t.fold == 1 else 0
    cdef Place line
    cdef Selected here
    cdef bint stream = t.stream
    for r in range(rows):
        line = p
        line.kept = lanes_of(picks_alike(selected.mask))
        line.weight = vsplat(<real> selected.weighs.first[0])
        for s in range(0, alike, 16):
            map_columns(kind, line, NULL, 1, 16, row + s, pitch, stream)
            forward(&line, 16)
        for s in range(alike, whole, 16):
            here = at_columns(t, &selected, c + s)
            map_columns(kind, line, &here, 1, 16, row + s, pitch, stream)
            forward(&line, 16)
        next_row(&p)
        pass_samples(&selected, t.fold)
    return whole


cdef inline void map_selected_few(int kind, const Task* t, Place p, const Selected* first,
                                  Py_ssize_t rows, Py_ssize_t c, Py_ssize_t head, Py_ssize_t width,
                                  const real* row) noexcept nogil:
    """Columns of a few rows from column c on, of which the head is not streamed."""
    cdef Py_ssize_t s = 0, n = head if head > 0 else min(16, width)
    cdef Selected here
    while s < width:
        if n == 16 and t.C >= WIDE:
            n = map_picked(kind, t, p, first[0], rows, c + s, width - s, row + s)
        else:
            here = at_columns(t, first, c + s)
            map_columns(kind, p, &here, rows, n, row + s, t.pitch, t.stream and n == 16)
        forward(&p, n)
        s += n
        n = min(16, width - s)


cdef inline void map_few(int kind, const Task* t, Py_ssize_t g, Py_ssize_t n, Py_ssize_t rows,
                         Py_ssize_t c, Py_ssize_t width) noexcept nogil:
    """`rows` rows from row n on, `width` columns from column c on."""
    cdef const real* row = packed(t, g) + c
    cdef bint stream = t.stream
    cdef Place p = place(t, g, n, c, 0)
    cdef Selected first
    cdef Py_ssize_t pitch = t.pitch, s = unaligned(p.out, width) if stream else 0
    p.source_ahead = p.x_ahead = p.other_ahead = 2 * ahead_values()
    if kind & SELECTED:
        first = selected_at(t, g, n, 0)
        map_selected_few(kind, t, p, &first, rows, c, s, width, row)
        return
    if s > 0:
        map_columns(kind, p, NULL, rows, s, row, pitch, False)
        forward(&p, s)
    while s + 16 <= width:
        map_columns(kind, p, NULL, rows, 16, row + s, pitch, stream)
        forward(&p, 16)
        s += 16
    if s < width:
        map_columns(kind, p, NULL, rows, width - s, row + s, pitch, False)


cdef inline bint is_dense(const Task* t) noexcept nogil:
    """Whether rows follow each other in memory without a gap, in every array."""
    return (t.out.n == t.C and t.source.n == t.C and t.x.n == t.C and t.other.n == t.C
            and t.dresidual.n == t.C)


cdef inline void map_rows(int kind, const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                          Py_ssize_t j) noexcept nogil:
    """Channels inside: chunk j of columns [c0, c1).

    Streaming wants whole lines. Where lines begin at the same column in every row, the rows are
    taken from that column on, each with the beginning of the next.
    """
    cdef Chunk k = chunk(t, j)
    cdef bint whole_lines = t.stream and t.out.n * <Py_ssize_t> sizeof(element) % BOUND == 0
    # Rows whose lines begin at different columns are streamed one by one.
    cdef Py_ssize_t together = t.together if whole_lines or not t.stream else 1
    cdef Py_ssize_t n = k.n0, n1 = k.n1, c = c0, rows
    if whole_lines and c1 - c0 == t.C and is_dense(t) and n1 > n:
        c = unaligned(at(&t.out, g, n, 0), t.C)
        n1 -= 1
        if c > 0:
            map_few(kind, t, g, n, 1, 0, c)
    while n < n1:
        rows = min(together, n1 - n)
        map_few(kind, t, g, n, rows, c, c1 - c0)
        n += rows
    if n1 < k.n1:
        map_few(kind, t, g, n1, 1, c, c1 - c)
    if k.n1 == t.N and c0 < t.tail:
        map_few(kind, t, g, t.N, 1, c0, min(c1, t.tail) - c0)


cdef inline void map_chunk_of(int kind, const Task* t, const Piece* p) noexcept nogil:
    if t.inside:
        map_rows(kind, t, p.g, p.c0, p.c1, p.j)
    else:
        map_planes(kind, t, p.g, p.c0, p.c1, p.j, p.ahead)


# Each kind is a function of its own: compilers take twice as long over one that holds them all.
cdef void map_plain(const Task* t, const Piece* p) noexcept nogil:
    map_chunk_of(0, t, p)
cdef void map_gradient(const Task* t, const Piece* p) noexcept nogil:
    map_chunk_of(WITH_X, t, p)
cdef void map_active(const Task* t, const Piece* p) noexcept nogil:
    map_chunk_of(ACTIVE, t, p)
cdef void map_residual(const Task* t, const Piece* p) noexcept nogil:
    map_chunk_of(ACTIVE | RESIDUAL, t, p)
cdef void map_gated_gradient(const Task* t, const Piece* p) noexcept nogil:
    map_chunk_of(WITH_X | GATED, t, p)
cdef void map_kept_gradient(const Task* t, const Piece* p) noexcept nogil:
    map_chunk_of(WITH_X | GATED | KEEPS, t, p)
cdef void map_gated(const Task* t, const Piece* p) noexcept nogil:
    map_chunk_of(GATED, t, p)
cdef void map_kept(const Task* t, const Piece* p) noexcept nogil:
    map_chunk_of(GATED | KEEPS, t, p)
cdef void map_masked_plain(const Task* t, const Piece* p) noexcept nogil:
    map_chunk_of(SELECTED, t, p)
cdef void map_masked_gradient(const Task* t, const Piece* p) noexcept nogil:
    map_chunk_of(SELECTED | WITH_X, t, p)
cdef void map_masked_active(const Task* t, const Piece* p) noexcept nogil:
    map_chunk_of(SELECTED | ACTIVE, t, p)
cdef void map_masked_residual(const Task* t, const Piece* p) noexcept nogil:
    map_chunk_of(SELECTED | ACTIVE | RESIDUAL, t, p)
cdef void map_masked_gated_gradient(const Task* t, const Piece* p) noexcept nogil:
    map_chunk_of(SELECTED | WITH_X | GATED, t, p)
cdef void map_masked_kept_gradient(const Task* t, const Piece* p) noexcept nogil:
    map_chunk_of(SELECTED | WITH_X | GATED | KEEPS, t, p)
cdef void map_masked_gated(const Task* t, const Piece* p) noexcept nogil:
    map_chunk_of(SELECTED | GATED, t, p)
cdef void map_masked_kept(const Task* t, const Piece* p) noexcept nogil:
    map_chunk_of(SELECTED | GATED | KEEPS, t, p)

cdef void map_rows_plain(const Task* t, const Piece* p) noexcept nogil:
    map_planes(BY_COLUMN, t, p.g, p.c0, p.c1, p.j, p.ahead)
cdef void map_rows_active(const Task* t, const Piece* p) noexcept nogil:
    map_planes(BY_COLUMN | ACTIVE, t, p.g, p.c0, p.c1, p.j, p.ahead)
cdef void map_rows_residual(const Task* t, const Piece* p) noexcept nogil:
    map_planes(BY_COLUMN | ACTIVE | RESIDUAL, t, p.g, p.c0, p.c1, p.j, p.ahead)
cdef void map_rows_gradient(const Task* t, const Piece* p) noexcept nogil:
    map_planes(BY_COLUMN | WITH_X, t, p.g, p.c0, p.c1, p.j, p.ahead)
cdef void map_rows_gated_gradient(const Task* t, const Piece* p) noexcept nogil:
    map_planes(BY_COLUMN | WITH_X | GATED, t, p.g, p.c0, p.c1, p.j, p.ahead)
cdef void map_rows_kept_gradient(const Task* t, const Piece* p) noexcept nogil:
    map_planes(BY_COLUMN | WITH_X | GATED | KEEPS, t, p.g, p.c0, p.c1, p.j, p.ahead)

ctypedef void (*MapChunk)(const Task*, const Piece*) noexcept nogil

cdef MapChunk[KINDS] maps
maps[0] = map_plain
maps[WITH_X] = map_gradient
maps[ACTIVE] = map_active
maps[ACTIVE | RESIDUAL] = map_residual
maps[WITH_X | GATED] = map_gated_gradient
maps[WITH_X | GATED | KEEPS] = map_kept_gradient
maps[GATED] = map_gated
maps[GATED | KEEPS] = map_kept
maps[SELECTED] = map_masked_plain
maps[SELECTED | WITH_X] = map_masked_gradient
maps[SELECTED | ACTIVE] = map_masked_active
maps[SELECTED | ACTIVE | RESIDUAL] = map_masked_residual
maps[SELECTED | WITH_X | GATED] = map_masked_gated_gradient
maps[SELECTED | WITH_X | GATED | KEEPS] = map_masked_kept_gradient
maps[SELECTED | GATED] = map_masked_gated
maps[SELECTED | GATED | KEEPS] = map_masked_kept
maps[BY_COLUMN] = map_rows_plain
maps[BY_COLUMN | ACTIVE] = map_rows_active
maps[BY_COLUMN | ACTIVE | RESIDUAL] = map_rows_residual
maps[BY_COLUMN | WITH_X] = map_rows_gradient
maps[BY_COLUMN | WITH_X | GATED] = map_rows_gated_gradient
maps[BY_COLUMN | WITH_X | GATED | KEEPS] = map_rows_kept_gradient


cdef inline void map_chunk(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t j,
                           Py_ssize_t ahead) noexcept nogil:
    cdef Piece p
    p.g, p.c0, p.c1, p.j, p.ahead = g, c0, c1, j, ahead
    maps[t.kind](t, &p)


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


cdef inline void enter(Operand* a, const Operand* whole, const Block* k) noexcept nogil:
    if whole.data != NULL:
        a.data = whole.data + (k.g * a.g + k.c0 * a.c) * <Py_ssize_t> sizeof(element)


cdef inline void enter_table(Table* table, const Table* whole, const Block* k) noexcept nogil:
    if whole.period > 0:
        table.phase = whole.phase + k.c0
    elif whole.data != NULL:
        table.data = whole.data + k.g * table.g + k.c0 // max(table.pool, 1) * table.c


cdef Task thread_of(const Task* t, Py_ssize_t thread) noexcept nogil:
    """The task with a thread's tables, for blocks of its own."""
    cdef Task own = t[0]
    own.shift += thread * t.pitch
    own.unit += thread * t.pitch
    own.total += thread * 2 * t.pitch
    own.lost += thread * 2 * t.pitch
    own.each += thread * 2 * t.pitch
    own.partial += thread * t.kept * 2 * t.pitch
    own.packed += thread * PACKED * t.pitch * <Py_ssize_t> sizeof(real)
    return own


cdef void enter_block(Task* own, const Task* t, const Block* k) noexcept nogil:
    """A thread's task on a block, as on a task of its own. (There may be a block for every few
    values, and a Task is long: only what differs is written.)"""
    enter(&own.x, &t.x, k)
    enter(&own.source, &t.source, k)
    enter(&own.other, &t.other, k)
    enter(&own.out, &t.out, k)
    enter(&own.dresidual, &t.dresidual, k)
    enter_table(&own.mean, &t.mean, k)
    enter_table(&own.var, &t.var, k)
    enter_table(&own.gamma, &t.gamma, k)
    enter_table(&own.beta, &t.beta, k)
    enter_table(&own.first, &t.first, k)
    enter_table(&own.second, &t.second, k)
    own.phase = k.c0
    own.starts = t.starts + k.g
    if t.mask != NULL:
        own.mask = t.mask + k.g * t.mask_g
        own.G = t.G - k.g   # weights end where they did
    if t.weights != NULL:
        own.weights = t.weights + k.g * t.weights_g
    if not t.inside:
        own.C = own.channels = k.c1 - k.c0


cdef Task groups_of(const Task* t) noexcept nogil:
    """The task, or a block, on planes of whole groups, as they are summed."""
    cdef Task groups = t[0]
    groups.C = groups.channels = t.channels // t.pool
    groups.N, groups.S, groups.x.c = 1 if t.inside else t.N, t.group_size, t.group_size
    groups.inside, groups.fold, groups.tail, groups.stretch = False, 1, 0, groups.C
    groups.count = t.count * t.pool
    groups.chunks, groups.rows = t.group_chunks, t.group_rows
    groups.pieces, groups.piece = t.group_pieces, t.group_piece
    groups.pitch, groups.planes_ahead = t.group_pitch, 0
    groups.pool = groups.first.pool = groups.second.pool = 1
    return groups


cdef void enter_groups(Task* groups, const Task* own) noexcept nogil:
    """Those of another block."""
    groups.x.data, groups.starts = own.x.data, own.starts
    groups.first.data, groups.second.data = own.first.data, own.second.data
    groups.C = groups.channels = groups.stretch = own.channels // own.pool


cdef inline void reduce_columns(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                                Py_ssize_t j) noexcept nogil:
    """Chunk j of a block, so many columns at a time as have their tables in L1."""
    while c0 < c1:
        reduce_chunk(t, g, c0, min(c0 + t.stretch, c1), j)
        c0 += t.stretch


cdef void reduce_block(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    cdef Py_ssize_t j
    set_shift(t, g, c0, c1)
    for j in range(t.chunks):
        reduce_columns(t, g, c0, c1, j)
        if t.kept < t.chunks:
            add_chunk(t, g, c0, c1, j)


cdef void run_blocks(Task* t, Py_ssize_t thread, Py_ssize_t team) noexcept nogil:
    """Each thread takes a block of channels at a time through the whole trip; the second walk may
    fetch the block that comes after it."""
    cdef Block k
    cdef Py_ssize_t blocks = count_blocks(t, t.block), later, ahead, j
    cdef Py_ssize_t end = blocks if t.shared else blocks * (thread + 1) // team
    cdef Py_ssize_t b = next_block(t, blocks * thread // team - 1, end)
    cdef Task own = thread_of(t, thread), groups
    cdef const Task* summed = &own
    if t.grouped:
        groups = groups_of(&own)
        summed = &groups
    while b < end:
        k = block(t, b, t.block)
        enter_block(&own, t, &k)
        if t.grouped:
            enter_groups(&groups, &own)
        reduce_block(summed, 0, 0, summed.C)
        finish(&own, summed, 0, 0, own.C)
        later = next_block(t, b, end)
        ahead = (later - b) * t.block if t.lookahead and later < end else 0
        if t.map != NO_MAP:
            for j in range(t.chunks - 1, -1, -1):
                map_chunk(&own, 0, 0, own.C, j, ahead)
        b = later


cdef void run_split(Task* t, Py_ssize_t thread, Py_ssize_t team) noexcept nogil:
    """All threads share the chunks of all channels: unit u is chunk u // blocks of block u % blocks.
    Each sums its own in the order in which memory has them and, from where it came to, writes back."""
    cdef Task groups = groups_of(t) if t.grouped else t[0]
    cdef Py_ssize_t blocks = count_blocks(&groups, t.block), units = blocks * groups.chunks, u, b
    cdef Py_ssize_t b0 = blocks * thread // team, b1 = blocks * (thread + 1) // team, u0, u1, i
    cdef Block k
    if t.reduce != NO_REDUCE:
        for b in range(b0, b1):
            k = block(&groups, b, t.block)
            set_shift(&groups, k.g, k.c0, k.c1)
        team_barrier()
        for u in range(units * thread // team, units * (thread + 1) // team):
            k = block(&groups, u % blocks, t.block)
            reduce_chunk(&groups, k.g, k.c0, k.c1, u // blocks)
        team_barrier()
    if t.pool > 1:
        for b in range(t.G * thread // team, t.G * (thread + 1) // team):
            finish(t, &groups, b, 0, t.C)
    else:
        for b in range(b0, b1):
            k = block(t, b, t.block)
            finish(t, t, k.g, k.c0, k.c1)
    if t.map == NO_MAP:
        return
    team_barrier()
    blocks = count_blocks(t, t.map_block)
    units = blocks * t.chunks
    u0, u1 = units * thread // team, units * (thread + 1) // team
    for i in range(u1 - u0):
        u = u0 + i if t.reduce == NO_REDUCE else u1 - 1 - i
        k = block(t, u % blocks, t.map_block)
        map_chunk(t, k.g, k.c0, k.c1, u // blocks, 0)


# ---- Rows, back: both ways at once ----

cdef inline void sum_row(int kind, const Task* t, Py_ssize_t c, Py_ssize_t j, double mean,
                         double rstd, double* column) noexcept nogil:
    """The sums of row c over chunk j, and of its columns."""
    cdef Chunk k = chunk(t, j)
    cdef Py_ssize_t s, size = k.s1 - k.s0, whole = size // 16 * 16
    cdef Py_ssize_t place = row_of_gamma(t, c) * t.places + k.s0
    cdef const double* gamma = t.gamma_wide + place
    cdef double* dy_xhat = column + place
    cdef double* dy = dy_xhat + t.period * t.places
    cdef double* sum = sums(t, 0, j) + c
    cdef wide first = wsplat(0), second = wsplat(0)
    cdef Summed p = summed_at(t, 0, 0, c, k.s0)
    p.x_ahead = p.dy_ahead = p.y_ahead = ahead_values()
    for s in range(0, whole, 16):
        fetch_summed(kind, &p, s)
        add_both_ways(p.dy + s, p.x + s, p.y + s, 16, mean, rstd, gamma + s,
                      &p.activation if kind & GATED else NULL, &first, &second, dy_xhat + s, dy + s)
    if whole < size:
        add_both_ways(p.dy + whole, p.x + whole, p.y + whole, size - whole, mean, rstd,
                      gamma + whole, &p.activation if kind & GATED else NULL, &first, &second,
                      dy_xhat + whole, dy + whole)
    sum[0], sum[t.pitch] = wsum(first), wsum(second)


cdef inline void sum_rows_of(int kind, const Task* t, double* column) noexcept nogil:
    """The sums of a block's rows, one after the other, and of its columns."""
    cdef Py_ssize_t c, j
    cdef double mean, rstd
    for c in range(t.C):
        mean = entry(&t.mean, 0, c, 0)
        rstd = inverse_root(entry(&t.var, 0, c, 1) + t.eps)
        for j in range(t.chunks):
            sum_row(kind, t, c, j, mean, rstd, column)


cdef void sum_both_ways(const Task* t, double* column) noexcept nogil:
    if t.kind & GATED:
        sum_rows_of(WITH_X | GATED, t, column)
    else:
        sum_rows_of(WITH_X, t, column)


cdef void add_up_columns(const Task* t, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """The pieces' sums, from one place to another, into those of the first piece."""
    cdef Py_ssize_t i, piece, size = 2 * t.period * t.places
    for piece in range(1, (t.C + t.deep - 1) // t.deep):
        for i in range(first, end):
            t.column_sums[i] += t.column_sums[piece * size + i]


cdef void run_rows(Task* t, Py_ssize_t thread, Py_ssize_t team) noexcept nogil:
    """The backward trip by column: each thread takes pieces of rows, and of these a block at a time
    through both passes."""
    cdef Py_ssize_t pieces = (t.C + t.deep - 1) // t.deep, size = 2 * t.period * t.places
    cdef Py_ssize_t piece, c, end, j
    cdef Task own = thread_of(t, thread)
    cdef Block k
    cdef double* sum
    for piece in range(pieces * thread // team, pieces * (thread + 1) // team):
        c, end = piece * t.deep, min((piece + 1) * t.deep, t.C)
        sum = t.column_sums + piece * size
        memset(sum, 0, size * sizeof(double))
        while c < end:
            k.g, k.c0, k.c1 = 0, c, min(c + t.block, end)
            enter_block(&own, t, &k)
            sum_both_ways(&own, sum)
            finish(&own, &own, 0, 0, own.C)
            for j in range(t.chunks - 1, -1, -1):
                map_chunk(&own, 0, 0, own.C, j, 0)
            c = k.c1
    team_barrier()
    add_up_columns(t, size * thread // team, size * (thread + 1) // team)


cdef void work(Task* t, int thread, int team) noexcept nogil:
    cdef fp_mode mode = usual_mode()
    if t.column_sums != NULL:
        run_rows(t, thread, team)
    elif t.split:
        run_split(t, thread, team)
    else:
        run_blocks(t, thread, team)
    if t.stream:
        stream_fence()
    restore_mode(mode)


cdef int kind_of(const Task* t) noexcept nogil:
    """What a map does beside (or, with x, instead of) an affine map of its source."""
    cdef int kind = WITH_X if t.map == INPUT_GRADIENT else 0
    if t.mask != NULL:
        kind |= SELECTED
    if t.period > 0:
        kind |= BY_COLUMN
    if t.y.data != NULL:
        return kind | GATED | (KEEPS if t.dresidual.data != NULL else 0)
    if t.residual.data != NULL:
        return kind | ACTIVE | RESIDUAL
    return kind | (ACTIVE if t.slope != 1 else 0)


cdef inline Operand either(const Operand* a, const Operand* b) noexcept nogil:
    return b[0] if a.data == NULL else a[0]


cdef void settle(Task* t) noexcept nogil:
    """What the loops go by. An operand that is not there, and not read, is where another is."""
    t.kind = kind_of(t)
    t.source = either(&t.dy, &t.x)
    t.x = either(&t.x, &t.dy)
    t.other = either(&t.y, &t.residual)
    t.other = either(&t.other, &t.source)
    t.dresidual = either(&t.dresidual, &t.out)


cdef long _calls = 0


cdef void run(Task* t) noexcept nogil:
    """Run the task on its team of threads."""
    fetch_add(&_calls, 1)
    settle(t)
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
