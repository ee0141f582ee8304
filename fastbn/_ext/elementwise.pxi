# Elementwise: y, or dx, of the coefficients that finalize has packed.
#
# 1. Work is done in the element type, of half types in float32. The mean is a pair, mean = hi + lo:
#    x - hi is exact near the mean, and lo goes into the last constant, so that
#    y = (x - hi) * scale + (beta - lo * scale) keeps what one multiply-add of x would lose.
# 2. What precedes or follows normalization in a network is fused: a residual and an activation on
#    the way out, on the way back the activation's slope where it gave y. A mask clears the bits of
#    what was loaded and of what is stored, so that nothing that stands there gets anywhere.
# 3. A loop takes what it does beside the affine map as `kind`. The usual kinds are constants, and
#    each is compiled to loops without a branch in them; a residual, a stored dresidual and what is
#    fused under a mask are looked at in passing. Scales that take powers of two, which are rare,
#    have one function for y and one for dx, GENERAL, which look at all for every sixteen values.
# 4. Planes: planes of one channel each. Those that follow each other in memory are
#    streamed as one run, and a `Line` holds what does not yet fill a line of the cache.
# 5. Channels last: sixteen columns of a few rows, so that their coefficients are loaded once.
#    Streaming wants whole lines: where lines begin at the same column in every row, rows are taken
#    from that column on, each with the beginning of the next.

cdef struct Work:
    # Chunk j of channels [c0, c1) of run g, while that of the channels `ahead` is fetched.
    Py_ssize_t g, c0, c1, j, ahead


cdef inline Py_ssize_t unaligned(const element* p, Py_ssize_t n) noexcept nogil:
    """How many of the n elements from p on lie before the first place where streaming may begin."""
    return min((-(<uintptr_t> p) & (BOUND - 1)) // sizeof(element), <size_t> n)


cdef struct Line:
    # Planes that follow each other are streamed in whole blocks of sixteen. The block being filled:
    # its first `skipped` places lie before the first plane, `filled` counts all that are taken.
    # There is room for 32, as sixteen may be stored from any place.
    element[32] values
    Py_ssize_t skipped, filled


cdef inline void begin_stream(Line* line, const element* out) noexcept nogil:
    line.skipped = -unaligned(out, 16) & 15
    line.filled = line.skipped


cdef void end_stream(Line* line, element* end) noexcept nogil:
    cdef Py_ssize_t own = line.filled - line.skipped
    if own > 0:
        vstore_part(end - own, vload(line.values + line.skipped), own)


cdef inline void fill_line(Line* line, element* out, vec y, Py_ssize_t n) noexcept nogil:
    """The next n values of the run, no more than the line takes; they belong at `out`."""
    vstore(line.values + line.filled, y)
    line.filled += n
    out += n
    if line.filled < 16:
        return
    if line.skipped > 0:
        end_stream(line, out)
    else:
        vstream(out - 16, vload(line.values))
    line.skipped = line.filled = 0


cdef struct Place:
    # Where a map is in its operands, and how far ahead it fetches. `source` is x or, on the way
    # back, dy; `other` the residual or, on the way back, the activation's y. Copies of what the
    # task has: that would be read again after every store.
    const element* source
    const element* x
    const element* other
    element* out
    element* dresidual
    Py_ssize_t source_row, x_row, other_row, out_row, dresidual_row
    Py_ssize_t source_ahead, x_ahead, other_ahead
    bint fetch, stream_dresidual
    ActivationParams act
    const real* columns         # gamma and, `after` it, beta, where they go by column
    Py_ssize_t after
    lanes mask      # which of the next sixteen values count
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
    p.act = activation_params(t.slope, t.top)
    return p


cdef inline void advance(Place* p, Py_ssize_t n) noexcept nogil:
    """On by n values of a row."""
    p.source += n
    p.x += n
    p.other += n
    p.out += n
    p.dresidual += n


cdef inline void next_row(Place* p) noexcept nogil:
    p.source += p.source_row
    p.x += p.x_row
    p.other += p.other_row
    p.out += p.out_row
    p.dresidual += p.dresidual_row


cdef inline void fetch_place(int kind, const Place* p, Py_ssize_t s) noexcept nogil:
    prefetch(p.source + s + p.source_ahead, p.fetch)
    if kind & WITH_X:
        prefetch(p.x + s + p.x_ahead, p.fetch)
    if kind & (RESIDUAL | ACTIVATION_GRAD):
        prefetch(p.other + s + p.other_ahead, p.fetch)


# ---- Sixteen values ----

cdef inline int rows_read(int kind) noexcept nogil:
    """How many rows of coefficients a loop reads."""
    if kind & GENERAL:
        return PACKED if kind & WITH_X else Y_X_SCALE + 1
    return DX_ROWS if kind & WITH_X else Y_ROWS


cdef inline vec gradient_of(int kind, const Place* p, vec dy, vec x, const vec* k) noexcept nogil:
    if kind & GENERAL:
        dy, x = vmul(dy, k[DX_DY_SCALE]), vmul(x, k[DX_X_SCALE])
    if kind & MASKED:
        return vand(gradient_weighed(dy, x, p.weight, k), p.mask)
    return gradient(dy, x, k)


cdef inline vec load_values(int kind, const element* p, Py_ssize_t n) noexcept nogil:
    return vload_any(p, n) if kind & GENERAL else vload_some(p, n)


cdef inline void store_values(int kind, element* p, vec v, Py_ssize_t n) noexcept nogil:
    if kind & GENERAL:
        vstore_any(p, v, n)
    else:
        vstore_some(p, v, n)


cdef inline vec result(int kind, const Place* p, Py_ssize_t s, Py_ssize_t n,
                       const vec* k) noexcept nogil:
    """n values of y, or of dx; the residual's gradient is stored on the way."""
    cdef vec v = load_values(kind, p.source + s, n)
    cdef vec[2] column
    if kind & BY_COLUMN:
        vload_each(column, p.columns + s, p.after, 1 if kind & WITH_X else 2)
    if kind & MASKED:
        v = vand(v, p.mask)
    if kind & ACTIVATION_GRAD:
        v = activation_grad(v, load_values(kind, p.other + s, n), &p.act)
    if kind & DRESIDUAL and n == 16 and p.stream_dresidual:
        vstream(p.dresidual + s, v)
    elif kind & DRESIDUAL:
        store_values(kind, p.dresidual + s, v, n)
    if kind & BY_COLUMN and kind & WITH_X:
        v = vmul(v, column[0])
    if kind & WITH_X:
        v = gradient_of(kind, p, v, load_values(kind, p.x + s, n), k)
        return vadd(v, load_values(kind, p.other + s, n)) if kind & RESIDUAL else v
    if kind & GENERAL:
        v = vmul(v, k[Y_X_SCALE])
    v = affine(v, k)
    if kind & BY_COLUMN:
        v = vadd(vmul(v, column[0]), column[1])
    if kind & RESIDUAL:
        v = vadd(v, load_values(kind, p.other + s, n))
    if kind & ACTIVATION:
        v = activate(v, &p.act)
    if kind & MASKED:
        v = vand(v, p.mask)
    return v


# ---- Planes ----

cdef inline void map_plane(int kind, const Task* t, Place* p, const Selection* selection,
                           Py_ssize_t size, const real* row, Line* line) noexcept nogil:
    """Contiguous values of one channel, whose coefficients stand `pitch` apart."""
    cdef bint stream = t.stream
    cdef vec[PACKED] k
    cdef vec v
    cdef Py_ssize_t s = 0, n = min(16 - line.filled if stream else 16, size)
    vsplat_each(k, row, t.pitch, rows_read(kind))
    # Head (up to where streaming may begin), whole vectors, tail: head and tail share one copy of
    # `result`, which is much code. GENERAL has only that copy.
    while n > 0:
        if kind & GENERAL or n < 16:
            if kind & MASKED:
                p.mask = lanes_of(mask_load_before(selection.mask_end, selection.mask + s))
            v = result(kind, p, s, n, k)
            if not stream:
                store_values(kind, p.out + s, v, n)
            elif n < 16:
                fill_line(line, p.out + s, v, n)
            else:
                vstream(p.out + s, v)
            s += n
        while not kind & GENERAL and s + 16 <= size:
            fetch_place(kind, p, s)
            if kind & MASKED:
                p.mask = lanes_of(mask_load(selection.mask + s))
            v = result(kind, p, s, 16, k)
            if stream:
                vstream(p.out + s, v)
            else:
                vstore(p.out + s, v)
            s += 16
        n = min(16, size - s)


cdef inline void next_plane(const Task* t, Place* p) noexcept nogil:
    p.source += t.source.c
    p.x += t.x.c
    p.other += t.other.c
    p.out += t.out.c
    p.dresidual += t.dresidual.c


cdef inline void map_planes(int kind, const Task* t, const Work* w) noexcept nogil:
    cdef Chunk k = chunk(t, w.j)
    cdef Py_ssize_t n, c, size = k.s1 - k.s0
    cdef Line line
    cdef Place p
    cdef Selection selection
    for n in range(k.n0, k.n1):
        if kind & MASKED:
            selection = selection_at(t, w.g, n, k.s0)
        p = place(t, w.g, n, w.c0, k.s0)
        if kind & MASKED:
            p.weight = vsplat(<real> selection.weighs.first[0])
        p.source_ahead, p.x_ahead = w.ahead * t.source.c, w.ahead * t.x.c
        p.other_ahead = w.ahead * t.other.c
        p.after = t.period * t.places
        for c in range(w.c0, w.c1):
            if kind & BY_COLUMN:
                p.columns = <const real*> t.columns + row_of_gamma(t, c) * t.places + k.s0
            if t.stream and (c == w.c0 or not t.joined):
                begin_stream(&line, p.out)
            map_plane(kind, t, &p, &selection, size, packed(t, w.g) + c, &line)
            if t.stream and (c + 1 == w.c1 or not t.joined):
                end_stream(&line, p.out + size)
            next_plane(t, &p)


# ---- Channels last ----

cdef struct Columns:
    # Up to sixteen columns of a few rows: where their coefficients begin, in rows `pitch` apart,
    # and what is selection of the first row.
    Py_ssize_t first, rows
    const real* coefficients
    Py_ssize_t pitch
    const Selection* selection


cdef inline void mask_row(const Selection* row, Place* p) noexcept nogil:
    """The mask and weight of a row that is one sample, for map_one_sample; map_columns looks up its
    own."""
    p.mask = lanes_of(mask_broadcast(row.mask))
    p.weight = vsplat(<real> row.weighs.first[0])


cdef inline void mask_columns(int kind, const Selection* here, Place* p) noexcept nogil:
    """The same of sixteen columns, each of its sample."""
    p.mask = lanes_of(mask_at(here))
    if kind & WITH_X:
        p.weight = vweights_by(&here.weighs, here.numbers)


cdef inline void map_columns(int kind, const Task* t, Place p, const Columns* columns,
                             Py_ssize_t width, bint stream) noexcept nogil:
    cdef vec[PACKED] k
    cdef vec v
    cdef Py_ssize_t r
    cdef Selection here
    if kind & MASKED:
        here = at_columns(t, columns.selection, columns.first)
    vload_each(k, columns.coefficients, columns.pitch, rows_read(kind))
    for r in range(columns.rows):
        fetch_place(kind, &p, 0)
        if kind & MASKED:
            mask_columns(kind, &here, &p)
            pass_samples(&here, t.fold)
        v = result(kind, &p, 0, width, k)
        if stream:
            vstream(p.out, v)
        else:
            store_values(kind, p.out, v, width)
        next_row(&p)


cdef inline Py_ssize_t map_one_sample(int kind, Place* p, const real* row, Py_ssize_t pitch,
                                      Py_ssize_t width, bint stream) noexcept nogil:
    """Whole vectors of a row that is one sample: what is selection of it is known. How many columns
    that were."""
    cdef vec[PACKED] k
    cdef vec v
    cdef Py_ssize_t s, whole = width // 16 * 16
    for s in range(0, whole, 16):
        vload_each(k, row + s, pitch, rows_read(kind))
        fetch_place(kind, p, s)
        v = result(kind, p, s, 16, k)
        if stream:
            vstream(p.out + s, v)
        else:
            vstore(p.out + s, v)
    return whole


cdef inline void pass_columns(Place* p, Columns* columns, Py_ssize_t n) noexcept nogil:
    advance(p, n)
    columns.first += n
    columns.coefficients += n


cdef inline void map_across(int kind, const Task* t, Py_ssize_t g, const Strip* strip, Place p,
                            Columns columns) noexcept nogil:
    """A few rows of a strip, sixteen columns after the other."""
    cdef Py_ssize_t s = 0, n = unaligned(p.out, strip.width) if t.stream else 0
    columns.coefficients = packed(t, g) + strip.left
    columns.first = strip.left
    while s < strip.width:
        if n == 0:
            n = min(16, strip.width - s)
        if kind & GENERAL or n < 16:
            map_columns(kind, t, p, &columns, n, t.stream and n == 16)
            pass_columns(&p, &columns, n)
            s += n
        if kind & MASKED and not kind & GENERAL and t.fold == 1 and columns.rows == 1:
            n = map_one_sample(kind, &p, columns.coefficients, t.pitch,
                               min(strip.width - s, t.C - columns.first), t.stream)
            pass_columns(&p, &columns, n)
            s += n
        while not kind & GENERAL and s + 16 <= strip.width:
            map_columns(kind, t, p, &columns, 16, t.stream)
            pass_columns(&p, &columns, 16)
            s += 16
        n = 0


cdef inline void map_some_rows(int kind, const Task* t, Py_ssize_t g, const Strip* strip,
                         Py_ssize_t rows) noexcept nogil:
    """The first few rows of a strip: together or, of wide rows that are masked, one by one, for
    then they are one stream."""
    cdef Place p = place(t, g, strip.n0, strip.left, 0)
    cdef Selection selection
    cdef Columns columns
    cdef Py_ssize_t r = 0
    p.source_ahead = p.x_ahead = p.other_ahead = 2 * ahead_values()
    columns.rows, columns.pitch, columns.selection = rows, t.pitch, &selection
    if kind & MASKED:
        selection = selection_at(t, g, strip.n0, 0)
        columns.rows = 1 if t.C >= WIDE else rows
    while r < rows:
        if kind & MASKED:
            mask_row(&selection, &p)
        map_across(kind, t, g, strip, p, columns)
        r += columns.rows
        if kind & MASKED and r < rows:
            next_row(&p)
            pass_samples(&selection, t.fold)


cdef inline bint is_dense(const Task* t) noexcept nogil:
    """Whether rows follow each other in memory without a gap, in every array."""
    return (t.out.n == t.C and t.source.n == t.C and t.x.n == t.C and t.other.n == t.C
            and t.dresidual.n == t.C)


cdef int cut_rows(const Task* t, const Work* w, Strip* strips) noexcept nogil:
    """A chunk of columns in strips: the rows and, where these are taken from another column on,
    what is left before the first and of the last; and the samples that fill no row."""
    cdef Chunk k = chunk(t, w.j)
    cdef int count = 0
    cdef Py_ssize_t c
    if is_shifted(t) and w.c1 - w.c0 == t.C and k.n1 > k.n0:
        c = unaligned(at(&t.out, w.g, k.n0, 0), t.C)
        strips[0] = Strip(k.n0, k.n0 + 1, 0, c)
        strips[1] = Strip(k.n0, k.n1 - 1, c, t.C)
        strips[2] = Strip(k.n1 - 1, k.n1, c, t.C - c)
        count = 3
    else:
        strips[0] = Strip(k.n0, k.n1, w.c0, w.c1 - w.c0)
        count = 1
    if k.n1 == t.N and w.c0 < t.rest_columns:
        strips[count] = Strip(t.N, t.N + 1, w.c0, min(w.c1, t.rest_columns) - w.c0)
        count += 1
    return count


cdef inline bint has_whole_lines(const Task* t) noexcept nogil:
    """Whether lines begin at the same column in every row."""
    return t.out.n * <Py_ssize_t> sizeof(element) % BOUND == 0


cdef inline bint is_shifted(const Task* t) noexcept nogil:
    return t.stream and has_whole_lines(t) and is_dense(t)


cdef inline void map_rows(int kind, const Task* t, const Work* w) noexcept nogil:
    cdef Strip[4] strips
    cdef Strip strip
    # Rows whose lines begin at different columns are streamed one by one.
    cdef bint apart = t.stream and not has_whole_lines(t)
    cdef Py_ssize_t most = 1 if apart else t.map_rows, rows
    cdef int i, count = cut_rows(t, w, strips)
    for i in range(count):
        strip = strips[i]
        while strip.n0 < strip.n1 and strip.width > 0:
            rows = min(most, strip.n1 - strip.n0)
            map_some_rows(kind, t, w.g, &strip, rows)
            strip.n0 += rows


cdef inline void map_chunk_of(int kind, const Task* t, const Work* w) noexcept nogil:
    """y, or dx, of a chunk, of a kind that is a constant."""
    if t.channels_last:
        map_rows(kind, t, w)
    else:
        map_planes(kind, t, w)
