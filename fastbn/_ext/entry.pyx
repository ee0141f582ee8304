"""Between Python and the kernels: fills in Tasks, decides the order of work, runs them.

1. `Engine` holds the kernels of one instruction set. Its eight functions take what `base.Backend`
   says; its plain entries do a whole public call for contiguous arrays that fit, reading arrays by
   NumPy's C interface (a few nanoseconds each), and answer None, having touched nothing, for
   everything else: only then Python checks and explains.
2. `set_chunks` cuts the samples into chunks. It sees shape and element type alone, for it decides
   roundings.
3. `schedule` decides what no bit depends on: blocks, streaming stores, threads. Its thresholds are
   the module's `tuning`, which experiments may change by `tune`.
4. Tables between the passes stay small beside the array: `run_parts` takes wide arrays with few
   values a channel some channels at a time. Nor does that change a bit.
"""

from fastbn import activations
from fastbn._caches import (
    CALLS_SHARE, CHANNEL_BYTES, FETCH, L2, LOOKAHEAD, MOST_FOLDED, SCRATCH, SCRATCH_PART,
    SERIAL_BELOW, SPARSE, STREAM_MAPS, STREAM_PLANES, STREAM_ROWS, STRETCH, TRIP,
)
from fastbn.backends.base import ROW_BYTES, SUM_BYTES, depth
from fastbn.elements import is_bfloat16
from fastbn.layouts import SHORT, are_rows

cimport numpy as cnp
from cython cimport floating
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport INFINITY, isfinite
from libc.string cimport memcpy, memset

from fastbn._ext.task cimport (
    AFFINE, AHEAD, GRADIENT_MOMENTS, INPUT_GRADIENT, MOMENTS, NO_MAP, NO_REDUCE, PACKED, ROWS_PICKED,
    WIDE, Map, Operand, Reduce, Run, Table, Task, sums_pitch,
)

cnp.import_array()

cdef extern from *:
    """
    /* Calls in flight at once share the cores, each taking a part of its threads. */
    static int in_flight = 0;
    static int enter_call(void) { return __atomic_add_fetch(&in_flight, 1, __ATOMIC_RELAXED); }
    static void leave_call(void) { __atomic_sub_fetch(&in_flight, 1, __ATOMIC_RELAXED); }

    /* libgomp's threads do not exist in a forked child, which would wait for them for ever. So the
     * pool is given up before a fork (whoever's work made it) and made anew by the next
     * computation. Runtimes that cannot do that leave the child on one thread. Of the calls in
     * flight none goes on in the child: only the thread that forks is there. */
    static int is_serial = 0;
    #ifdef _OPENMP
    #include <omp.h>
    #include <pthread.h>
    static int pause_all(int) __attribute__((weakref("omp_pause_resource_all")));
    static __thread int is_paused = 0;  /* several threads may fork at once */
    static void before_fork(void) {
        enum { OMP_PAUSE_SOFT = 1 };
        is_paused = !omp_in_parallel() && pause_all && pause_all(OMP_PAUSE_SOFT) == 0;
    }
    static void in_child(void) {
        is_serial |= !is_paused;
        in_flight = 0;
    }
    static int guard_forks(void) { return pthread_atfork(before_fork, NULL, in_child); }
    #else
    static int guard_forks(void) { return 0; }
    #endif

    /* Whether the caller's floating-point mode may take small numbers for 0. */
    #ifdef __SSE__
    static int flushes(void) { return (__builtin_ia32_stmxcsr() & 0x8040) != 0; }
    #else
    static int flushes(void) { return 1; }
    #endif
    """
    bint flushes() nogil
    int is_serial
    int enter_call() nogil
    void leave_call() nogil
    int guard_forks() nogil

if guard_forks() != 0:
    raise MemoryError("fastbn: no memory for the handlers that make fork safe")


cdef enum:
    LINE = 64
    LANES = 16
    FOLD_BELOW = 64         # columns; rows narrower than this are taken several at a time,
    MANY = 65536            # and in arrays of this many values all rows of broken vectors
    CHUNK = 16384           # values of a channel in a chunk: the lanes' sums stay short
    FEWEST_ROWS = 64        # samples in a chunk, channels inside
    MOST_ROWS = 1024        # twice that of half types: sums take up 0.4 % of what is summed
    MANY_CHANNELS = 1024    # of a run, which is worked on as fast as several joined
    OVERFLOWING = 65536     # bytes of coefficients that L1 does not keep from row to row


# The thresholds of `fastbn._caches`; `tune` overrides them in experiments.
cdef struct Tuning:
    Py_ssize_t l2
    Py_ssize_t trip
    Py_ssize_t lookahead
    Py_ssize_t serial_below
    Py_ssize_t stream_planes
    Py_ssize_t stream_rows
    Py_ssize_t stream_maps
    Py_ssize_t stretch
    Py_ssize_t sparse
    Py_ssize_t fetch
    Py_ssize_t scratch

cdef Tuning tuning
tuning.l2, tuning.serial_below = L2, SERIAL_BELOW
tuning.trip, tuning.lookahead = TRIP, LOOKAHEAD
tuning.stream_planes, tuning.stream_rows = STREAM_PLANES, STREAM_ROWS
tuning.stream_maps = STREAM_MAPS
tuning.stretch, tuning.sparse, tuning.fetch = STRETCH, SPARSE, FETCH
tuning.scratch = SCRATCH

cdef Py_ssize_t most_folded = MOST_FOLDED, scratch = SCRATCH, scratch_part = SCRATCH_PART
cdef Py_ssize_t row_bytes = ROW_BYTES, sum_bytes = SUM_BYTES
cdef Py_ssize_t call_bytes = CHANNEL_BYTES, short_plane = SHORT
cdef double calls_share = CALLS_SHARE


def tune(**thresholds):
    """Override thresholds by name and return all that are in force; for experiments alone."""
    global tuning
    in_force = dict(tuning)
    in_force.update(thresholds)
    if len(in_force) != len(dict(tuning)):
        raise ValueError(f"thresholds are {sorted(dict(tuning))}, got {sorted(thresholds)}")
    tuning = in_force
    return in_force


# ---- The task ----

cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef void set_shape(Task* t, Py_ssize_t G, Py_ssize_t N, Py_ssize_t C, Py_ssize_t S,
                    bint inside) noexcept nogil:
    """The shape, with narrow rows folded: k samples of C channels as one row of k*C columns."""
    cdef Py_ssize_t k = 1
    t.G, t.N, t.C, t.S, t.channels, t.fold, t.tail, t.inside = G, N, C, S, C, 1, 0, inside
    t.count = <double> N * S
    if inside and (C < FOLD_BELOW or C % 16 != 0 and N * C >= MANY):
        while k * C % 16 != 0:
            k *= 2
        if k <= N and k * C <= most_folded:
            t.fold, t.C, t.N, t.tail = k, k * C, N // k, N % k * C
    t.pool = 1
    set_pitch(t)


cdef bint is_inside(Py_ssize_t N, Py_ssize_t S, Py_ssize_t pool) noexcept nogil:
    """Whether channels are inside: of one sample, groups of them are planes."""
    return S == 1 and (N > 1 or pool == 1)


cdef void set_pitch(Task* t) noexcept nogil:
    t.pitch = pitch_of(t.C)


cdef Py_ssize_t pitch_of(Py_ssize_t channels) noexcept nogil:
    """Coefficients in a row of packed ones."""
    return ceil_div(channels, LANES) * LANES + LANES


cdef void set_groups(Task* t) noexcept nogil:
    """The chunks of whole groups, where these are planes: of channels outside, or of all channels
    that there are."""
    cdef Task groups = t[0]
    t.group_chunks = 0
    t.grouped = t.pool > 1 and t.reduce == MOMENTS and (not t.inside or t.pool == t.channels)
    if t.grouped:
        t.group_size = t.N * t.C + t.tail if t.inside else t.S * t.pool
        groups.S, groups.N, groups.inside = t.group_size, 1 if t.inside else t.N, False
        set_chunks(&groups)
        t.group_chunks, t.group_rows = groups.chunks, groups.rows
        t.group_pieces, t.group_piece = groups.pieces, groups.piece


cdef void set_chunks(Task* t) noexcept nogil:
    t.pieces, t.piece = 1, t.S
    if t.inside:
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
    return t.G * (t.N * t.C + t.tail) * t.S * t.itemsize


cdef int count_inputs(Task* t) noexcept nogil:
    # dy may be its own gate
    return ((t.x.data != NULL) + (t.dy.data != NULL) + (t.residual.data != NULL)
            + (t.y.data != NULL and t.y.data != t.dy.data))


cdef int count_outputs(Task* t) noexcept nogil:
    return (t.out.data != NULL) + (t.dresidual.data != NULL)


cdef Py_ssize_t streams_from(Task* t) noexcept nogil:
    if t.reduce == NO_REDUCE:
        return tuning.stream_maps
    return tuning.stream_rows if t.inside and not fits_l2(t) else tuning.stream_planes


cdef bint fits_l2(Task* t) noexcept nogil:
    """Whether the second walk over a run finds it in a core's own cache."""
    return t.G > 1 and bytes_of(t) // t.G * count_inputs(t) <= tuning.l2


cdef void schedule(Task* t, int threads) noexcept nogil:
    """The order of work: blocks of channels through the whole trip, or chunks shared by all."""
    cdef Py_ssize_t inputs = count_inputs(t)
    cdef Py_ssize_t total = bytes_of(t) * (inputs + count_outputs(t))
    cdef Py_ssize_t column = max((t.N + (t.tail > 0)) * t.S * t.itemsize * inputs, 1)
    cdef Py_ssize_t channels = t.G * t.C, block
    t.split = t.lookahead = False
    t.kept = most_chunks(t)
    cdef Py_ssize_t plane = t.S * t.itemsize, row = t.C * t.itemsize if t.inside else plane
    # Past the caches go whole lines only; rows of a few lines would mostly be ends. Planes that
    # follow each other are joined.
    t.large = total >= tuning.stream_rows
    # Stretches of rows have their tables in L1, but memory wants long ones.
    cdef Py_ssize_t stretch = tuning.stretch if t.large else tuning.stretch // inputs
    t.stream = t.map != NO_MAP and total >= streams_from(t)
    t.joined = t.stream and not t.inside and t.pieces == 1 and t.out.c == t.S
    t.stream = t.stream and (t.joined or row % LINE == 0 or row >= 1024)
    t.stream_dresidual = t.stream and t.dresidual.data != NULL and streams_alike(t, row)
    t.planes_ahead = 0 if t.inside or plane > 4 * AHEAD else AHEAD // plane + 1
    t.threads = min(<Py_ssize_t> threads, max(1, 2 * total // tuning.serial_below - 1))
    if t.reduce == NO_REDUCE or t.inside and (t.G == 1 or is_uneven(t, t.G) or t.mask != NULL):
        # Shared chunks, in the order of memory: planes side by side, or rows.
        t.split = True
        block = t.C if t.reduce == NO_REDUCE else stretch
    elif t.inside:
        block = t.C     # runs, each by one thread
    elif t.column_sums != NULL:
        t.threads = min(<Py_ssize_t> t.threads, ceil_div(t.C, t.deep))
        block = rows_at_once(t, tuning.trip // column)
    else:
        t.split = is_uneven(t, channels // t.pool)
        block = 1 if t.split else tuning.trip // column
        # While one block is written the next one is fetched, where the last cache holds all of them.
        t.lookahead = (not t.split and t.map != NO_MAP and tuning.lookahead
                       >= 2 * t.threads * column * max(block, t.pool))
    if is_serial:
        t.threads = 1
    # Whoever is free takes the next block; small arrays are worked on where they were last time.
    t.shared = not t.split and total > t.threads * tuning.l2
    t.fetch = total >= t.threads * tuning.fetch
    t.block = even_block(t, block)
    if not t.split and t.column_sums == NULL:
        t.kept = 1
    t.stretch = t.C
    if t.inside and not t.split:
        t.stretch = ceil_div(max(stretch, 16), 16) * 16
    t.pitch = pitch_of(t.C if t.split else t.block)
    t.group_pitch = pitch_of((t.C if t.split else t.block) // t.pool)
    t.map_block = even_block(t, t.C)
    set_rows(t)


cdef Py_ssize_t rows_at_once(Task* t, Py_ssize_t most) noexcept nogil:
    """Rows of a block, back: so many at most as all threads may have tables for."""
    return max(min(most, limit_of(t) // (t.threads * table_bytes(t)) - 2 * LANES), 1)


cdef bint is_uneven(Task* t, Py_ssize_t units) noexcept nogil:
    """Whether threads would idle if each took whole units of work."""
    return 10 * units < 9 * ceil_div(units, t.threads) * t.threads


cdef bint streams_alike(Task* t, Py_ssize_t row) noexcept nogil:
    """Whether lines of dresidual begin where those of `out` do; ends of short rows are not joined."""
    return ((t.out.data - t.dresidual.data) % LINE == 0 and t.out.g == t.dresidual.g
            and t.out.n == t.dresidual.n and t.out.c == t.dresidual.c
            and (row % LINE == 0 or row >= 1024))


cdef void set_rows(Task* t) noexcept nogil:
    """Channels inside: how many rows share the fetching of sums, and of coefficients."""
    cdef Py_ssize_t sparse = tuning.sparse * (2 if t.itemsize == 2 else 1)
    cdef bint sparing = t.large and t.reduce == GRADIENT_MOMENTS
    cdef Py_ssize_t columns = min(t.block, t.stretch)
    cdef bint overflows = t.map == INPUT_GRADIENT and PACKED * t.C * t.real_bytes >= OVERFLOWING
    t.few = max(1, sparse // columns) if sparing else max(4, tuning.stretch // columns)
    t.together = max(1, (sparse if t.large else tuning.stretch) // t.C)
    if overflows or not t.large:
        t.together = max(t.together, 4)
    if t.mask != NULL:
        t.few = min(t.few, ROWS_PICKED)
        t.together = ROWS_PICKED if t.C >= WIDE else min(t.together, ROWS_PICKED)


cdef Py_ssize_t even_block(Task* t, Py_ssize_t most) noexcept nogil:
    """Columns or channels in a block: about so many at most, and the same work for all threads."""
    cdef Py_ssize_t units = t.G * (t.chunks if t.split else 1)
    # Vectors are not divided, and groups only where the chunks of all are shared.
    cdef Py_ssize_t whole = 16 if t.inside else 1 if t.split else t.pool
    cdef Py_ssize_t blocks = max(ceil_div(t.threads * (4 if t.shared else 1), units),
                                 ceil_div(t.C, max(most, whole)))
    if not t.split:
        blocks = ceil_div(blocks, t.threads) * t.threads
    if t.fold > 1 or t.inside and not t.split:
        return t.C
    return min(ceil_div(ceil_div(t.C, blocks), whole) * whole, t.C)


cdef char* take(char** free, Py_ssize_t size) noexcept nogil:
    cdef char* taken = free[0]
    free[0] += ceil_div(size, LINE) * LINE
    return taken


cdef Py_ssize_t rows_of_sums(Task* t) noexcept nogil:
    """Float64 tables between the passes: shift, unit, total and the two sums of each chunk that is
    kept; what total lost, and moments of channels that are pooled."""
    if t.reduce == NO_REDUCE:
        return 0
    return 4 + 2 * t.kept + (2 if t.kept < most_chunks(t) else 0) + (2 if t.pool > 1 else 0)


cdef Py_ssize_t most_chunks(Task* t) noexcept nogil:
    return max(t.chunks, t.group_chunks)


cdef Py_ssize_t owners_of(Task* t) noexcept nogil:
    """How many tables there are at a time."""
    return t.G if t.split else t.threads


cdef int set_scratch(Task* t, char** memory) except -1 nogil:
    """The tables between the passes."""
    cdef Py_ssize_t owners = owners_of(t)
    cdef Py_ssize_t table = owners * sums_pitch(t) * sizeof(double)
    cdef Py_ssize_t packed = owners * t.pitch * PACKED * t.real_bytes
    cdef Py_ssize_t reducing = 0 if t.reduce == NO_REDUCE else 1
    cdef Py_ssize_t samples = columns_of_samples(t)
    cdef char* free
    if t.prepared != NULL and t.fold == 1:
        t.packed = t.prepared
        return 0
    memory[0] = <char*> PyMem_RawMalloc(rows_of_sums(t) * table + packed + 3 * samples
                                        + reducing * t.G * sizeof(Py_ssize_t) + owners + 12 * LINE)
    if memory[0] == NULL:
        raise MemoryError("fastbn: no memory for the tables of sums")
    free = memory[0] + (-<size_t> memory[0] & (LINE - 1))
    t.shift = <double*> take(&free, reducing * table)
    t.unit = <double*> take(&free, reducing * table)
    t.total = <double*> take(&free, reducing * 2 * table)
    t.each = <double*> take(&free, reducing * (2 * table if t.pool > 1 and not t.grouped else 0))
    t.lost = <double*> take(&free, reducing * (2 * table if t.kept < most_chunks(t) else 0))
    t.partial = <double*> take(&free, reducing * 2 * t.kept * table)
    if most_chunks(t) == 1 and t.fold == 1:
        t.total = t.partial     # the sums of one chunk are those of all
    t.packed = take(&free, packed)
    if t.prepared == NULL:
        t.extreme = <unsigned char*> take(&free, owners)
        memset(t.extreme, 0, owners)
    t.starts = <Py_ssize_t*> take(&free, reducing * t.G * sizeof(Py_ssize_t))
    t.samples = <unsigned short*> take(&free, samples * sizeof(short))
    t.numbers = <unsigned char*> take(&free, samples)
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
        # There is such a place: the count is more than 0.
        while mask[place] == 0 or (each > 0 and t.weights[g * t.weights_g + place // each] == 0):
            place += 1
        t.starts[g] = place


cdef Py_ssize_t columns_of_samples(Task* t) noexcept nogil:
    """Of a row and of what vectors reach of the next one, where a mask asks whose they are."""
    return t.pitch + LANES if t.mask != NULL and t.inside else 0


cdef void set_samples(Task* t) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(columns_of_samples(t)):
        t.samples[c] = <unsigned short> (c // t.channels)
        t.numbers[c] = <unsigned char> (c // t.channels)


# ---- What follows in memory, as one: no bit depends on it ----

cdef enum:
    OPERANDS = 6
    TABLES = 11

cdef void list_operands(Task* t, Operand** operands) noexcept nogil:
    cdef Operand* every[OPERANDS]
    every[:] = [&t.x, &t.dy, &t.out, &t.residual, &t.y, &t.dresidual]
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
    cdef bint joins = t.reduce == NO_REDUCE and not t.inside and t.channels == 1 and t.G == 1
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
    """The table as of one run, whose channels are those of all runs; whether there is such a one."""
    cdef Py_ssize_t entries = channels // max(table.pool, 1)
    if table.data == NULL or table.g == entries * table.c:
        return True
    table.period = entries
    return table.g == 0 and table.pool <= 1


cdef void join_runs(Task* t) noexcept nogil:
    """Runs of one sample, whose memory is that of one run with the channels of all: the small step
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
        set_shape(&joined, 1, 1, t.G * t.channels, t.S, t.inside)
        joined.pool = t.pool
        t[0] = joined


cdef bint is_single(const Task* t) noexcept nogil:
    """Whether a channel of a run is a single value."""
    return t.N * t.S == 1 and t.fold == 1


cdef void take_values(Task* t, int element) noexcept nogil:
    """A forward of one value a channel: that is its mean, and its variance the 0 that fresh tables
    hold, if all are finite; what is left is a map."""
    cdef Py_ssize_t c
    cdef bint fits = t.G == 1 and t.inside and is_single(t) and t.pool == 1 and t.mask == NULL
    cdef int finite = 1
    cdef double* mean = <double*> t.first.data
    fits = fits and t.reduce == MOMENTS and t.map == AFFINE and (element == F32 or element == F64)
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


# ---- In parts: the tables of a wide array with few values a channel would outgrow it ----

cdef Py_ssize_t table_bytes(Task* t) noexcept nogil:
    """Of a channel."""
    return rows_of_sums(t) * <Py_ssize_t> sizeof(double) + PACKED * t.real_bytes


cdef Py_ssize_t limit_of(Task* t) noexcept nogil:
    """What all tables together may take: what verbs leave, which of one run make few."""
    cdef Py_ssize_t both = max(tuning.scratch, bytes_of(t) // scratch_part)
    cdef Py_ssize_t calls = <Py_ssize_t> (both * calls_share)
    if t.G == 1 and t.period == 0:
        calls = min(calls, t.channels * call_bytes)
    return both - calls


cdef Py_ssize_t calls_limit(Task* t) noexcept nogil:
    """What those of a verb may: above it verbs work in parts."""
    return <Py_ssize_t> (max(scratch, bytes_of(t) // scratch_part) * calls_share)


cdef Py_ssize_t channels_at_once(Task* t) noexcept nogil:
    """How many channels' tables are in memory at a time: all, or equal parts of whole vectors.

    The verbs have a share of the limits as well, where they make tables of their own.
    """
    cdef Py_ssize_t most = max(limit_of(t) // table_bytes(t) // LANES, 1) * LANES
    if t.C <= most or t.fold > 1 or t.pool > 1 or t.period > 0 or t.prepared != NULL:
        return max(most, t.C)
    return ceil_div(t.C, ceil_div(t.C, most) * LANES) * LANES


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
    if owners_of(t) * t.pitch * table_bytes(t) <= limit_of(t):
        return run_part(t, run, threads)
    t.kept = most_chunks(t)     # some parts may be shared by all threads
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


# ---- Arrays ----

cdef enum Element:
    F32, F64, F16, BF16, NO_ELEMENT

ELEMENTS = ("f32", "f64", "f16", "bf16")
"""The names of the element types, in the order of `Element`."""

cdef int bfloat16_type = -1     # the number that NumPy gave to the last one seen


cdef int element_of(object a):
    """The element type of an array; bfloat16 is whatever has that name."""
    global bfloat16_type
    cdef int kind = cnp.PyArray_TYPE(a)
    if kind == cnp.NPY_FLOAT32:
        return F32
    if kind == cnp.NPY_FLOAT64:
        return F64
    if kind == cnp.NPY_FLOAT16:
        return F16
    if kind != bfloat16_type and cnp.PyTypeNum_ISUSERDEF(kind) and is_bfloat16(a.dtype):
        bfloat16_type = kind
    return BF16 if kind == bfloat16_type else NO_ELEMENT


cdef void set_element(Task* t, int element) noexcept nogil:
    t.itemsize = 8 if element == F64 else 4 if element == F32 else 2
    t.real_bytes = 8 if element == F64 else 4


cdef Operand operand(Task* t, cnp.ndarray a) noexcept:
    """A (G, N, C, S) array of the task's shape; folded rows are dense, one after the other."""
    cdef Operand o
    cdef Py_ssize_t itemsize = cnp.PyArray_ITEMSIZE(a)
    o.data = <char*> cnp.PyArray_DATA(a)
    o.g = cnp.PyArray_STRIDE(a, 0) // itemsize
    o.n = t.C if t.fold > 1 else cnp.PyArray_STRIDE(a, 1) // itemsize
    o.c = cnp.PyArray_STRIDE(a, 2) // itemsize
    return o


cdef Operand dense(Task* t, cnp.ndarray a) noexcept:
    """A contiguous array."""
    cdef Operand o
    o.data = <char*> cnp.PyArray_DATA(a)
    o.g = (t.N * t.C + t.tail) * t.S
    o.n = t.C * t.S
    o.c = t.S
    return o


cdef Table table(cnp.ndarray a) noexcept:
    """A (G, C) float64 array, or a vector (C,) of either type for all runs."""
    cdef Table result
    cdef int last = cnp.PyArray_NDIM(a) - 1
    result.data = <char*> cnp.PyArray_DATA(a)
    result.g = cnp.PyArray_STRIDE(a, 0) if last == 1 else 0
    result.c = cnp.PyArray_STRIDE(a, last)
    result.pool = result.period = result.phase = 0
    result.single = cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT32
    return result


cdef cnp.ndarray new_vector(Py_ssize_t C, int element, bint zero=False):
    cdef cnp.npy_intp length = C
    if zero:
        return cnp.PyArray_ZEROS(1, &length, element, 0)
    return cnp.PyArray_EMPTY(1, &length, element, 0)


cdef cnp.ndarray new_table(Task* t, Py_ssize_t pool, bint zero=False):
    cdef cnp.npy_intp[2] shape
    shape[0], shape[1] = t.G, t.channels // pool
    if zero:
        return cnp.PyArray_ZEROS(2, shape, cnp.NPY_FLOAT64, 0)
    return cnp.PyArray_EMPTY(2, shape, cnp.NPY_FLOAT64, 0)


# ---- What is plain: None of these says why something is not; that is for checks.py ----

cdef bint set_plain_shape(Task* t, object x, object layout):
    """Whether x is a contiguous, native array that is not empty, of a known layout."""
    cdef int ndim, i
    cdef Py_ssize_t C, outer = 1, inner = 1
    if not cnp.PyArray_CheckExact(x) or not cnp.PyArray_ISCARRAY_RO(<cnp.ndarray> x):
        return False
    if element_of(x) == NO_ELEMENT:
        return False
    ndim = cnp.PyArray_NDIM(x)
    if ndim < 2 or cnp.PyArray_SIZE(x) == 0:
        return False
    if not isinstance(layout, str):
        return False
    if layout == "NCHW":
        C = cnp.PyArray_DIM(x, 1)
        outer = cnp.PyArray_DIM(x, 0)
        for i in range(2, ndim):
            inner *= cnp.PyArray_DIM(x, i)
    elif layout == "NHWC":
        C = cnp.PyArray_DIM(x, ndim - 1)
        for i in range(ndim - 1):
            outer *= cnp.PyArray_DIM(x, i)
    else:
        return False
    if C == 1 and inner < short_plane:
        outer, inner = 1, outer * inner
    set_shape(t, 1, outer, C, inner, inner == 1)
    return True


cdef object set_plain_samples(Task* t, object x, object layout, object sharing):
    """A plain shape with some samples as a run, or as rows: the shape of a table of what shares
    statistics. None where tables of all rows would not be small."""
    cdef Py_ssize_t N, C, S, G, groups, pool, samples
    if not set_plain_shape(t, x, layout):
        return None
    set_element(t, element_of(x))
    N, C = cnp.PyArray_DIM(x, 0), t.channels
    S = cnp.PyArray_SIZE(x) // (N * C)
    shared = sharing(N, C)
    if shared is None:
        return None
    groups, pool, shape, samples = shared
    G = N // samples
    if samples * S == 1 and are_rows(groups, pool):
        if N * groups * row_bytes > calls_limit(t):
            return None
        set_shape(t, 1, 1, N * groups, pool, False)
        t.period = groups
        return shape
    if C == 1 and (layout == "NHWC" or S < short_plane):
        set_shape(t, G, 1, 1, samples * S, samples * S == 1)
    elif S == 1 or layout == "NHWC":
        set_shape(t, G, samples * S, C, 1, is_inside(samples * S, 1, pool))
    else:
        set_shape(t, G, samples, C, S, False)
    t.pool = pool
    return shape


cdef Table sample_table(Task* t, cnp.ndarray a) noexcept:
    """Contiguous statistics of samples, as a (G, C / pool) table."""
    cdef Table result = table(a)
    result.g, result.c = t.channels // t.pool * <Py_ssize_t> sizeof(double), sizeof(double)
    result.pool = t.pool
    return result


cdef bint are_statistics(object a, tuple shape):
    """Whether these are contiguous, native float64 statistics of that shape."""
    cdef int i
    if not cnp.PyArray_CheckExact(a) or cnp.PyArray_NDIM(a) != len(shape):
        return False
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) != shape[i]:
            return False
    return cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT64 and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray> a)


cdef Py_ssize_t parameters_of(Task* t) noexcept:
    """How many values gamma and beta have."""
    return t.period * t.S if t.period > 0 else t.channels


cdef cnp.ndarray at_line(cnp.ndarray flat):
    """From the first cache line that it holds on: a vector of it is in no more lines than it must."""
    cdef Py_ssize_t before = -<size_t> cnp.PyArray_DATA(flat) & (LINE - 1)
    return flat[before // cnp.PyArray_ITEMSIZE(flat) :]


cdef cnp.ndarray new_columns(Task* t, object gamma, object beta, int element):
    """gamma and beta by column, (2, P, places), with room for a vector behind the end of each row."""
    cdef cnp.npy_intp places = pitch_of(t.S), size = 2 * t.period * places + LINE
    cdef cnp.ndarray columns = at_line(cnp.PyArray_ZEROS(1, &size, element, 0))
    columns = columns[: size - LINE].reshape(2, t.period, places)
    fill_columns(t, columns, 0, gamma, 1)
    fill_columns(t, columns, 1, beta, 0)
    return columns


cdef int fill_columns(Task* t, cnp.ndarray columns, Py_ssize_t which, object v,
                      double default) except -1:
    """One of the two, rounded to the columns' type."""
    cdef Py_ssize_t places = cnp.PyArray_DIM(columns, 2), p, s
    cdef Py_ssize_t at = which * t.period * places
    cdef void* to = cnp.PyArray_DATA(columns)
    cdef bint single = cnp.PyArray_TYPE(columns) == cnp.NPY_FLOAT32
    cdef cnp.ndarray wide
    cdef const double* values = &default
    cdef Py_ssize_t step = 0
    if v is not None:
        wide = cnp.PyArray_Cast(v, cnp.NPY_FLOAT64)
        values, step = <const double*> cnp.PyArray_DATA(wide), 1
    for p in range(t.period):
        for s in range(t.S):
            if single:
                (<float*> to)[at + p * places + s] = <float> values[0]
            else:
                (<double*> to)[at + p * places + s] = values[0]
            values += step
    return 0


cdef bint fits(Task* t, object v):
    """Whether v is a native (C,) array of float32 or float64."""
    return (cnp.PyArray_CheckExact(v) and cnp.PyArray_NDIM(v) == 1
            and cnp.PyArray_DIM(v, 0) == parameters_of(t)
            and cnp.PyArray_ISBEHAVED_RO(<cnp.ndarray> v)
            and (cnp.PyArray_TYPE(v) == cnp.NPY_FLOAT32 or cnp.PyArray_TYPE(v) == cnp.NPY_FLOAT64))


cdef bint is_like(object a, object x):
    """Whether a is a contiguous native array of x's shape and type."""
    return (cnp.PyArray_CheckExact(a) and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray> a)
            and cnp.PyArray_TYPE(a) == cnp.PyArray_TYPE(x) and cnp.PyArray_SAMESHAPE(a, x))


cdef bint is_valid_variance(Task* t, bint nan):
    """Whether no variance is negative or, unless allowed, NaN."""
    cdef Py_ssize_t g, entries = t.channels // t.pool
    cdef bint valid = True
    for g in range(t.G):
        if t.var.single:
            valid &= are_variances(<float*> (t.var.data + g * t.var.g), entries,
                                   t.var.c // <Py_ssize_t> sizeof(float), nan)
        else:
            valid &= are_variances(<double*> (t.var.data + g * t.var.g), entries,
                                   t.var.c // <Py_ssize_t> sizeof(double), nan)
    return valid


cdef bint are_variances(const floating* var, Py_ssize_t entries, Py_ssize_t step,
                        bint nan) noexcept nogil:
    cdef Py_ssize_t c
    cdef int valid = 1
    if step == 1:
        for c in range(entries):
            valid &= (var[c] >= 0) | (nan & (var[c] != var[c]))
    else:
        for c in range(entries):
            valid &= (var[c * step] >= 0) | (nan & (var[c * step] != var[c * step]))
    return valid


cdef bint is_valid_eps(object eps):
    return type(eps) is float and 0 <= <double> eps and isfinite(<double> eps)


cdef bint apart(object out, object a):
    """Whether the contiguous `out` and an array behind any strides lie apart."""
    cdef char* first = <char*> cnp.PyArray_DATA(a)
    cdef char* last = first
    cdef Py_ssize_t step
    cdef int i
    for i in range(cnp.PyArray_NDIM(a)):
        step = (cnp.PyArray_DIM(a, i) - 1) * cnp.PyArray_STRIDE(a, i)
        if step < 0:
            first += step
        else:
            last += step
    return (last + cnp.PyArray_ITEMSIZE(a) <= <char*> cnp.PyArray_DATA(out)
            or <char*> cnp.PyArray_DATA(out) + cnp.PyArray_NBYTES(out) <= first)


cdef bint is_plain_out(object out, object x):
    """Whether `out` is like x, and writeable."""
    return is_like(out, x) and cnp.PyArray_ISCARRAY(<cnp.ndarray> out)


cdef bint in_place_or_apart(object out, object a):
    return a is None or cnp.PyArray_DATA(out) == cnp.PyArray_DATA(a) or apart(out, a)


cdef bint all_apart(object out, object mean, object var, object gamma, object beta):
    cdef object vector
    for vector in (mean, var, gamma, beta):
        if vector is not None and not apart(out, vector):
            return False
    return True


cdef cnp.ndarray empty_like(object x):
    return cnp.PyArray_EMPTY(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), cnp.PyArray_TYPE(x), 0)


cdef bint set_activation(Task* t, object activation):
    """The activation, by its public name."""
    if activation is None:
        t.slope, t.top = 1, INFINITY
        return True
    known = activations.of(activation)
    if known is None:
        return False
    t.slope, t.top = known
    return True


cdef bint set_residual(Task* t, object residual, object x):
    if residual is None:
        return True
    if not is_like(residual, x):
        return False
    t.residual = dense(t, residual)
    return True


cdef bint set_gate(Task* t, object activation, object y, object dy):
    """The activation, and the y that it needs. Without one only where y lies is asked, which
    outputs are compared with: any array like dy will do, and Python ignores all else."""
    if not set_activation(t, activation):
        return False
    if activation is None:
        return y is None or is_like(y, dy)
    if y is None or not is_like(y, dy):
        return False
    t.y = dense(t, y)
    return True


# ---- Running ----

cdef class Engine:
    """The kernels of one instruction set, for every element type."""

    cdef readonly str isa
    cdef Run[4] runs
    cdef object modules

    def __init__(self, isa, modules):
        self.isa = isa
        self.modules = modules
        for i, module in enumerate(modules):
            self.runs[i] = <Run> PyCapsule_GetPointer(module.api, "fastbn.run")

    def calls(self):
        """How often kernels of this instruction set have run."""
        return sum(module.calls() for module in self.modules)

    cdef int go(self, Task* t, cnp.ndarray x, int threads) except -1:
        """Cut into chunks and parts, schedule, run: on what other calls in flight leave."""
        cdef int element = element_of(x), calls
        with nogil:
            set_element(t, element)
            join_planes(t)
            join_runs(t)
            take_values(t, element)
            set_chunks(t)
            set_groups(t)
            calls = enter_call()
            try:
                run_parts(t, self.runs[element], max(1, threads // calls))
            finally:
                leave_call()
        return 0

    cdef tuple with_tables(self, Task* t, cnp.ndarray x, int threads, Py_ssize_t pool=1):
        """Run with fresh (G, C / pool) tables for the results, and return them."""
        cdef cnp.ndarray first = new_table(t, pool)
        cdef cnp.ndarray second = new_table(t, pool, is_single(t))
        t.first, t.second = table(first), table(second)
        t.first.pool = t.second.pool = pool
        self.go(t, x, threads)
        return first, second

    cdef cnp.ndarray go_back_by_column(self, Task* t, cnp.ndarray x, object gamma, int threads):
        """Run, and give the sums of columns, (2, P, S)."""
        cdef cnp.npy_intp size
        cdef cnp.ndarray sums, columns, doubles
        columns = new_columns(t, gamma, None, arithmetic_type(t))
        doubles = new_columns(t, gamma, None, cnp.NPY_FLOAT64)
        set_columns(t, columns)
        t.gamma_wide = <const double*> cnp.PyArray_DATA(doubles)
        t.deep = depth(t.period, t.S, t.C)
        size = ceil_div(t.C, t.deep) * 2 * t.period * t.places + LINE
        sums = at_line(cnp.PyArray_EMPTY(1, &size, cnp.NPY_FLOAT64, 0))
        t.column_sums = <double*> cnp.PyArray_DATA(sums)
        self.go(t, x, threads)
        sums = sums[: 2 * t.period * t.places].reshape(2, t.period, t.places)
        return sums[:, :, : t.S]

    cdef tuple sum_runs(self, Task* t, cnp.ndarray x, int threads):
        """Run, some runs and channels at a time, whose tables of sums are small, and add up the sums
        of all runs, one after the other."""
        cdef Py_ssize_t limit = calls_limit(t) // sum_bytes, C, G, g, c = 0
        cdef cnp.ndarray first = new_vector(t.channels, cnp.NPY_FLOAT64, True)
        cdef cnp.ndarray second = new_vector(t.channels, cnp.NPY_FLOAT64, True)
        cdef cnp.ndarray firsts, seconds
        cdef Task part
        C = t.C if t.fold > 1 or t.pool > 1 else min(max(limit // LANES, 1) * LANES, t.C)
        G = max(limit // C, 1)
        while c < t.C:
            g = 0
            while g < t.G:
                part = part_of(t, g, min(G, t.G - g), c, min(C, t.C - c))
                firsts, seconds = self.with_tables(&part, x, threads)
                add_runs(first, firsts, c)
                add_runs(second, seconds, c)
                g += G
            c += C
        return first, second

    # The functions of a backend

    def moments(self, cnp.ndarray x, int threads, selection):
        cdef Task t = new_task(x, MOMENTS, NO_MAP, selection)
        t.x = operand(&t, x)
        return self.with_tables(&t, x, threads)

    def normalize(self, cnp.ndarray x, affine, cnp.ndarray out, int threads, tail, selection):
        cdef Task t = new_task(x, NO_REDUCE, AFFINE, selection)
        t.x, t.out = operand(&t, x), operand(&t, out)
        t.mean, t.gamma, t.beta = table(affine.mean), table(affine.scale), table(affine.beta)
        fuse_tail(&t, tail)
        self.go(&t, x, threads)

    def gradient_moments(self, cnp.ndarray dy, cnp.ndarray x, cnp.ndarray mean, int threads, gate,
                         selection):
        cdef Task t = new_task(x, GRADIENT_MOMENTS, NO_MAP, selection)
        t.x, t.dy = operand(&t, x), operand(&t, dy)
        t.mean = table(mean)
        fuse_gate(&t, gate, False)
        sum_dy_centred, sum_dy = self.with_tables(&t, x, threads)
        return sum_dy, sum_dy_centred

    def input_gradient(self, cnp.ndarray dy, x, coefficients, cnp.ndarray out, int threads, gate,
                       selection):
        cdef Task t = new_task(dy, NO_REDUCE, AFFINE if x is None else INPUT_GRADIENT, selection)
        t.dy, t.out = operand(&t, dy), operand(&t, out)
        if x is None:
            t.gamma = table(coefficients.a)
        else:
            t.x = operand(&t, x)
            t.a, t.b = table(coefficients.a), table(coefficients.b)
            t.dy_mean = table(coefficients.dy_mean)
            if coefficients.rest is not None:
                t.rest = table(coefficients.rest)
            t.mean, t.rstd = table(coefficients.mean), table(coefficients.rstd)
        fuse_gate(&t, gate, True)
        self.go(&t, dy, threads)

    def forward(self, cnp.ndarray x, cnp.ndarray gamma, cnp.ndarray beta, double eps,
                cnp.ndarray out, int threads, tail, selection, Py_ssize_t pool):
        cdef Task t = new_task(x, MOMENTS, AFFINE, selection, pool)
        t.x, t.out = operand(&t, x), operand(&t, out)
        t.gamma, t.beta, t.eps = table(gamma), table(beta), eps
        fuse_tail(&t, tail)
        return self.with_tables(&t, x, threads, pool)

    def backward(self, cnp.ndarray dy, cnp.ndarray x, cnp.ndarray mean, cnp.ndarray var,
                 cnp.ndarray gamma, double eps, bint frozen, cnp.ndarray out, int threads, gate,
                 selection, Py_ssize_t pool):
        cdef Map map = AFFINE if frozen else INPUT_GRADIENT
        cdef Task t = new_task(x, GRADIENT_MOMENTS, map, selection, pool)
        t.x, t.dy, t.out = operand(&t, x), operand(&t, dy), operand(&t, out)
        t.mean, t.var, t.gamma, t.eps = table(mean), table(var), table(gamma), eps
        t.mean.pool = t.var.pool = pool
        fuse_gate(&t, gate, True)
        return self.with_tables(&t, x, threads)

    # Rows, by column: gamma and beta are contiguous (P, S) tables

    def forward_rows(self, cnp.ndarray x, cnp.ndarray gamma, cnp.ndarray beta, double eps,
                     cnp.ndarray out, int threads, tail):
        cdef Task t = new_row_task(x, gamma, MOMENTS, AFFINE)
        t.x, t.out, t.eps = operand(&t, x), operand(&t, out), eps
        columns = new_columns(&t, gamma, beta, arithmetic_type(&t))
        set_columns(&t, columns)
        fuse_tail(&t, tail)
        return self.with_tables(&t, x, threads)

    def backward_rows(self, cnp.ndarray dy, cnp.ndarray x, cnp.ndarray mean, cnp.ndarray var,
                      cnp.ndarray gamma, double eps, cnp.ndarray out, int threads, gate):
        """Gives the sums of columns as (2, P, S)."""
        cdef Task t = new_row_task(x, gamma, GRADIENT_MOMENTS, INPUT_GRADIENT)
        t.x, t.dy, t.out = operand(&t, x), operand(&t, dy), operand(&t, out)
        t.mean, t.var, t.eps = table(mean), table(var), eps
        fuse_gate(&t, gate, True)
        return self.go_back_by_column(&t, x, gamma, threads)

    # The plain entries

    def plain_moments(self, x, layout, int threads):
        cdef Task t
        cdef cnp.ndarray mean, var
        memset(&t, 0, sizeof(Task))
        if not set_plain_shape(&t, x, layout):
            return None
        t.reduce, t.map = MOMENTS, NO_MAP
        t.x = dense(&t, x)
        mean = new_vector(t.channels, cnp.NPY_FLOAT64)
        var = new_vector(t.channels, cnp.NPY_FLOAT64, is_single(&t))
        t.first, t.second = table(mean), table(var)
        self.go(&t, x, threads)
        return mean, var

    def plain_batch_norm(self, x, gamma, beta, eps, layout, activation, residual, out,
                         int threads):
        cdef Task t
        cdef cnp.ndarray mean, var
        memset(&t, 0, sizeof(Task))
        if not set_plain_shape(&t, x, layout):
            return None
        out = set_plain_forward(&t, x, gamma, beta, eps, activation, residual, out)
        if out is None:
            return None
        mean = new_vector(t.channels, cnp.NPY_FLOAT64)
        var = new_vector(t.channels, cnp.NPY_FLOAT64, is_single(&t))
        t.first, t.second = table(mean), table(var)
        self.go(&t, x, threads)
        return out, mean, var

    def plain_samples(self, x, sharing, gamma, beta, eps, layout, activation, residual, out,
                      int threads):
        cdef Task t
        memset(&t, 0, sizeof(Task))
        shape = set_plain_samples(&t, x, layout, sharing)
        if shape is None:
            return None
        out = set_plain_forward(&t, x, gamma, beta, eps, activation, residual, out)
        if out is None:
            return None
        if t.period > 0:
            columns = new_columns(&t, gamma, beta, arithmetic_type(&t))
            set_columns(&t, columns)
        mean, var = self.with_tables(&t, x, threads, t.pool)
        return out, mean.reshape(shape), var.reshape(shape)

    def plain_normalize(self, x, mean, var, gamma, beta, eps, layout, activation, residual, out,
                        int threads):
        cdef Task t
        memset(&t, 0, sizeof(Task))
        if not set_plain_shape(&t, x, layout) or not is_valid_eps(eps):
            return None
        if not fits(&t, mean) or not fits(&t, var):
            return None
        if not (gamma is None or fits(&t, gamma)) or not (beta is None or fits(&t, beta)):
            return None
        t.mean, t.var = table(mean), table(var)
        if not is_valid_variance(&t, False):
            return None
        if not set_activation(&t, activation) or not set_residual(&t, residual, x):
            return None
        if out is None:
            out = empty_like(x)
        elif not (is_plain_out(out, x) and in_place_or_apart(out, x)
                  and in_place_or_apart(out, residual) and all_apart(out, mean, var, gamma, beta)):
            return None
        t.reduce, t.map, t.eps = NO_REDUCE, AFFINE, eps
        t.x, t.out = dense(&t, x), dense(&t, out)
        set_parameters(&t, gamma, beta)
        self.go(&t, x, threads)
        return out

    def frozen(self, affine, str layout, activation):
        """The plain entry of a frozen batch norm."""
        cdef Frozen made = Frozen(self, len(affine.mean), layout, activation)
        cdef Task t
        cdef Run run
        memset(&t, 0, sizeof(Task))
        t.G, t.C, t.channels, t.fold, t.S, t.inside = 1, made.channels, made.channels, 1, 1, True
        t.reduce, t.map, t.slope = NO_REDUCE, AFFINE, 1
        t.split, t.threads, t.block, t.map_block = True, 1, t.C, t.C
        t.stream = True     # calls that stream read behind the end
        t.mean, t.gamma, t.beta = table(affine.mean), table(affine.scale), table(affine.beta)
        set_pitch(&t)
        # The packed coefficients are what a call without samples leaves in its scratch.
        if t.C > 0:
            t.packed, t.extreme, run = made.single, made.extreme, self.runs[<int> F32]
            run(&t)
            t.packed, t.extreme, run = made.double, made.extreme + 1, self.runs[<int> F64]
            run(&t)
        return made.normalize

    def plain_backward(self, dy, x, mean, var, gamma, eps, layout, params, activation, y, dresidual,
                       bint frozen, out, int threads):
        cdef Task t
        cdef cnp.ndarray dgamma, dbeta
        cdef int element
        memset(&t, 0, sizeof(Task))
        cdef bint lone = frozen and params is False
        if not set_plain_shape(&t, dy, layout) or not (params is True or params is False):
            return None
        if not fits(&t, mean) or not fits(&t, var):
            return None
        t.mean, t.var = table(mean), table(var)
        if not frozen and (t.mean.single or t.var.single):
            return None
        results = set_plain_backward(&t, dy, x, mean, var, gamma, eps, activation, y, dresidual,
                                     frozen, lone, out)
        if results is None:
            return None
        out, dresidual = results
        if not lone:
            element = gradient_type(dy if gamma is None else gamma)
            dgamma, dbeta = new_vector(t.channels, element), new_vector(t.channels, element)
            t.first, t.second = table(dgamma), table(dbeta)
        self.go(&t, dy, threads)
        if params is False:
            return out, None, None, dresidual
        return out, dgamma, dbeta, dresidual

    def plain_samples_backward(self, dy, x, sharing, mean, var, gamma, eps, layout, params,
                               activation, y, dresidual, out, int threads):
        cdef Task t
        cdef int element
        memset(&t, 0, sizeof(Task))
        shape = set_plain_samples(&t, x, layout, sharing)
        if shape is None or not is_like(dy, x) or not (params is True or params is False):
            return None
        if not are_statistics(mean, shape) or not are_statistics(var, shape):
            return None
        if t.period == 0 and t.G > 1 and not may_cut_sums(&t):
            return None
        t.mean, t.var = sample_table(&t, mean), sample_table(&t, var)
        results = set_plain_backward(&t, dy, x, mean, var, gamma, eps, activation, y, dresidual,
                                     False, False, out)
        if results is None:
            return None
        out, dresidual = results
        if t.period > 0:
            sums = self.go_back_by_column(&t, x, gamma, threads).reshape(2, -1)
        else:
            sums = self.sum_runs(&t, x, threads)
        if not params:
            return out, None, None, dresidual
        element = gradient_type(dy if gamma is None else gamma)
        return out, rounded(sums[0], element), rounded(sums[1], element), dresidual


cdef object set_plain_forward(Task* t, object x, object gamma, object beta, object eps,
                              object activation, object residual, object out):
    """A training forward on a shape that is set: its output, or None."""
    if not is_valid_eps(eps):
        return None
    if not (gamma is None or fits(t, gamma)) or not (beta is None or fits(t, beta)):
        return None
    if not set_activation(t, activation) or not set_residual(t, residual, x):
        return None
    if out is None:
        out = empty_like(x)
    elif not (is_plain_out(out, x) and in_place_or_apart(out, x)
              and in_place_or_apart(out, residual) and all_apart(out, None, None, gamma, beta)):
        return None
    t.reduce, t.map, t.eps = MOMENTS, AFFINE, eps
    t.x, t.out = dense(t, x), dense(t, out)
    set_parameters(t, gamma, beta)
    return out


cdef tuple set_plain_backward(Task* t, object dy, object x, object mean, object var, object gamma,
                              object eps, object activation, object y, object dresidual,
                              bint frozen, bint lone, object out):
    """A backward on dy's shape, which is set, by statistics that are: dx and dresidual, or None.
    `lone` is that of dx alone by fixed statistics."""
    if not is_valid_eps(eps) or not (gamma is None or fits(t, gamma)):
        return None
    if not (lone and x is None) and not is_like(x, dy):
        return None
    if not is_valid_variance(t, not frozen) or not set_gate(t, activation, y, dy):
        return None
    if dresidual is True:
        dresidual = empty_like(dy)
    elif dresidual is False:
        dresidual = None
    elif not (is_plain_out(dresidual, dy) and in_place_or_apart(dresidual, dy)
              and (x is None or apart(dresidual, x)) and (y is None or apart(dresidual, y))
              and all_apart(dresidual, mean, var, gamma, None)):
        return None
    if out is None:
        out = empty_like(dy)
    elif not (is_plain_out(out, dy) and in_place_or_apart(out, dy) and in_place_or_apart(out, x)
              and all_apart(out, mean, var, gamma, y)
              and (dresidual is None or apart(out, dresidual))):
        return None
    t.reduce = NO_REDUCE if lone else GRADIENT_MOMENTS
    t.map = AFFINE if frozen else INPUT_GRADIENT
    t.eps = eps
    t.dy, t.out = dense(t, dy), dense(t, out)
    set_parameters(t, gamma, None)
    if lone:
        memset(&t.mean, 0, sizeof(Table))   # dy is not centred
    else:
        t.x = dense(t, x)
    if dresidual is not None:
        keep_dresidual(t, dense(t, dresidual))
    return out, dresidual


cdef bint may_cut_sums(Task* t) noexcept:
    """Whether the sums of a run may be taken some channels at a time, or need not."""
    return t.fold == 1 and t.pool == 1 or t.channels * sum_bytes <= calls_limit(t)


cdef void add_runs(cnp.ndarray totals, cnp.ndarray sums, Py_ssize_t first):
    """Add the sums of some runs, (G, C) and dense, to those of channels from the first on."""
    cdef Py_ssize_t G = cnp.PyArray_DIM(sums, 0), C = cnp.PyArray_DIM(sums, 1), g, c
    cdef double* total = <double*> cnp.PyArray_DATA(totals) + first
    cdef const double* sum = <double*> cnp.PyArray_DATA(sums)
    for g in range(G):
        for c in range(C):
            total[c] += sum[g * C + c]


cdef cnp.ndarray rounded(cnp.ndarray sums, int element):
    """A new vector in a parameter's type of float64 sums; beyond it infinite, without a warning."""
    cdef Py_ssize_t C = cnp.PyArray_DIM(sums, 0), c
    cdef const double* sum = <double*> cnp.PyArray_DATA(sums)
    cdef cnp.ndarray result = new_vector(C, element)
    for c in range(C):
        if element == cnp.NPY_FLOAT64:
            (<double*> cnp.PyArray_DATA(result))[c] = sum[c]
        else:
            (<float*> cnp.PyArray_DATA(result))[c] = <float> sum[c]
    return result


cdef int arithmetic_type(Task* t) noexcept:
    return cnp.NPY_FLOAT64 if t.real_bytes == 8 else cnp.NPY_FLOAT32


cdef int gradient_type(object a):
    """The type of a parameter's gradient, by the parameter or else dy."""
    return cnp.NPY_FLOAT64 if cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT64 else cnp.NPY_FLOAT32


cdef void keep_dresidual(Task* t, Operand dresidual) noexcept:
    """Store the gated dy; where nothing gates it, dy is its own gate."""
    t.dresidual = dresidual
    if t.y.data == NULL:
        t.y = t.dy


cdef void fuse_tail(Task* t, object tail):
    t.slope, t.top = 1, INFINITY
    if tail is None:
        return
    t.slope, t.top = tail.activation
    if tail.residual is not None:
        t.residual = operand(t, tail.residual)


cdef void fuse_gate(Task* t, object gate, bint maps):
    """What gates dy and, in a map, where that is stored."""
    t.slope, t.top = 1, INFINITY
    if gate is None:
        return
    t.slope, t.top = gate.activation
    t.y = operand(t, gate.y)
    if maps and gate.dresidual is not None:
        t.dresidual = operand(t, gate.dresidual)


cdef Task new_task(cnp.ndarray x, int reduce, int map, object selection, Py_ssize_t pool=1):
    """A task on x's (G, N, C, S) shape."""
    cdef Task t
    memset(&t, 0, sizeof(Task))
    set_view(&t, x, pool)
    t.reduce, t.map, t.pool = <Reduce> reduce, <Map> map, pool
    if selection is not None:
        select_places(&t, selection.mask, selection.weights, selection.count)
    return t


cdef Task new_row_task(cnp.ndarray x, cnp.ndarray gamma, int reduce, int map):
    """A task on rows, with as many rows of gamma as there are."""
    cdef Task t = new_task(x, reduce, map, None)
    set_element(&t, element_of(x))
    t.period = cnp.PyArray_DIM(gamma, 0)
    return t


cdef int select_places(Task* t, cnp.ndarray mask, object weights, double count) except -1:
    """Which places count, and how much."""
    t.mask, t.mask_g = <unsigned char*> cnp.PyArray_DATA(mask), cnp.PyArray_STRIDE(mask, 0)
    t.count = count
    if weights is not None:
        t.weights = <double*> cnp.PyArray_DATA(weights)
        t.weights_g = cnp.PyArray_DIM(weights, 1)
        t.weight_samples = cnp.PyArray_DIM(mask, 1) // t.weights_g
    return 0


cdef void set_columns(Task* t, cnp.ndarray columns) noexcept:
    t.columns = <const char*> cnp.PyArray_DATA(columns)
    t.period, t.places = cnp.PyArray_DIM(columns, 1), cnp.PyArray_DIM(columns, 2)


cdef void set_parameters(Task* t, object gamma, object beta):
    if t.period > 0:
        return      # by column
    if gamma is not None:
        t.gamma = table(gamma)
    if beta is not None:
        t.beta = table(beta)


cdef void set_view(Task* t, cnp.ndarray x, Py_ssize_t pool) noexcept:
    """The shape of a (G, N, C, S) array."""
    cdef Py_ssize_t N = cnp.PyArray_DIM(x, 1), S = cnp.PyArray_DIM(x, 3)
    set_shape(t, cnp.PyArray_DIM(x, 0), N, cnp.PyArray_DIM(x, 2), S, is_inside(N, S, pool))


def walks(cnp.ndarray a):
    """Whether a (G, N, C, S) view can be processed where it lies: folded rows must be dense."""
    cdef Task t
    memset(&t, 0, sizeof(Task))
    set_view(&t, a, 1)
    return t.fold == 1 or cnp.PyArray_DIM(a, 1) == 1 \
        or cnp.PyArray_STRIDE(a, 1) == t.channels * cnp.PyArray_ITEMSIZE(a)


cdef class Frozen:
    """A frozen batch norm's packed coefficients, in both types of arithmetic, and all else that its
    calls have in common."""

    cdef Engine engine
    cdef Py_ssize_t channels
    cdef str layout
    cdef double slope, top
    cdef object memory
    cdef char* single
    cdef char* double
    cdef unsigned char[2] extreme   # of these two

    def __init__(self, Engine engine, Py_ssize_t channels, str layout, activation):
        cdef Py_ssize_t bytes_of_reals = 4 * pitch_of(channels) * sizeof(double)
        cdef char* free
        self.engine, self.channels, self.layout = engine, channels, layout
        self.slope, self.top = activation
        self.memory = bytearray(2 * bytes_of_reals + LINE)
        free = self.memory
        self.single = free + (-<size_t> free & (LINE - 1))
        self.double = self.single + bytes_of_reals

    def normalize(self, x, residual, out, int threads):
        cdef Task t
        cdef bint wide
        memset(&t, 0, sizeof(Task))
        if not set_plain_shape(&t, x, self.layout) or t.channels != self.channels:
            return None
        if not set_residual(&t, residual, x):
            return None
        if out is None:
            out = empty_like(x)
        elif not (is_plain_out(out, x) and in_place_or_apart(out, x)
                  and in_place_or_apart(out, residual)):
            return None
        t.slope, t.top = self.slope, self.top
        t.reduce, t.map = NO_REDUCE, AFFINE
        t.x, t.out = dense(&t, x), dense(&t, out)
        wide = cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT64
        t.prepared = self.double if wide else self.single
        t.extreme = self.extreme + wide
        self.engine.go(&t, x, threads)
        return out
