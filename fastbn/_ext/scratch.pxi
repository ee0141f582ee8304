# Scratch: the tables between the passes, and how many channels may have them at a time.

cdef Py_ssize_t usual_scratch = sizes.SCRATCH, scratch_part = sizes.SCRATCH_PART
cdef Py_ssize_t verb_bytes = sizes.CHANNEL_BYTES, sum_bytes = sizes.SUM_BYTES
cdef double calls_share = sizes.CALLS_SHARE


cdef char* take(char** free, Py_ssize_t size) noexcept nogil:
    cdef char* taken = free[0]
    free[0] += ceil_div(size, LINE) * LINE
    return taken


cdef Py_ssize_t rows_of_sums(Task* t) noexcept nogil:
    """Float64 tables between the passes: shift, unit, total and the two sums of each chunk that is
    kept, compensation, and moments of channels that are pooled."""
    if t.reduce == NO_REDUCE:
        return 0
    return (4 + 2 * t.n_partials + (2 if t.n_partials < most_chunks(t) else 0)
            + (2 if t.pool > 1 else 0))


cdef Py_ssize_t most_chunks(Task* t) noexcept nogil:
    return max(t.chunks, t.group_chunks)


cdef Py_ssize_t owners_of(Task* t) noexcept nogil:
    """How many tables there are at a time."""
    return t.G if t.split else t.threads


cdef int set_scratch(Task* t, char** memory) except -1 nogil:
    """The tables between the passes."""
    cdef Py_ssize_t owners = owners_of(t)
    cdef Py_ssize_t table = owners * sums_pitch(t) * sizeof(double)
    cdef bint is_prepared = t.prepared != NULL and t.fold == 1
    cdef Py_ssize_t packed = 0 if is_prepared else owners * t.pitch * PACKED * t.real_bytes
    cdef Py_ssize_t reducing = 0 if t.reduce == NO_REDUCE else 1
    cdef bint pools = t.pool > 1 and not t.grouped, adds_up = t.n_partials < most_chunks(t)
    cdef Py_ssize_t samples = columns_of_samples(t)
    cdef char* free
    if is_prepared and not t.in_pieces:
        t.packed = t.prepared
        return 0
    memory[0] = <char*> PyMem_RawMalloc(rows_of_sums(t) * table + packed + 3 * samples
                                        + reducing * t.G * sizeof(Py_ssize_t) + owners
                                        + t.threads * t.tile_bytes + 13 * LINE)
    if memory[0] == NULL:
        raise MemoryError("fastbn: no memory for the tables of sums")
    free = memory[0] + (-<size_t> memory[0] & (LINE - 1))
    t.shift = <double*> take(&free, reducing * table)
    t.unit = <double*> take(&free, reducing * table)
    t.total = <double*> take(&free, reducing * 2 * table)
    t.channel_moments = <double*> take(&free, reducing * pools * 2 * table)
    t.compensation = <double*> take(&free, reducing * adds_up * 2 * table)
    t.partial = <double*> take(&free, reducing * 2 * t.n_partials * table)
    if most_chunks(t) == 1 and t.fold == 1:
        t.total = t.partial     # the sums of one chunk are those of all
    t.packed = t.prepared if is_prepared else take(&free, packed)
    if t.prepared == NULL:
        t.extreme = <unsigned char*> take(&free, owners)
        memset(t.extreme, 0, owners)
    t.starts = <Py_ssize_t*> take(&free, reducing * t.G * sizeof(Py_ssize_t))
    t.samples = <unsigned short*> take(&free, samples * sizeof(short))
    t.numbers = <unsigned char*> take(&free, samples)
    t.tiles = take(&free, t.threads * t.tile_bytes)
    if reducing:
        set_starts(t)
    set_samples(t)
    return 0


cdef void set_starts(Task* t) noexcept nogil:
    cdef Py_ssize_t g, place, each = t.weight_samples * t.S
    cdef const unsigned char* mask
    memset(t.starts, 0, t.G * sizeof(Py_ssize_t))
    for g in range(t.G if t.mask != NULL else 0):
        mask, place = t.mask + g * t.mask_g, 0
        while place < t.mask_g and (mask[place] == 0 or (
                each > 0 and t.weights[g * t.weights_g + place // each] == 0)):
            place += 1
        t.starts[g] = place if place < t.mask_g else 0


cdef Py_ssize_t columns_of_samples(Task* t) noexcept nogil:
    """Entries of `samples` and `numbers`: for the columns of a row and the sixteen that a vector
    may reach beyond; none without a mask."""
    return t.pitch + LANES if t.mask != NULL and t.channels_last else 0


cdef void set_samples(Task* t) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(columns_of_samples(t)):
        t.samples[c] = <unsigned short> (c // t.channels)
        t.numbers[c] = <unsigned char> (c // t.channels)


cdef Py_ssize_t table_bytes(Task* t) noexcept nogil:
    """Bytes of one channel's tables."""
    return rows_of_sums(t) * <Py_ssize_t> sizeof(double) + PACKED * t.real_bytes


cdef Py_ssize_t kernel_limit(Task* t) noexcept nogil:
    """What the kernels' tables may take: the limit of a call (SCRATCH, or a part of the array) less
    the verb's own tables, at most CALLS_SHARE of it."""
    cdef Py_ssize_t both = max(tuning.scratch, bytes_of(t) // scratch_part)
    cdef Py_ssize_t calls = <Py_ssize_t> (both * calls_share)
    if t.G == 1 and t.period == 0:
        calls = min(calls, t.channels * t.verb_bytes)
    return both - calls


cdef Py_ssize_t verb_limit(Task* t) noexcept nogil:
    """What a verb's own tables may take; above it verbs work in parts."""
    return <Py_ssize_t> (max(usual_scratch, bytes_of(t) // scratch_part) * calls_share)


cdef Py_ssize_t channels_at_once(Task* t) noexcept nogil:
    """How many channels' tables are in memory at a time: all, or equal parts of whole vectors."""
    cdef Py_ssize_t most = max(kernel_limit(t) // table_bytes(t) // LANES, 1) * LANES
    if t.C <= most or t.fold > 1 or t.pool > 1 or t.period > 0 or t.prepared != NULL:
        return max(most, t.C)
    return ceil_div(t.C, ceil_div(t.C, most) * LANES) * LANES
