# Reduce: the two sums of each (chunk, channel), of moments or of gradients.
#
# 1. What is summed is taken as a constant, `kind`, so that no loop branches on it; a mask clears
#    the bits of what was loaded where it does not count.
# 2. Planes: the lanes of one channel go over its planes of the chunk, and are added up once.
#    Channels last: sixteen columns of a few rows at a time, whose sums stay in registers meanwhile;
#    of single rows they are added where they are.
# 3. Chunks are merged in order, with the errors of rounding (Knuth's two-sum).

cdef struct Summed:
    # Where a sum is in x, dy and the activation's y, and how far ahead it fetches.
    Sources at
    Py_ssize_t x_row, dy_row, y_row
    Py_ssize_t x_ahead, dy_ahead, y_ahead
    bint fetch
    ActivationParams act
    mask16 mask     # of the next sixteen
    wide weight     # the same, for moments


cdef struct ColumnTables:
    # Of some columns, from the first one on: what is subtracted, its unit, and the two sums.
    const double* shift
    const double* unit
    double* first
    double* second


cdef inline Sources advance_sources(Sources p, Py_ssize_t x, Py_ssize_t dy,
                                    Py_ssize_t y) noexcept nogil:
    p.x, p.dy, p.y = p.x + x, p.dy + dy, p.y + y
    return p


cdef inline ColumnTables tables_at(const Task* t, Py_ssize_t g, double* sum,
                                   Py_ssize_t c) noexcept nogil:
    cdef ColumnTables k
    k.shift, k.unit = t.shift + g * t.pitch + c, t.unit + g * t.pitch + c
    k.first, k.second = sum + c, sum + t.pitch + c
    return k


cdef inline ColumnTables next_columns(ColumnTables k, Py_ssize_t n) noexcept nogil:
    k.shift, k.unit, k.first, k.second = k.shift + n, k.unit + n, k.first + n, k.second + n
    return k


cdef inline void fetch_summed(int kind, const Summed* p, Py_ssize_t s) noexcept nogil:
    prefetch(p.at.x + s + p.x_ahead, p.fetch)
    if kind & WITH_X:
        prefetch(p.at.dy + s + p.dy_ahead, p.fetch)
    if kind & ACTIVATION_GRAD:
        prefetch(p.at.y + s + p.y_ahead, p.fetch)


cdef inline void add(int kind, const Summed* p, Py_ssize_t s, Py_ssize_t n, wide shift, wide unit,
                     SumPair sums) noexcept nogil:
    """Add n values to the moments or, with dy beside x, to the sums of gradients."""
    cdef Sources here = advance_sources(p.at, s, s, s)
    cdef const ActivationParams* act = &p.act if kind & ACTIVATION_GRAD else NULL
    if kind & MASKED and kind & WITH_X:
        add_masked_gradients(here, p.mask, n, shift, act, sums)
    elif kind & MASKED:
        add_masked_moments(here, p.mask, p.weight, n, shift, unit, sums)
    elif kind & WITH_X:
        add_gradients(here, n, shift, act, sums)
    else:
        add_moments(here, n, shift, unit, sums)


cdef inline Summed summed_at(const Task* t, Py_ssize_t g, Py_ssize_t n, Py_ssize_t c,
                             Py_ssize_t s) noexcept nogil:
    """At value s of channel c of sample n of run g."""
    cdef Summed p
    p.at.x, p.at.dy = at(&t.x, g, n, c) + s, at(&t.source, g, n, c) + s
    p.at.y = at(&t.other, g, n, c) + s
    p.x_row, p.dy_row, p.y_row = t.x.n, t.source.n, t.other.n
    p.fetch, p.act = t.fetch, activation_params(t.slope, t.top)
    return p


cdef inline void sum_planes(int kind, const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                            Py_ssize_t j) noexcept nogil:
    """Planes: the sums of channels [c0, c1) over chunk j."""
    cdef Chunk k = chunk(t, j)
    cdef Py_ssize_t c, n, s, size = k.s1 - k.s0, whole = size // 16 * 16
    cdef const double* shift = t.shift + g * t.pitch
    cdef const double* unit = t.unit + g * t.pitch
    cdef double* sum = chunk_sums(t, g, j)
    cdef wide shifts, units, first, second
    cdef SumPair both = SumPair(&first, &second)
    cdef Summed p
    cdef Selection selection
    for c in range(c0, c1):
        shifts, units = wsplat(shift[c]), wsplat(unit[c])
        first, second = wsplat(0), wsplat(0)
        for n in range(k.n0, k.n1):
            p = summed_at(t, g, n, c, k.s0)
            p.x_ahead, p.dy_ahead = later(t, &t.x, n), later(t, &t.source, n)
            p.y_ahead = later(t, &t.other, n)
            if kind & MASKED:
                selection = selection_at(t, g, n, k.s0)
                p.weight = wsplat(selection.weighs.first[0])
            for s in range(0, whole, 16):
                fetch_summed(kind, &p, s)
                if kind & MASKED:
                    p.mask = mask_load(selection.mask + s)
                add(kind, &p, s, 16, shifts, units, both)
            if whole < size:
                if kind & MASKED:
                    p.mask = mask_load_before(selection.mask_end, selection.mask + whole)
                add(kind, &p, whole, size - whole, shifts, units, both)
        sum[c], sum[t.pitch + c] = wsum(first), wsum(second)


cdef inline void sum_columns(int kind, Summed p, Selection selection, const RowMasks* masks,
                             Py_ssize_t rows, Py_ssize_t width, ColumnTables k) noexcept nogil:
    """Up to 16 columns of a few rows."""
    cdef wide shift = wload_table(k.shift), unit = wload_table(k.unit)
    cdef wide first = wload_table(k.first), second = wload_table(k.second)
    cdef SumPair both = SumPair(&first, &second)
    cdef Py_ssize_t r = 0
    p.weight = wsplat(1)
    # There is a row: were there none, the sums would have to be kept in memory as they were.
    while True:
        fetch_summed(kind, &p, 0)
        if kind & MASKED and masks != NULL:
            p.mask, p.weight = masks.mask[r], wsplat(masks.weight[r])
        elif kind & MASKED:
            p.mask = mask_at(&selection)
            if not kind & WITH_X and selection.weighed:
                p.weight = weights_by(&selection.weighs, selection.numbers)
            pass_samples(&selection, selection.samples)
        add(kind, &p, 0, width, shift, unit, both)
        r += 1
        if r == rows:
            break
        p.at = advance_sources(p.at, p.x_row, p.dy_row, p.y_row)
    wstore_table(k.first, first)
    wstore_table(k.second, second)


cdef inline void sum_one_row(int kind, const Summed* p, Py_ssize_t width,
                             ColumnTables k) noexcept nogil:
    """Of a single row, sums are added where they are: each is needed once."""
    cdef Py_ssize_t s, whole = width // 16 * 16
    for s in range(0, whole, 16):
        fetch_summed(kind, p, s)
        add(kind, p, s, 16, wload_table(k.shift), wload_table(k.unit),
            SumPair(<wide*> k.first, <wide*> k.second))
        k = next_columns(k, 16)
    if whole < width:
        add(kind, p, whole, width - whole, wload_table(k.shift), wload_table(k.unit),
            SumPair(<wide*> k.first, <wide*> k.second))


cdef inline void sum_rows(int kind, const Task* t, Py_ssize_t g, const Strip* strip, double* sum,
                          Py_ssize_t ahead) noexcept nogil:
    """Channels last: add a strip of a few rows to the sums; meanwhile the rows `ahead` are
    fetched."""
    cdef Summed p = summed_at(t, g, strip.n0, strip.left, 0)
    cdef ColumnTables k = tables_at(t, g, sum, strip.left)
    cdef Selection row, selection
    cdef RowMasks masks
    cdef bint by_row = False
    cdef Py_ssize_t c, end = strip.left + strip.width, whole = end - strip.width % 16
    cdef Py_ssize_t rows = strip.n1 - strip.n0
    p.x_ahead, p.dy_ahead, p.y_ahead = ahead * p.x_row, ahead * p.dy_row, ahead * p.y_row
    if kind & MASKED:
        row = selection_at(t, g, strip.n0, 0)
        by_row = masks_of_rows(t, row, rows, &masks)
    elif rows == 1:
        sum_one_row(kind, &p, strip.width, k)
        return
    for c in range(strip.left, whole, 16):
        if kind & MASKED and not by_row:
            selection = at_columns(t, &row, c)
        sum_columns(kind, p, selection, &masks if by_row else NULL, rows, 16, k)
        p.at, k = advance_sources(p.at, 16, 16, 16), next_columns(k, 16)
    if whole < end:
        if kind & MASKED and not by_row:
            selection = at_columns(t, &row, whole)
        sum_columns(kind, p, selection, &masks if by_row else NULL, rows, end - whole, k)


cdef inline void sum_chunk_rows(int kind, const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                                Py_ssize_t j) noexcept nogil:
    """Channels last: the sums of columns [c0, c1) over chunk j, a few whole rows at a time."""
    cdef Chunk k = chunk(t, j)
    cdef double* sum = chunk_sums(t, g, j)
    cdef Py_ssize_t padded = (c1 - c0 + 15) // 16 * 16
    cdef Strip strip = Strip(k.n0, k.n0, c0, c1 - c0)
    # In whole steps.
    cdef Py_ssize_t ahead = (ahead_values() // (t.reduce_rows * padded) + 1) * t.reduce_rows
    memset(sum + c0, 0, padded * sizeof(double))
    memset(sum + t.pitch + c0, 0, padded * sizeof(double))
    while strip.n0 < k.n1:
        strip.n1 = min(strip.n0 + t.reduce_rows, k.n1)
        sum_rows(kind, t, g, &strip, sum, ahead)
        strip.n0 = strip.n1
    if k.n1 == t.N and c0 < t.rest_columns:
        strip = Strip(t.N, t.N + 1, c0, min(c1, t.rest_columns) - c0)
        sum_rows(kind, t, g, &strip, sum, 0)


cdef inline void sum_chunk(int kind, const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                           Py_ssize_t j) noexcept nogil:
    """The sums of channels [c0, c1) over chunk j, of a kind that is a constant."""
    if t.channels_last:
        sum_chunk_rows(kind, t, g, c0, c1, j)
    else:
        sum_planes(kind, t, g, c0, c1, j)


cdef void reduce_chunk(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                       Py_ssize_t j) noexcept nogil:
    """The same, of the kinds that are compiled."""
    if t.mask != NULL and t.reduce == MOMENTS:
        sum_chunk(MASKED, t, g, c0, c1, j)
    elif t.mask != NULL and t.kind & ACTIVATION_GRAD:
        sum_chunk(WITH_X | ACTIVATION_GRAD | MASKED, t, g, c0, c1, j)
    elif t.mask != NULL:
        sum_chunk(WITH_X | MASKED, t, g, c0, c1, j)
    elif t.reduce == MOMENTS:
        sum_chunk(0, t, g, c0, c1, j)
    elif t.kind & ACTIVATION_GRAD:
        sum_chunk(WITH_X | ACTIVATION_GRAD, t, g, c0, c1, j)
    else:
        sum_chunk(WITH_X, t, g, c0, c1, j)


cdef inline void store_wide(double* row, wide values, Py_ssize_t count) noexcept nogil:
    """No more than the block's own channels: the next ones are another thread's."""
    cdef double[16] lanes
    if count == 16:
        wstore_table(row, values)
    else:
        wstore_table(lanes, values)
        memcpy(row, lanes, count * sizeof(double))


cdef inline void add_sums(wide p, wide* s, wide* error) noexcept nogil:
    """s += p, and what rounding loses (Knuth's two-sum)."""
    cdef wide r = wadd(s[0], p), was = wsub(r, s[0])
    error[0] = wadd(error[0], wadd(wsub(s[0], wsub(r, was)), wsub(p, was)))
    s[0] = r


cdef void add_chunk(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                    Py_ssize_t j) noexcept nogil:
    """Add chunk j's sums to `total`, before the next chunk overwrites them."""
    cdef double* total = t.total + g * 2 * t.pitch
    cdef double* errors = t.compensation + g * 2 * t.pitch
    cdef Py_ssize_t row, c, count
    cdef wide s, error, p
    for row in range(2):
        for c in range(c0, c1, 16):
            count = min(16, c1 - c)
            p = wload_table_part(chunk_sums(t, g, 0) + row * t.pitch + c, count)
            s, error = p, wsplat(0)
            if j > 0:
                s = wload_table_part(total + row * t.pitch + c, count)
                error = wload_table_part(errors + row * t.pitch + c, count)
                add_sums(p, &s, &error)
            store_wide(total + row * t.pitch + c, s, count)
            store_wide(errors + row * t.pitch + c, error, count)


cdef void merge(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Add the chunks' sums up in order."""
    cdef double* total = t.total + g * 2 * t.pitch
    cdef Py_ssize_t row, c, j, v, count
    cdef wide s, error, p
    if t.total == t.partial:
        return      # one chunk, whose sums they are
    for row in range(2):
        for c in range(c0, c1, 16):
            count = min(16, c1 - c)
            if t.n_partials < t.chunks:
                s = wload_table_part(total + row * t.pitch + c, count)
                error = wload_table_part(t.compensation + (g * 2 + row) * t.pitch + c, count)
            else:
                s = wload_table_part(chunk_sums(t, g, 0) + row * t.pitch + c, count)
                error = wsplat(0)
                for j in range(1, t.chunks):
                    p = wload_table_part(chunk_sums(t, g, j) + row * t.pitch + c, count)
                    add_sums(p, &s, &error)
            store_wide(total + row * t.pitch + c, wadd(s, error), count)
        # Folded rows: a channel has sums for each of the `fold` samples of a row.
        for c in range(t.channels if t.fold > 1 else 0):
            for v in range(1, t.fold):
                total[row * t.pitch + c] += total[row * t.pitch + v * t.channels + c]
