# Schedule: how a call is cut and ordered, by its shape and by the thresholds of this machine.
#
# 1. `set_chunks` cuts the samples into chunks. It sees shape and element type alone, for it decides
#    roundings.
# 2. `schedule` decides what no bit depends on: blocks, streaming stores, threads. Its thresholds
#    are `tuning`, which experiments may change by `tune`.

cdef enum:
    LINE = 64
    LANES = 16
    FOLD_BELOW = 64         # columns; narrower rows are folded, several samples to a row,
    FOLD_FROM = 65536       # and rows that are no whole vectors, from so many values of a run on
    CHUNK = 16384           # values of a channel in a chunk: the lanes' sums stay short
    FEWEST_ROWS = 64        # samples in a chunk, channels last
    MOST_ROWS = 1024        # twice that of half types: sums take up 0.4 % of what is summed
    SUM_TILE = 1 << 16      # bytes of x + skip that wait to be normalized; with the rest in L2
    MANY_CHANNELS = 1024    # a run this wide gains nothing from being joined (join_runs)


# The thresholds that have these names in `fastbn.backends.tuning`.
cdef struct Tuning:
    Py_ssize_t l2, fused_block, lookahead, serial_below
    Py_ssize_t stream_planes, stream_rows, stream_maps
    Py_ssize_t column_tile, column_tile_streaming, prefetch_from, scratch


cdef Tuning tuning
tuning = {name: getattr(sizes, name.upper()) for name in dict(tuning)}
cdef Py_ssize_t most_folded = sizes.MOST_FOLDED


def tune(**thresholds):
    """Override thresholds by name and return all that are in force; for experiments alone."""
    global tuning
    in_force = dict(tuning)
    in_force.update(thresholds)
    if len(in_force) != len(dict(tuning)):
        raise ValueError(f"thresholds are {sorted(dict(tuning))}, got {sorted(thresholds)}")
    tuning = in_force
    return in_force


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef void set_shape(Task* t, Py_ssize_t G, Py_ssize_t N, Py_ssize_t C, Py_ssize_t S,
                    bint channels_last) noexcept nogil:
    """The shape, with narrow rows folded: k samples of C channels as one row of k*C columns."""
    cdef Py_ssize_t k = 1
    t.G, t.N, t.C, t.S, t.channels, t.fold, t.rest_columns = G, N, C, S, C, 1, 0
    t.channels_last, t.count = channels_last, <double> N * S
    if channels_last and (C < FOLD_BELOW or C % 16 != 0 and N * C >= FOLD_FROM):
        while k * C % 16 != 0:
            k *= 2
        if k <= N and k * C <= most_folded:
            t.fold, t.C, t.N, t.rest_columns = k, k * C, N // k, N % k * C
    t.pool = 1
    set_pitch(t)


cdef bint is_channels_last(Py_ssize_t N, Py_ssize_t S, Py_ssize_t pool) noexcept nogil:
    """Whether these are rows of channels: of one sample, groups of them are planes."""
    return S == 1 and (N > 1 or pool == 1)


cdef void set_pitch(Task* t) noexcept nogil:
    t.pitch = pitch_of(t.C)


cdef void set_groups(Task* t) noexcept nogil:
    """Group norm's moments: where a group's channels are one stretch of memory (planes, or all
    channels of a sample) they are summed as one plane, in chunks of its own."""
    cdef Task groups = t[0]
    t.group_chunks = 0
    t.grouped = t.pool > 1 and t.reduce == MOMENTS and t.mask == NULL and (
        not t.channels_last or t.pool == t.channels)
    if t.grouped:
        t.group_size = t.N * t.C + t.rest_columns if t.channels_last else t.S * t.pool
        groups.S, groups.N = t.group_size, 1 if t.channels_last else t.N
        groups.channels_last = False
        set_chunks(&groups)
        t.group_chunks, t.group_rows = groups.chunks, groups.rows
        t.group_pieces, t.group_piece = groups.pieces, groups.piece


cdef void set_chunks(Task* t) noexcept nogil:
    t.pieces, t.piece = 1, t.S
    if t.channels_last:
        t.rows = max(ceil_div(ceil_div(t.N, 32), 8) * 8, FEWEST_ROWS)
        t.rows = min(t.rows, MOST_ROWS * (2 if t.itemsize == 2 else 1))
        t.chunks = max(1, ceil_div(t.N, t.rows))
    elif t.S > CHUNK:
        t.rows = 1
        t.piece = ceil_div(ceil_div(t.S, ceil_div(t.S, CHUNK)), 64) * 64
        t.pieces = ceil_div(t.S, t.piece)
        t.chunks = t.N * t.pieces
    else:
        t.rows = max(1, CHUNK // t.S)
        t.chunks = ceil_div(t.N, t.rows)


cdef Py_ssize_t bytes_of(Task* t) noexcept nogil:
    """What an array of the task takes up."""
    return t.G * (t.N * t.C + t.rest_columns) * t.S * t.itemsize


cdef int count_inputs(Task* t) noexcept nogil:
    # y is dy itself where dresidual is wanted without an activation (keep_dresidual): count it
    # once.
    return ((t.x.data != NULL) + (t.dy.data != NULL) + (t.residual.data != NULL)
            + (t.skip.data != NULL)
            + (t.y.data != NULL and t.y.data != t.dy.data))


cdef int count_outputs(Task* t) noexcept nogil:
    return (t.out.data != NULL) + (t.dresidual.data != NULL) + (t.sum.data != NULL)


cdef Py_ssize_t streams_from(Task* t) noexcept nogil:
    if t.reduce == NO_REDUCE:
        return tuning.stream_maps
    return tuning.stream_rows if t.channels_last and not fits_l2(t) else tuning.stream_planes


cdef bint fits_l2(Task* t) noexcept nogil:
    """Whether the second walk over a run finds it in a core's own cache."""
    return t.G > 1 and bytes_of(t) // t.G * count_inputs(t) <= tuning.l2


cdef void schedule(Task* t, int threads) noexcept nogil:
    """The order of work: blocks of channels through both passes, or chunks shared by all."""
    cdef Py_ssize_t inputs = count_inputs(t)
    cdef Py_ssize_t total = bytes_of(t) * (inputs + count_outputs(t))
    cdef Py_ssize_t column = max((t.N + (t.rest_columns > 0)) * t.S * t.itemsize * inputs, 1)
    cdef Py_ssize_t channels = t.G * t.C, block
    t.split = t.lookahead = False
    t.n_partials = most_chunks(t)
    cdef Py_ssize_t plane = t.S * t.itemsize, row = t.C * t.itemsize if t.channels_last else plane
    # Past the caches go whole lines only; rows of a few lines would mostly be ends. Planes that
    # follow each other are joined.
    t.large = total >= tuning.stream_rows
    # Stretches of rows have their tables in L1, but memory wants long ones.
    cdef Py_ssize_t stretch = tuning.column_tile if t.large else tuning.column_tile // inputs
    t.stream = t.map != NO_MAP and total >= streams_from(t)
    t.joined = t.stream and not t.channels_last and t.pieces == 1 and t.out.c == t.S
    t.stream = t.stream and (t.joined or row % LINE == 0 or row >= 1024)
    t.stream_dresidual = t.stream and t.dresidual.data != NULL and streams_alike(t, row)
    t.planes_ahead = 0 if t.channels_last or plane > 4 * AHEAD else AHEAD // plane + 1
    t.threads = min(<Py_ssize_t> threads, max(1, 2 * total // tuning.serial_below - 1))
    if (t.reduce == NO_REDUCE
            or t.channels_last and (t.G == 1 or is_uneven(t, t.G) or t.mask != NULL)):
        # Shared chunks, in the order of memory: planes side by side, or rows.
        t.split = True
        block = t.C if t.reduce == NO_REDUCE else stretch
    elif t.channels_last:
        block = t.C     # runs, each by one thread
    elif t.column_sums != NULL:
        t.threads = min(<Py_ssize_t> t.threads, ceil_div(t.C, t.rows_per_sum))
        block = rows_at_once(t, tuning.fused_block // column)
    else:
        t.split = t.sum.data == NULL and is_uneven(t, channels // t.pool)
        block = 1 if t.split else tuning.fused_block // column
        # While one block is written the next one is fetched, where the last cache holds both but not
        # all of them.
        t.lookahead = (t.large and not t.split and t.sum.data == NULL and t.map != NO_MAP
                       and tuning.lookahead >= 2 * t.threads * column * max(block, t.pool))
    if is_serial:
        t.threads = 1
    # Whoever is free takes the next block; small arrays are worked on where they were last time.
    t.shared = not t.split and total > t.threads * tuning.l2
    t.fetch = total >= t.threads * tuning.prefetch_from
    t.block, t.tile_bytes = even_block(t, block), 0
    if t.sum.data != NULL and plane <= SUM_TILE:
        t.block = min(t.block, max(SUM_TILE // plane, 1))
        t.tile_bytes = ceil_div(t.block * plane, LINE) * LINE
    if not t.split and t.column_sums == NULL:
        t.n_partials = 1
    t.column_tile = t.C
    if t.channels_last and not t.split:
        t.column_tile = ceil_div(max(stretch, 16), 16) * 16
    t.pitch = pitch_of(t.C if t.split else t.block)
    t.group_pitch = pitch_of((t.C if t.split else t.block) // t.pool)
    t.map_block = even_block(t, t.C)
    set_rows(t)


cdef Py_ssize_t rows_at_once(Task* t, Py_ssize_t most) noexcept nogil:
    """Rows of a block, back: so many at most as all threads may have tables for."""
    return max(min(most, kernel_limit(t) // (t.threads * table_bytes(t)) - 2 * LANES), 1)


cdef bint is_uneven(Task* t, Py_ssize_t units) noexcept nogil:
    """Whether threads would idle if each took whole units of work."""
    return 10 * units < 9 * ceil_div(units, t.threads) * t.threads


cdef bint streams_alike(Task* t, Py_ssize_t row) noexcept nogil:
    """Whether lines of dresidual begin where those of `out` do; short rows' ends are not joined."""
    return ((t.out.data - t.dresidual.data) % LINE == 0 and t.out.g == t.dresidual.g
            and t.out.n == t.dresidual.n and t.out.c == t.dresidual.c
            and (row % LINE == 0 or row >= 1024))


cdef void set_rows(Task* t) noexcept nogil:
    """Channels last: how many rows share the fetching of sums, and of coefficients."""
    cdef Py_ssize_t sparse = tuning.column_tile_streaming * (2 if t.itemsize == 2 else 1)
    cdef bint sparing = t.large and t.reduce == GRADIENT_MOMENTS
    cdef Py_ssize_t columns = min(t.block, t.column_tile)
    t.reduce_rows = max(1, sparse // columns) if sparing else max(4, tuning.column_tile // columns)
    t.map_rows = max(1, (sparse if t.large else tuning.column_tile) // t.C)
    if not t.large:
        t.map_rows = max(t.map_rows, 4)
    if t.mask != NULL:
        t.reduce_rows = min(t.reduce_rows, MOST_MASKED_ROWS)
        t.map_rows = MOST_MASKED_ROWS if t.C >= WIDE else min(t.map_rows, MOST_MASKED_ROWS)


cdef Py_ssize_t even_block(Task* t, Py_ssize_t most) noexcept nogil:
    """Columns or channels in a block: about so many at most, and the same work for all threads."""
    cdef Py_ssize_t units = t.G * (t.chunks if t.split else 1)
    # Vectors are not divided, and groups only where the chunks of all are shared.
    cdef Py_ssize_t whole = 16 if t.channels_last else 1 if t.split else t.pool
    cdef Py_ssize_t blocks = max(ceil_div(t.threads * (4 if t.shared else 1), units),
                                 ceil_div(t.C, max(most, whole)))
    if not t.split:
        blocks = ceil_div(blocks, t.threads) * t.threads
    if t.fold > 1 or t.channels_last and not t.split:
        return t.C
    return min(ceil_div(ceil_div(t.C, blocks), whole) * whole, t.C)
