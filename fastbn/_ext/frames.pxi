# Frames: arrays of other types, or in another order than x, which are worked on in pieces.

cdef enum:
    TILE = 1 << 14          # values of a tile: with what is read and written beside it, in L2
    PLANE_PIECE = 256       # values of a plane in a piece, or fewer where the plane is shorter
    FEWEST_PIECES = 4       # of each thread, where a piece is not small


cdef stored integer_of(object a) noexcept:
    """The type of integers that an array holds; STORED_ELEMENT where it holds none of these."""
    cdef int kind = cnp.PyArray_TYPE(a)
    if kind == cnp.NPY_UINT8:
        return STORED_UINT8
    if kind == cnp.NPY_INT8:
        return STORED_INT8
    if kind == cnp.NPY_UINT16:
        return STORED_UINT16
    return STORED_INT16 if kind == cnp.NPY_INT16 else STORED_ELEMENT


cdef stored stored_of(object a, int element):
    """How the kernels of an element type see what an array holds."""
    cdef int own = element_of(a)
    if own == element:
        return STORED_ELEMENT
    if own == F16:
        return STORED_FLOAT16
    return STORED_BFLOAT16 if own == BF16 else integer_of(a)


cdef int element_of_frames(cnp.ndarray x, cnp.ndarray out, int curve):
    """Whose kernels write one from the other: float32's, where they are of different types, or
    where a curve is applied before a half type is rounded to."""
    cdef int own = element_of(x)
    return own if element_of(out) == own and (own == F64 or curve == 0) else F32


cdef Frame new_frame(cnp.ndarray a, int element, Py_ssize_t S, Py_ssize_t n, Py_ssize_t c,
                     Py_ssize_t s):
    """An (N, C, S) array with these strides, of which channels or values are side by side."""
    cdef Frame f
    f.data, f.itemsize = <char*> cnp.PyArray_DATA(a), cnp.PyArray_ITEMSIZE(a)
    f.n, f.c, f.s, f.type = n, c, s, stored_of(a, element)
    f.by_rows = S == 1 or s != f.itemsize
    if S == 1:
        f.s = n     # samples are rows
    return f


cdef Frame frame(cnp.ndarray a, int element):
    """An (N, C, S) view."""
    return new_frame(a, element, cnp.PyArray_DIM(a, 2), cnp.PyArray_STRIDE(a, 0),
                     cnp.PyArray_STRIDE(a, 1), cnp.PyArray_STRIDE(a, 2))


cdef Frame dense_frame(cnp.ndarray a, int element, Py_ssize_t C, Py_ssize_t S, bint last):
    """A contiguous array."""
    cdef Py_ssize_t item = cnp.PyArray_ITEMSIZE(a)
    return new_frame(a, element, S, C * S * item, item if last else S * item,
                     C * item if last else item)


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


cdef void set_frames(Task* t, Py_ssize_t N, Py_ssize_t C, Py_ssize_t S,
                     int element) noexcept nogil:
    """The shape of a map of frames, which are set. Rows are folded where all that is walked is
    dense."""
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
