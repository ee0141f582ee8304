# Parts: what follows in memory is joined, and what would need too many tables is cut.
#
# No bit depends on either. Tables stay small beside the array: `run_parts` takes wide arrays with
# few values a channel some channels at a time.

cdef enum:
    OPERANDS = 8
    TABLES = 11


cdef void list_operands(Task* t, Operand** operands) noexcept nogil:
    cdef Operand* every[OPERANDS]
    every[:] = [&t.x, &t.dy, &t.out, &t.residual, &t.y, &t.dresidual, &t.skip, &t.sum]
    memcpy(operands, every, sizeof(every))


cdef void list_tables(Task* t, Table** tables) noexcept nogil:
    cdef Table* every[TABLES]
    every[:] = [&t.mean, &t.var, &t.gamma, &t.beta, &t.a, &t.b, &t.dy_mean, &t.rstd, &t.rest,
                &t.first, &t.second]
    memcpy(tables, every, sizeof(every))


cdef void join_planes(Task* t) noexcept nogil:
    """A map alone of one channel takes planes that follow each other as one."""
    cdef Operand* operands[OPERANDS]
    cdef Py_ssize_t i
    cdef bint joins = t.reduce == NO_REDUCE and not t.channels_last and t.channels == 1 and t.G == 1
    if not joins or t.mask != NULL:
        return
    list_operands(t, operands)
    for i in range(OPERANDS):
        joins = joins and (operands[i].data == NULL or operands[i].n == t.S)
    if joins:
        set_shape(t, 1, 1, 1, t.N * t.S, False)


cdef bint is_joined(const Operand* a, Py_ssize_t channels) noexcept nogil:
    """Whether the channels of a run follow those of the one before."""
    return a.data == NULL or a.g == channels * a.c


cdef bint join_table(Table* table, Py_ssize_t channels) noexcept nogil:
    """The table as of one run, whose channels are those of all runs; whether there is such."""
    cdef Py_ssize_t entries = channels // max(table.pool, 1)
    if table.data == NULL or table.g == entries * table.c:
        return True
    table.period = entries
    return table.g == 0 and table.pool <= 1


cdef void join_runs(Task* t) noexcept nogil:
    """Runs of one sample, whose memory is that of one run with the channels of all: finalize
    takes sixteen channels at a time, and runs have fewer."""
    cdef Task joined
    cdef Operand* operands[OPERANDS]
    cdef Table* tables[TABLES]
    cdef Py_ssize_t i
    cdef bint joins = True
    if t.G == 1 or t.N > 1 or t.fold > 1 or t.mask != NULL:
        return
    if t.reduce == GRADIENT_MOMENTS and t.channels >= MANY_CHANNELS:
        return
    joined = t[0]
    list_operands(&joined, operands)
    list_tables(&joined, tables)
    for i in range(OPERANDS):
        joins = joins and is_joined(operands[i], t.channels)
    for i in range(TABLES):
        joins = joins and join_table(tables[i], t.channels)
    if joins:
        set_shape(&joined, 1, 1, t.G * t.channels, t.S, t.channels_last)
        joined.pool = t.pool
        t[0] = joined


cdef bint has_one_value(const Task* t) noexcept nogil:
    """Whether a channel of a run is a single value."""
    return t.N * t.S == 1 and t.fold == 1


cdef void use_values_as_means(Task* t, int element) noexcept nogil:
    """A forward of one value a channel: that is its mean, and its variance the 0 that fresh tables
    hold, if all are finite; what is left is a map."""
    cdef Py_ssize_t c
    cdef bint fits = t.G == 1 and t.channels_last and has_one_value(t) and t.pool == 1
    cdef int finite = 1
    cdef double* mean = <double*> t.first.data
    fits = fits and t.mask == NULL and t.reduce == MOMENTS and t.map == AFFINE
    fits = fits and (element == F32 or element == F64)
    if not fits or flushes():
        return
    if element == F32:
        for c in range(t.C):
            mean[c] = (<const float*> t.x.data)[c]
            finite &= mean[c] - mean[c] == 0
    else:
        for c in range(t.C):
            mean[c] = (<const double*> t.x.data)[c]
            finite &= mean[c] - mean[c] == 0
    if finite:
        t.reduce, t.mean, t.var = NO_REDUCE, t.first, t.second


cdef void shift_operand(Operand* a, Py_ssize_t g, Py_ssize_t c, Py_ssize_t itemsize) noexcept nogil:
    if a.data != NULL:
        a.data += (g * a.g + c * a.c) * itemsize


cdef void shift_table(Table* table, Py_ssize_t g, Py_ssize_t c) noexcept nogil:
    if table.period > 0:
        table.phase += c
    elif table.data != NULL:
        table.data += g * table.g + c * table.c


cdef Task part_of(Task* t, Py_ssize_t g, Py_ssize_t G, Py_ssize_t c, Py_ssize_t C) noexcept nogil:
    """The task on G runs from run g on and, where rows are not folded, C channels from c on."""
    cdef Task part = t[0]
    cdef Operand* operands[OPERANDS]
    cdef Table* tables[TABLES]
    cdef Py_ssize_t i
    list_operands(&part, operands)
    list_tables(&part, tables)
    for i in range(OPERANDS):
        shift_operand(operands[i], g, c, t.itemsize)
    for i in range(TABLES):
        shift_table(tables[i], g, c)
    if t.mask != NULL:
        part.mask += g * t.mask_g
        part.counts += g
    if t.row_mask != NULL:
        part.row_mask += c
    if t.weights != NULL:
        part.weights += g * t.weights_g
    part.G = G
    if t.fold == 1:
        part.C = part.channels = C
        set_pitch(&part)
    return part


cdef int run_part(Task* t, Run run, int threads) except -1 nogil:
    cdef char* memory = NULL
    schedule(t, threads)
    set_scratch(t, &memory)
    run(t)
    PyMem_RawFree(memory)
    return 0


cdef int run_parts(Task* t, Run run, int threads) except -1 nogil:
    """The whole task at once if its tables are small beside it, else some runs, or some channels
    of one run, after others."""
    cdef Py_ssize_t most, G, C, g = 0, c
    cdef Task part
    schedule(t, threads)
    if owners_of(t) * t.pitch * table_bytes(t) <= kernel_limit(t):
        return run_part(t, run, threads)
    t.n_partials = most_chunks(t)     # some parts may be shared by all threads
    most = channels_at_once(t)
    G, C = min(max(most // t.C, 1), t.G), t.C if t.fold > 1 else min(most, t.C)
    while g < t.G:
        c = 0
        while c < t.C:
            part = part_of(t, g, min(G, t.G - g), c, min(C, t.C - c))
            run_part(&part, run, threads)
            c += C
        g += G
    return 0
