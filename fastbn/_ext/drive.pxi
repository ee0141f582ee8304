# Drive: which loops a call takes, and in which order blocks and chunks are worked on.
#
# 1. Over planes both passes run on one block of channels, the second walk in reverse, so that it
#    starts on what the cache still holds. Rows are walked in the order of memory, by all threads
#    together, which meet between the passes and then turn back; so are planes where single blocks
#    would leave threads idle (few channels). A map alone goes forward: it has seen nothing.
# 2. By column, backward: one walk over a sample's row takes its own two sums, in registers, and
#    adds to the sums of every column, in memory. Each `rows_per_sum` rows, fixed by shape alone,
#    have column sums of their own.
# 3. With a skip, rows of x + skip are written to `sum`, past the caches where they are many, and for
#    both passes to a tile that stays in the cache. Rows that a mask hides are computed as the others,
#    and cleared; only on the way back they are left out, of the sums of columns.

# ---- Elementwise work, by kind ----

# Each is a function of its own: compilers take twice as long over one that holds them all.
cdef void map_y(const Task* t, const Work* w) noexcept nogil:
    map_chunk_of(0, t, w)
cdef void map_activation(const Task* t, const Work* w) noexcept nogil:
    map_chunk_of(ACTIVATION | (t.kind & RESIDUAL), t, w)
cdef void map_dx(const Task* t, const Work* w) noexcept nogil:
    map_chunk_of(WITH_X, t, w)
cdef void map_dx_with_activation_grad(const Task* t, const Work* w) noexcept nogil:
    map_chunk_of(WITH_X | ACTIVATION_GRAD | (t.kind & DRESIDUAL), t, w)
cdef void map_activation_grad(const Task* t, const Work* w) noexcept nogil:
    map_chunk_of(ACTIVATION_GRAD | (t.kind & DRESIDUAL), t, w)
cdef void map_y_by_column(const Task* t, const Work* w) noexcept nogil:
    map_planes(BY_COLUMN, t, w)
cdef void map_activation_by_column(const Task* t, const Work* w) noexcept nogil:
    map_planes(BY_COLUMN | ACTIVATION | (t.kind & RESIDUAL), t, w)
cdef void map_dx_by_column(const Task* t, const Work* w) noexcept nogil:
    map_planes(BY_COLUMN | WITH_X | (t.kind & RESIDUAL), t, w)
cdef void map_dx_with_activation_grad_by_column(const Task* t, const Work* w) noexcept nogil:
    map_planes(BY_COLUMN | WITH_X | ACTIVATION_GRAD | (t.kind & DRESIDUAL), t, w)
cdef void map_masked(const Task* t, const Work* w) noexcept nogil:
    map_chunk_of(MASKED, t, w)
cdef void map_masked_y(const Task* t, const Work* w) noexcept nogil:
    map_chunk_of(t.kind & (RESIDUAL | ACTIVATION | ACTIVATION_GRAD | DRESIDUAL) | MASKED, t, w)
cdef void map_masked_dx(const Task* t, const Work* w) noexcept nogil:
    map_chunk_of(t.kind & (ACTIVATION_GRAD | DRESIDUAL) | WITH_X | MASKED, t, w)
cdef void map_general_y(const Task* t, const Work* w) noexcept nogil:
    map_chunk_of((t.kind & ~WITH_X) | GENERAL, t, w)
cdef void map_general_dx(const Task* t, const Work* w) noexcept nogil:
    map_chunk_of(t.kind | WITH_X | GENERAL, t, w)

ctypedef void (*MapChunk)(const Task*, const Work*) noexcept nogil

cdef MapChunk[KINDS] maps
maps[0], maps[ACTIVATION], maps[ACTIVATION_GRAD] = map_y, map_activation, map_activation_grad
maps[WITH_X], maps[WITH_X | ACTIVATION_GRAD] = map_dx, map_dx_with_activation_grad
maps[BY_COLUMN], maps[BY_COLUMN | ACTIVATION] = map_y_by_column, map_activation_by_column
maps[BY_COLUMN | WITH_X] = map_dx_by_column
maps[BY_COLUMN | WITH_X | ACTIVATION_GRAD] = map_dx_with_activation_grad_by_column


cdef inline void map_chunk(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t j,
                           Py_ssize_t ahead) noexcept nogil:
    cdef Work w = Work(g, c0, c1, j, ahead)
    cdef bint dx = t.kind & WITH_X
    if t.extreme[g]:
        (map_general_dx if dx else map_general_y)(t, &w)
    elif t.kind == MASKED:
        map_masked(t, &w)
    elif t.mask != NULL:
        (map_masked_dx if dx else map_masked_y)(t, &w)
    else:
        maps[t.kind & ~(RESIDUAL | DRESIDUAL)](t, &w)


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
    """The block this thread takes after b: the next that nobody has taken (shared), or its own
    next; `end` if there is none."""
    return min(fetch_add(&t.next_block, 1) if t.shared else b + 1, end)


cdef inline void move_operand(Operand* a, const Operand* whole, const Block* k) noexcept nogil:
    if whole.data != NULL:
        a.data = whole.data + (k.g * a.g + k.c0 * a.c) * <Py_ssize_t> sizeof(element)


cdef inline void move_table(Table* table, const Table* whole, const Block* k) noexcept nogil:
    if whole.period > 0:
        table.phase = whole.phase + k.c0
    elif whole.data != NULL:
        table.data = whole.data + k.g * table.g + k.c0 // max(table.pool, 1) * table.c


cdef Task task_of_thread(const Task* t, Py_ssize_t thread) noexcept nogil:
    """The task with a thread's tables, for blocks of its own."""
    cdef Task own = t[0]
    cdef Py_ssize_t pitch = sums_pitch(t)
    own.shift += thread * pitch
    own.unit += thread * pitch
    own.total += thread * 2 * pitch
    own.compensation += thread * 2 * pitch
    own.channel_moments += thread * 2 * pitch
    own.partial += thread * t.n_partials * 2 * pitch
    own.packed += thread * PACKED * t.pitch * <Py_ssize_t> sizeof(real)
    own.extreme += thread
    return own


cdef void move_to_block(Task* own, const Task* t, const Block* k) noexcept nogil:
    """A thread's task on a block, as on a task of its own. (There may be a block for every few
    values, and a Task is long: only what differs is written.)"""
    move_operand(&own.x, &t.x, k)
    move_operand(&own.source, &t.source, k)
    move_operand(&own.other, &t.other, k)
    move_operand(&own.out, &t.out, k)
    move_operand(&own.dresidual, &t.dresidual, k)
    move_operand(&own.skip, &t.skip, k)
    move_operand(&own.sum, &t.sum, k)
    move_table(&own.mean, &t.mean, k)
    move_table(&own.var, &t.var, k)
    move_table(&own.gamma, &t.gamma, k)
    move_table(&own.beta, &t.beta, k)
    move_table(&own.first, &t.first, k)
    move_table(&own.second, &t.second, k)
    own.phase = k.c0
    own.starts = t.starts + k.g
    if t.mask != NULL:
        own.mask, own.counts = t.mask + k.g * t.mask_g, t.counts + k.g
        own.G = t.G - k.g   # by which selection_at finds the end of the mask and of weights
    if t.weights != NULL:
        own.weights = t.weights + k.g * t.weights_g
    if t.row_mask != NULL:
        own.row_mask = t.row_mask + k.c0
    if not t.channels_last:
        own.C = own.channels = k.c1 - k.c0


cdef Task groups_of(const Task* t) noexcept nogil:
    """The task, or a block, on planes of whole groups, as they are summed."""
    cdef Task groups = t[0]
    groups.C = groups.channels = t.channels // t.pool
    groups.N, groups.S, groups.x.c = 1 if t.channels_last else t.N, t.group_size, t.group_size
    groups.channels_last, groups.fold, groups.rest_columns = False, 1, 0
    groups.column_tile = groups.C
    groups.count = t.count * t.pool
    groups.chunks, groups.rows = t.group_chunks, t.group_rows
    groups.pieces, groups.piece = t.group_pieces, t.group_piece
    groups.pitch, groups.planes_ahead = t.group_pitch, 0
    groups.pool = groups.first.pool = groups.second.pool = 1
    return groups


cdef void move_groups_to_block(Task* groups, const Task* own) noexcept nogil:
    """Those of another block."""
    groups.x.data, groups.starts = own.x.data, own.starts
    groups.first.data, groups.second.data = own.first.data, own.second.data
    groups.C = groups.channels = groups.column_tile = own.channels // own.pool


cdef inline void reduce_columns(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1,
                                Py_ssize_t j) noexcept nogil:
    """Chunk j of a block, so many columns at a time as have their tables in L1."""
    while c0 < c1:
        reduce_chunk(t, g, c0, min(c0 + t.column_tile, c1), j)
        c0 += t.column_tile


cdef void reduce_block(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    cdef Py_ssize_t j
    set_shift(t, g, c0, c1)
    for j in range(t.chunks):
        reduce_columns(t, g, c0, c1, j)
        if t.n_partials < t.chunks:
            add_chunk(t, g, c0, c1, j)


cdef void add_skip(const Task* t, Py_ssize_t c, element* tile, bint fetch) noexcept nogil:
    """Row c of x + skip, into `sum` and, for what comes next, a tile in the cache."""
    cdef const element* x = at(&t.x, 0, 0, c)
    cdef const element* skip = at(&t.skip, 0, 0, c)
    cdef element* sum = at(&t.sum, 0, 0, c)
    cdef bint stream = t.stream and sum != tile and t.S % 16 == 0 and unaligned(sum, 16) == 0
    cdef Py_ssize_t s, n
    cdef vec v
    for s in range(0, t.S, 16):
        n = min(16, t.S - s)
        prefetch(x + s + ahead_values(), fetch)
        prefetch(skip + s + ahead_values(), fetch)
        v = vadd(vload_any(x + s, n), vload_any(skip + s, n))
        vstore_any(tile + s, v, n)
        if stream:
            vstream(sum + s, v)
        elif sum != tile:
            vstore_any(sum + s, v, n)


cdef void add_skips(Task* own, element* tile, bint fetch) noexcept nogil:
    """Those of a block, which is of the sums from then on: in the cache, nothing need be fetched."""
    cdef Py_ssize_t c
    if tile == NULL:    # rows are long: no tile holds one
        for c in range(own.C):
            add_skip(own, c, at(&own.sum, 0, 0, c), fetch)
        own.x = own.sum
    else:
        for c in range(own.C):
            add_skip(own, c, tile + c * own.S, fetch)
        own.x.data, own.x.c = <char*> tile, own.S
    own.source, own.fetch = own.x, False


cdef void clear_rows(const Task* t, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """Results of rows that the mask hides: whatever was computed of them is 0."""
    cdef Py_ssize_t c, size = t.S * <Py_ssize_t> sizeof(element)
    cdef double zero = 0
    for c in range(first, end if t.row_mask != NULL else first):
        if t.row_mask[c] == 0:
            memset(at(&t.dresidual, 0, 0, c), 0, size)
            if t.kind & WITH_X and t.residual.data != NULL:
                memcpy(at(&t.out, 0, 0, c), at(&t.other, 0, 0, c), size)
            else:
                memset(at(&t.out, 0, 0, c), 0, size)
            scatter(&t.first, 0, c, 1, &zero)
            scatter(&t.second, 0, c, 1, &zero)


cdef void run_blocks(Task* t, Py_ssize_t thread, Py_ssize_t team) noexcept nogil:
    """Each thread takes a block of channels at a time through both passes; the second walk may
    fetch the block that comes after it."""
    cdef Block k
    cdef Py_ssize_t blocks = count_blocks(t, t.block), later, ahead, j
    cdef Py_ssize_t end = blocks if t.shared else blocks * (thread + 1) // team
    cdef Py_ssize_t b = next_block(t, blocks * thread // team - 1, end)
    cdef Task own = task_of_thread(t, thread), groups
    cdef const Task* summed = &own
    cdef element* tile = NULL
    if t.tile_bytes > 0:
        tile = <element*> (t.tiles + thread * t.tile_bytes)
    if t.grouped:
        groups = groups_of(&own)
        summed = &groups
    while b < end:
        k = block(t, b, t.block)
        move_to_block(&own, t, &k)
        if t.grouped:
            move_groups_to_block(&groups, &own)
        if t.skip.data != NULL:
            add_skips(&own, tile, t.fetch)
        reduce_block(summed, 0, 0, summed.C)
        own.extreme[0] = False
        finalize(&own, summed, 0, 0, own.C)
        later = next_block(t, b, end)
        ahead = (later - b) * t.block if t.lookahead and later < end else 0
        if t.map != NO_MAP:
            for j in range(t.chunks - 1, -1, -1):
                map_chunk(&own, 0, 0, own.C, j, ahead)
        clear_rows(&own, 0, own.C)
        b = later


cdef void run_split(Task* t, Py_ssize_t thread, Py_ssize_t team) noexcept nogil:
    """All threads share the chunks of all channels: unit u is chunk u // blocks of block u %
    blocks. Each sums its own in the order of memory and then writes back from where it came to."""
    cdef Task groups = groups_of(t) if t.grouped else t[0]
    cdef Py_ssize_t blocks = count_blocks(&groups, t.block), units = blocks * groups.chunks, u, b
    cdef Py_ssize_t b0 = blocks * thread // team, b1 = blocks * (thread + 1) // team, u0, u1, i
    cdef Py_ssize_t c0 = t.C * thread // team, c1 = t.C * (thread + 1) // team
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
            finalize(t, &groups, b, 0, t.C)
    else:
        for b in range(b0, b1):
            k = block(t, b, t.block)
            finalize(t, t, k.g, k.c0, k.c1)
    if t.map == NO_MAP:
        return
    team_barrier()
    if t.in_pieces:
        map_pieces(t, thread, team)
        return
    blocks = count_blocks(t, t.map_block)
    units = blocks * t.chunks
    u0, u1 = units * thread // team, units * (thread + 1) // team
    for i in range(u1 - u0):
        u = u0 + i if t.reduce == NO_REDUCE else u1 - 1 - i
        k = block(t, u % blocks, t.map_block)
        map_chunk(t, k.g, k.c0, k.c1, u // blocks, 0)
    if t.row_mask != NULL:
        team_barrier()
        clear_rows(t, c0, c1)


# ---- Fused backward by column ----

cdef inline void sum_row(int kind, const Task* t, Py_ssize_t c, Py_ssize_t j, RowGradient row,
                         double* column) noexcept nogil:
    """The sums of row c over chunk j, and of its columns."""
    cdef Chunk k = chunk(t, j)
    cdef Py_ssize_t s, size = k.s1 - k.s0, whole = size // 16 * 16
    cdef Py_ssize_t place = row_of_gamma(t, c) * t.places + k.s0, pitch = t.period * t.places
    cdef const double* gamma = t.gamma_wide + place
    cdef double* sum = chunk_sums(t, 0, j) + c
    cdef wide first = wsplat(0), second = wsplat(0)
    cdef SumPair both = SumPair(&first, &second)
    cdef Summed p = summed_at(t, 0, 0, c, k.s0)
    column += place
    row.act = &p.act if kind & ACTIVATION_GRAD else NULL
    p.x_ahead = p.dy_ahead = p.y_ahead = ahead_values()
    for s in range(0, whole, 16):
        fetch_summed(kind, &p, s)
        add_row_gradients(advance_sources(p.at, s, s, s), 16, &row, gamma + s, both, column + s,
                          pitch)
    if whole < size:
        add_row_gradients(advance_sources(p.at, whole, whole, whole), size - whole, &row,
                          gamma + whole, both, column + whole, pitch)
    sum[0], sum[t.pitch] = wsum(first), wsum(second)


cdef inline void sum_rows_of(int kind, const Task* t, double* column) noexcept nogil:
    """The sums of a block's rows, one after the other, and of its columns."""
    cdef Py_ssize_t c, j
    cdef RowGradient row
    cdef double var
    for c in range(t.C):
        if t.row_mask != NULL and t.row_mask[c] == 0:
            continue    # its own sums are never looked at
        row.mean, var = table_value(&t.mean, 0, c, 0), table_value(&t.var, 0, c, 1)
        row.rstd = 1 / sqrt(var + t.eps) if var + t.eps != 0 else 0
        for j in range(t.chunks):
            sum_row(kind, t, c, j, row, column)


cdef void sum_rows_and_columns(const Task* t, double* column) noexcept nogil:
    if t.kind & ACTIVATION_GRAD:
        sum_rows_of(WITH_X | ACTIVATION_GRAD, t, column)
    else:
        sum_rows_of(WITH_X, t, column)


cdef void add_up_columns(const Task* t, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    """The pieces' sums, from one place to another, into those of the first piece."""
    cdef Py_ssize_t i, piece, size = 2 * t.period * t.places
    for piece in range(1, (t.C + t.rows_per_sum - 1) // t.rows_per_sum):
        for i in range(first, end):
            t.column_sums[i] += t.column_sums[piece * size + i]


cdef void run_backward_by_column(Task* t, Py_ssize_t thread, Py_ssize_t team) noexcept nogil:
    """The fused backward by column: each thread takes pieces of rows, and of these a block at a
    time through both passes."""
    cdef Py_ssize_t pieces = (t.C + t.rows_per_sum - 1) // t.rows_per_sum
    cdef Py_ssize_t size = 2 * t.period * t.places
    cdef Py_ssize_t piece, c, end, j
    cdef Task own = task_of_thread(t, thread)
    cdef Block k
    cdef double* sum
    for piece in range(pieces * thread // team, pieces * (thread + 1) // team):
        c, end = piece * t.rows_per_sum, min((piece + 1) * t.rows_per_sum, t.C)
        sum = t.column_sums + piece * size
        memset(sum, 0, size * sizeof(double))
        while c < end:
            k.g, k.c0, k.c1 = 0, c, min(c + t.block, end)
            move_to_block(&own, t, &k)
            sum_rows_and_columns(&own, sum)
            own.extreme[0] = False
            finalize(&own, &own, 0, 0, own.C)
            for j in range(t.chunks - 1, -1, -1):
                map_chunk(&own, 0, 0, own.C, j, 0)
            clear_rows(&own, 0, own.C)
            c = k.c1
    team_barrier()
    add_up_columns(t, size * thread // team, size * (thread + 1) // team)


cdef void work(Task* t, int thread, int team) noexcept nogil:
    cdef fp_mode was = enter_usual_mode()
    if t.reduce == INTEGER_SUMS:
        sum_integers(t, thread, team)
    elif t.column_sums != NULL:
        run_backward_by_column(t, thread, team)
    elif t.split:
        run_split(t, thread, team)
    else:
        run_blocks(t, thread, team)
    if t.stream:
        stream_fence()
    leave_mode(was)


cdef int kind_of(const Task* t) noexcept nogil:
    """What a map does beside (or, with x, instead of) an affine map of its source."""
    cdef int kind = WITH_X if t.map == INPUT_GRADIENT else 0
    if t.mask != NULL:
        kind |= MASKED
    if t.period > 0:
        kind |= BY_COLUMN
    if t.y.data != NULL:
        return kind | ACTIVATION_GRAD | (DRESIDUAL if t.dresidual.data != NULL else 0)
    if t.residual.data != NULL:
        return kind | RESIDUAL | (0 if kind & WITH_X else ACTIVATION)
    return kind | (ACTIVATION if t.slope != 1 else 0)


cdef inline Operand either(const Operand* a, const Operand* b) noexcept nogil:
    return b[0] if a.data == NULL else a[0]


cdef void resolve_operands(Task* t) noexcept nogil:
    """Set kind, source and other, which the loops go by. An operand that is absent points at one
    that is there: its addresses are computed, never read."""
    t.kind = kind_of(t)
    t.source = either(&t.dy, &t.x)
    t.x = either(&t.x, &t.dy)
    t.other = either(&t.y, &t.residual)
    t.other = either(&t.other, &t.source)
    t.dresidual = either(&t.dresidual, &t.out)
