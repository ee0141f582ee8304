# Reduce: the two sums of each (chunk, channel), of moments or of gradients.
#
# 1. What is summed is taken as a constant, `kind`, so that no loop branches on it; a mask clears the
#    bits of what was loaded where it does not count.
# 2. Planes: the lanes of one channel go over its planes of the chunk, and are added up
#    once. Channels last: sixteen columns of a few rows at a time, whose sums stay in registers
#    meanwhile; of single rows they are added where they are.
# 3. Chunks are merged in order, with what roundings lose (Knuth's two-sum).

cdef struct Summed:
    # Where a sum is in x, dy and the y that gates it, and how far ahead it fetches.
    const element* x
    const element* dy
    const element* y
    Py_ssize_t x_row, dy_row, y_row
    Py_ssize_t x_ahead, dy_ahead, y_ahead
    bint fetch
    ActivationParams activation
    mask16 some      # of the next sixteen
    wide weight     # the same, for moments


cdef inline void fetch_summed(int kind, const Summed* p, Py_ssize_t s) noexcept nogil:
    prefetch(p.x + s + p.x_ahead, p.fetch)
    if kind & WITH_X:
        prefetch(p.dy + s + p.dy_ahead, p.fetch)
    if kind & ACTIVATION_GRAD:
        prefetch(p.y + s + p.y_ahead, p.fetch)


cdef inline void add(int kind, const Summed* p, Py_ssize_t s, Py_ssize_t n, wide shift, wide unit,
                     wide* first, wide* second) noexcept nogil:
    """Add n values to the moments or, with dy beside x, to the sums of gradients."""
    if kind & MASKED and kind & WITH_X:
        add_masked_gradients(p.dy + s, p.x + s, p.y + s, p.some, n, shift,
                             &p.activation if kind & ACTIVATION_GRAD else NULL, first, second)
    elif kind & MASKED:
        add_masked_moments(p.x + s, p.some, p.weight, n, shift, unit, first, second)
    elif not kind & WITH_X:
        add_moments(p.x + s, n, shift, unit, first, second)
    elif kind & ACTIVATION_GRAD:
        add_gradients(p.dy + s, p.x + s, p.y + s, n, shift, &p.activation, first, second)
    else:
        add_gradients(p.dy + s, p.x + s, p.x, n, shift, NULL, first, second)


cdef inline Summed summed_at(const Task* t, Py_ssize_t g, Py_ssize_t n, Py_ssize_t c,
                             Py_ssize_t s) noexcept nogil:
    cdef Summed p
    p.x, p.dy, p.y = at(&t.x, g, n, c) + s, at(&t.source, g, n, c) + s, at(&t.other, g, n, c) + s
    p.x_row, p.dy_row, p.y_row = t.x.n, t.source.n, t.other.n
    p.fetch, p.activation = t.fetch, activation_params(t.slope, t.top)
    return p


cdef inline void sum_planes(int kind, const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                            Py_ssize_t j) noexcept nogil:
    """Planes: the sums of channels [c0, c1) over chunk j."""
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
            if kind & MASKED:
                selected = selected_at(t, g, n, k.s0)
                p.weight = wsplat(selected.weighs.first[0])
            for s in range(0, whole, 16):
                fetch_summed(kind, &p, s)
                if kind & MASKED:
                    p.some = mask_load(selected.mask + s)
                add(kind, &p, s, 16, shifts, units, &first, &second)
            if whole < size:
                if kind & MASKED:
                    p.some = mask_load_before(selected.mask_end, selected.mask + whole)
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
        if kind & MASKED and marked != NULL:
            p.some, p.weight = marked.some[r], wsplat(marked.weight[r])
        elif kind & MASKED:
            p.some = mask_at(&selected)
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
    """Channels last: add a few rows to the sums of `width` columns from c0 on; meanwhile the
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
    if kind & MASKED:
        row = selected_at(t, g, n, 0)
        known = mark(t, row, rows, &marked)
    elif rows == 1:
        sum_one_row(kind, &p, width, shift + c0, unit + c0, sum + c0, second + c0)
        return
    for c in range(c0, whole, 16):
        if kind & MASKED and not known:
            selected = at_columns(t, &row, c)
        sum_columns(kind, p, selected, &marked if known else NULL, rows, 16, shift + c, unit + c,
                    sum + c, second + c)
        p.x += 16
        p.dy += 16
        p.y += 16
    if whole < end:
        if kind & MASKED and not known:
            selected = at_columns(t, &row, whole)
        sum_columns(kind, p, selected, &marked if known else NULL, rows, end - whole, shift + whole,
                    unit + whole, sum + whole, second + whole)


cdef inline void sum_chunk_rows(int kind, const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                                Py_ssize_t j) noexcept nogil:
    """Channels last: the sums of columns [c0, c1) over chunk j, a few whole rows at a time."""
    cdef Chunk k = chunk(t, j)
    cdef double* sum = sums(t, g, j)
    cdef Py_ssize_t n = k.n0, rows, padded = (c1 - c0 + 15) // 16 * 16
    cdef Py_ssize_t ahead = (ahead_values() // (t.reduce_rows * padded) + 1) * t.reduce_rows    # in whole steps
    memset(sum + c0, 0, padded * sizeof(double))
    memset(sum + t.pitch + c0, 0, padded * sizeof(double))
    while n < k.n1:
        rows = min(t.reduce_rows, k.n1 - n)
        sum_rows(kind, t, g, n, rows, c0, c1 - c0, sum, ahead)
        n += rows
    if k.n1 == t.N and c0 < t.rest_columns:
        sum_rows(kind, t, g, t.N, 1, c0, min(c1, t.rest_columns) - c0, sum, 0)


cdef inline void sum_chunk(int kind, const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                           Py_ssize_t j) noexcept nogil:
    if t.channels_last:
        sum_chunk_rows(kind, t, g, c0, c1, j)
    else:
        sum_planes(kind, t, g, c0, c1, j)


cdef void reduce_chunk(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                       Py_ssize_t j) noexcept nogil:
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


cdef inline void add_sums(wide p, wide* s, wide* lost) noexcept nogil:
    """s += p, and what rounding loses (Knuth's two-sum)."""
    cdef wide r = wadd(s[0], p), was = wsub(r, s[0])
    lost[0] = wadd(lost[0], wadd(wsub(s[0], wsub(r, was)), wsub(p, was)))
    s[0] = r


cdef void add_chunk(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                    Py_ssize_t j) noexcept nogil:
    """Chunk j's sums, where only they are kept, onto those of the chunks before."""
    cdef double* total = t.total + g * 2 * t.pitch
    cdef double* gone = t.compensation + g * 2 * t.pitch
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
    if t.total == t.partial:
        return      # one chunk, whose sums they are
    for row in range(2):
        for c in range(c0, c1, 16):
            count = min(16, c1 - c)
            if t.n_partials < t.chunks:
                s = wload_table_part(total + row * t.pitch + c, count)
                lost = wload_table_part(t.compensation + (g * 2 + row) * t.pitch + c, count)
            else:
                s = wload_table_part(sums(t, g, 0) + row * t.pitch + c, count)
                lost = wsplat(0)
                for j in range(1, t.chunks):
                    add_sums(wload_table_part(sums(t, g, j) + row * t.pitch + c, count), &s, &lost)
            store_wide(total + row * t.pitch + c, wadd(s, lost), count)
        for c in range(t.channels if t.fold > 1 else 0):
            for v in range(1, t.fold):
                total[row * t.pitch + c] += total[row * t.pitch + v * t.channels + c]
