# Frames: arrays of other types, or in another order than x, which are worked on in pieces.

cdef enum:
    TILE = 1 << 14          # values of a tile: with what is read and written beside it, in L2
    PLANE_PIECE = 256       # values of a plane in a piece, or fewer where the plane is shorter
    FEWEST_PIECES = 4       # of each thread, where a piece is not small


cdef dict stored_types = {"uint8": STORED_UINT8, "int8": STORED_INT8, "uint16": STORED_UINT16,
                          "int16": STORED_INT16}


cdef stored stored_of(cnp.ndarray a, int element):
    """How the kernels of an element type see what an array holds."""
    cdef int own = element_of(a)
    if own == element:
        return STORED_ELEMENT
    if own == F16:
        return STORED_FLOAT16
    if own == BF16:
        return STORED_BFLOAT16
    return stored_types[a.dtype.name]


cdef Frame frame(cnp.ndarray a, int element):
    """An (N, C, S) array of which channels or values are side by side."""
    cdef Frame f
    cdef Py_ssize_t S = cnp.PyArray_DIM(a, 2)
    f.data, f.itemsize = <char*> cnp.PyArray_DATA(a), cnp.PyArray_ITEMSIZE(a)
    f.n, f.c, f.s = cnp.PyArray_STRIDE(a, 0), cnp.PyArray_STRIDE(a, 1), cnp.PyArray_STRIDE(a, 2)
    f.type = stored_of(a, element)
    f.by_rows = S == 1 or f.s != f.itemsize
    if S == 1:
        f.s = f.n   # samples are rows
    return f


cdef bint follows(const Frame* a, Py_ssize_t S) noexcept nogil:
    """Whether samples are rows that follow each other, so that all are as one."""
    return a.data == NULL or a.by_rows and a.n == S * a.s


cdef void join_samples(Task* t) noexcept nogil:
    if follows(&t.arriving, t.frame_S) and follows(&t.beside, t.frame_S) and follows(
            &t.leaving, t.frame_S):
        t.frame_S *= t.frame_N
        t.frame_N = 1


cdef bint is_dense_rows(const Frame* a, Py_ssize_t N, Py_ssize_t C, Py_ssize_t S) noexcept nogil:
    return a.by_rows and a.s == C * a.itemsize and (N == 1 or a.n == S * a.s)


cdef void set_pieces(Task* t, int threads) noexcept nogil:
    """How much of y is a piece: about a tile, and no more than gives each thread a few."""
    cdef Py_ssize_t C = t.channels, S = t.frame_S, N = t.frame_N
    cdef Py_ssize_t most = max(min(TILE, N * C * S // (threads * FEWEST_PIECES)), 1)
    t.in_pieces = True
    t.piece_c = min(C, max(most // PLANE_PIECE, LANES))
    t.piece_c = C if t.fold > 1 else t.piece_c
    t.piece_s = min(S, ceil_div(max(most // t.piece_c, LANES), LANES) * LANES)
    t.piece_n = 1
    if t.piece_c == C and t.piece_s == S and (
            not t.leaving.by_rows or is_dense_rows(&t.leaving, N, C, S)):
        t.piece_n = min(N, max(most // (C * S), 1))
    t.tile_bytes = ceil_div(t.piece_n * t.piece_c * t.piece_s * t.itemsize
                            * (2 if t.beside.data != NULL else 1), LINE) * LINE + LINE


cdef void set_frames(Task* t, cnp.ndarray x, object residual, cnp.ndarray out, int element):
    """The shape of a map of frames. Rows are folded where all that is walked is dense."""
    cdef Py_ssize_t N = cnp.PyArray_DIM(x, 0), C = cnp.PyArray_DIM(x, 1), S = cnp.PyArray_DIM(x, 2)
    t.arriving, t.leaving = frame(x, element), frame(out, element)
    if residual is not None:
        t.beside = frame(residual, element)
    set_element(t, element)
    t.as_is = t.arriving.type == STORED_ELEMENT and t.arriving.by_rows == t.leaving.by_rows
    if t.leaving.by_rows:
        set_shape(t, 1, N * S, C, 1, True)
        if not is_dense_rows(&t.leaving, N, C, S):
            t.N, t.C, t.fold, t.rest_columns = N * S, C, 1, 0
            set_pitch(t)
        t.as_is = t.as_is and is_dense_rows(&t.arriving, N, C, S)
    else:
        set_shape(t, 1, N, C, S, False)
    t.frame_N, t.frame_S = N, S
    join_samples(t)
    # What the schedule counts: it sees arrays of elements.
    t.x.data, t.out.data, t.residual.data = t.arriving.data, t.leaving.data, t.beside.data
    t.out.c = t.leaving.c // t.leaving.itemsize
    set_chunks(t)
