# One call, as the kernels see it: `entry` fills a Task in, the compiled variants run it.

cdef struct Operand:
    # A (G, N, C, S) array; strides count elements. S has stride 1 (planes), or S is 1
    # and C has stride 1 (channels last).
    char* data
    Py_ssize_t g, n, c

cdef struct Table:
    # A (G, C) table of float64 or, where `single`, float32; strides count bytes. NULL data stands
    # for the default that its field names. Of `pool` channels it has one entry together; 0: of
    # each. With a `period`, which is not 0 then, channel c has entry (c + phase) % period.
    char* data
    Py_ssize_t g, c, pool, period, phase
    bint single

cdef extern from "stored.h":
    cdef enum stored:
        STORED_ELEMENT, STORED_UINT8, STORED_INT8, STORED_UINT16, STORED_INT16, STORED_FLOAT16
        STORED_BFLOAT16

cdef struct Frame:
    # An (N, C, S) array of a type of its own; strides count bytes. Values or, `by_rows`, channels
    # are side by side. NULL data: none.
    char* data
    Py_ssize_t n, c, s
    stored type
    Py_ssize_t itemsize
    bint by_rows

cdef enum Reduce:
    NO_REDUCE
    MOMENTS             # sums of (x - shift) and of its square
    GRADIENT_MOMENTS    # sums of dy and of dy * (x - mean)
    INTEGER_SUMS        # sums of integers and of their squares, exactly

cdef enum Map:
    NO_MAP
    AFFINE              # out = (source - mean) * scale + beta; the source is x, or dy if given
    INPUT_GRADIENT      # out = a*(dy - dy_mean) + b*xhat

cdef enum:
    # Bits of `kind`: what a loop does.
    WITH_X = 1              # reads x beside dy: gradient moments, input gradient
    RESIDUAL = 2            # adds the residual to y
    ACTIVATION = 4          # then applies the activation
    ACTIVATION_GRAD = 8     # multiplies dy by the activation's slope at y
    DRESIDUAL = 16          # stores that product, the gradient of the residual
    MASKED = 32             # a mask selects places; weights scale what is summed, and dx's means
    BY_COLUMN = 64          # gamma and beta go by column of a plane (layer norm)
    GENERAL = 128           # extreme coefficients: x and dy are multiplied by x_scale and dy_scale
    KINDS = 256             # one more than the largest kind

cdef struct Task:
    Reduce reduce
    Map map
    # Shape. C counts the columns of a row in memory: `fold` samples of `channels` each,
    # and `rest_columns` in a last, shorter row after the N whole ones, where there are few channels
    # and they are last; else fold = 1 and C = channels. count = values of a channel.
    bint channels_last
    Py_ssize_t G, N, C, S, channels, fold, rest_columns
    double count, eps
    # Consecutive channels that share their statistics, 1 or more; gamma and beta are their own.
    # What is `grouped` is summed as planes of whole groups, which have chunks of their own.
    Py_ssize_t pool
    bint grouped
    Py_ssize_t group_size, group_chunks, group_rows, group_pieces, group_piece, group_pitch
    # NULL data where there is none. y: the activation's output. dresidual: where dy times the slope
    # is stored.
    Operand x, dy, out, residual, y, dresidual
    # Which places count, a byte each; NULL: all. Planes: byte s of sample n at n*S + s. Channels
    # last: byte n for sample n. weights: one for each `weight_samples` samples; NULL: all 1.
    # counts: values of a channel that count, or the sums of their weights, of each run.
    const unsigned char* mask
    Py_ssize_t mask_g
    const double* counts
    const double* weights
    Py_ssize_t weights_g, weight_samples
    # By column: plane c goes by row (c + phase) % period of gamma, as doubles, and of gamma and
    # beta, as reals, each (period, places). Back, the planes are cut into pieces of
    # `rows_per_sum`, each with its own sums of dy * xhat and dy, (pieces, 2, period, places),
    # which are added up into the first.
    Py_ssize_t period, phase, places, rows_per_sum
    const double* gamma_wide
    const char* columns
    double* column_sums
    # Rows. About zero: there is no mean, and var is the mean square (RMS norm). Rows where the mask
    # is 0 are 0, and have no part in any sum. With a skip, x + skip is written to `sum`, and what is
    # normalized is that. Back, the residual is what is added to dx.
    bint about_zero
    const unsigned char* row_mask
    Operand skip, sum
    # The activation, 1 and infinity for none; in pieces perhaps a curve of curves.h instead.
    double slope, top
    int curve
    # The kernels' own: what a map takes its main values from (dy, else x), and beside them (y, or
    # the residual), and what the loops do.
    Operand source, other
    int kind
    # What is given: var NULL means that gamma already is the scale; gamma NULL 1, beta NULL 0.
    Table mean, var, gamma, beta
    # Given coefficients of the input's gradient, instead of those that follow from sums.
    Table a, b, dy_mean, rstd, rest
    # Bytes of tables that the caller holds for each channel meanwhile.
    Py_ssize_t verb_bytes
    # Bytes of an element of arrays, and of one in arithmetic.
    Py_ssize_t itemsize, real_bytes
    # Results: mean and var, or the sums of dy * (x - mean), over s where var is given, and of dy.
    Table first, second
    # Arrays of other types, or in another order: y is made of pieces, each of so many samples,
    # channels and values, by way of tiles (pieces.pxi). The frames are of `frame_N` samples of
    # `frame_S` values.
    bint in_pieces, as_is   # as_is: x is walked where it lies
    Frame arriving, beside, leaving     # x, the residual and y
    Py_ssize_t frame_N, frame_S, piece_n, piece_c, piece_s
    char* tiles         # for each thread
    Py_ssize_t tile_bytes
    long long* integer_sums     # (threads, 2, C)
    # Chunks: pieces of the samples, fixed by shape and element type alone. A chunk is `rows`
    # samples or, of one sample that is longer, `piece` values.
    Py_ssize_t chunks, rows, pieces, piece
    # Planes: how many planes on the one is that is fetched meanwhile; 0: the same plane.
    Py_ssize_t planes_ahead
    # Order of work, kind of store, size of the team: decided by the machine; no bit depends on it.
    # Blocks are of channels; the map of split passes has its own. Large: rows beyond the caches.
    # Fetch: values before they are needed, where the processor's own fetching is not enough.
    # Not split: each thread takes blocks of its own, and the tables below are threads', of a block.
    bint split, shared, large, stream, stream_dresidual, joined, lookahead, fetch
    Py_ssize_t block, map_block
    # Channels last: columns and rows that are summed together, and rows that are mapped together.
    Py_ssize_t column_tile, reduce_rows, map_rows
    int threads
    long next_block
    # Scratch, `pitch` (C rounded up to whole vectors) apart: (G, ...) tables. Those of sums are
    # `sums_pitch` apart.
    Py_ssize_t pitch
    double* shift       # (G, pitch): what is subtracted from x before summing
    double* unit        # (G, pitch): a power of two that keeps float64 squares in range
    # (G, n_partials, 2, pitch): each chunk's two sums. n_partials is the number of chunks, or 1
    # where one thread sums all of a channel's chunks and adds each to `total` at once (add_chunk).
    double* partial
    Py_ssize_t n_partials
    double* total       # (G, 2, pitch): the merged sums; `partial` itself where one chunk is all
    double* compensation    # (G, 2, pitch): the rounding errors of `total`, where n_partials is 1
    double* channel_moments     # (G, 2, pitch): mean and var of channels that are pooled
    Py_ssize_t* starts  # (G): the first place that weighs anything
    # (pitch + 16): which of a folded row's samples a column is of, and the same modulo 256.
    unsigned short* samples
    unsigned char* numbers
    char* packed        # (G, PACKED, pitch) reals: the coefficients of the map
    unsigned char* extreme  # (G): whether they take powers of two, which are 1 elsewhere
    # Coefficients that were packed before, for unfolded rows: then there is nothing to finalize.
    char* prepared


cdef inline Py_ssize_t pitch_of(Py_ssize_t channels) noexcept nogil:
    """Coefficients in a row of packed ones: whole vectors, and one more that may be read behind."""
    return (channels + 15) // 16 * 16 + 16


cdef inline Py_ssize_t sums_pitch(const Task* t) noexcept nogil:
    """Of the float64 tables, from one run to the next: those of what is grouped are groups'."""
    return t.group_pitch if t.grouped else t.pitch


ctypedef void (*Run)(Task*) noexcept nogil

cdef enum:
    PACKED = 8          # the most coefficients that a map has
    WIDE = 48           # columns; rows at least as wide are masked one by one
    MOST_MASKED_ROWS = 16   # the most rows that are worked on together where there is a mask
    AHEAD = 4096        # bytes from a value to the one fetched meanwhile; twice that of mapped rows
