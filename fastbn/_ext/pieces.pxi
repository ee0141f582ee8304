# Pieces: y of an array of another type, or in another order, by way of tiles; and sums of integers.
#
# 1. The coefficients of all channels are packed once. Then each thread takes pieces of y one after
#    the other: it brings x into a tile, dense and in y's order (tiles.h), and runs the loops of
#    elementwise.pxi on the tile as on a small task of its own. So there is one set of loops, and
#    y has the bits that it has for x in the usual type and order.
# 2. A tile stays in the core's own cache, and is large enough that a piece costs little beside it.
#    Planes: of a piece's channels, parts of planes. Rows: some rows, of all samples together.
# 3. y goes straight to its place, streamed if that is large; half types, which these loops do not
#    write, go from the tile, and so does what a curve is applied to (curves.h).
# 4. Sums of integers are taken in integer lanes of 32 or 64 bits, which go to 64 bits before they
#    are full: they are exact in any order (integers.h).

cdef struct Piece:
    Py_ssize_t n0, n1, c0, c1, s0, s1   # samples, channels, values; rows of all samples are values


cdef inline Py_ssize_t count_of(Py_ssize_t all, Py_ssize_t each) noexcept nogil:
    return (all + each - 1) // each


cdef Piece piece_at(const Task* t, Py_ssize_t i) noexcept nogil:
    """Piece i, channels innermost: they share what is read of rows."""
    cdef Py_ssize_t plane_pieces = count_of(t.frame_S, t.piece_s)
    cdef Py_ssize_t blocks = count_of(t.channels, t.piece_c)
    cdef Piece p
    p.c0 = i % blocks * t.piece_c
    p.s0 = i // blocks % plane_pieces * t.piece_s
    p.n0 = i // blocks // plane_pieces * t.piece_n
    p.c1 = min(p.c0 + t.piece_c, t.channels)
    p.s1 = min(p.s0 + t.piece_s, t.frame_S)
    p.n1 = min(p.n0 + t.piece_n, t.frame_N)
    return p


cdef Py_ssize_t count_pieces(const Task* t) noexcept nogil:
    return (count_of(t.frame_S, t.piece_s) * count_of(t.channels, t.piece_c)
            * count_of(t.frame_N, t.piece_n))


cdef inline char* in_frame(const Frame* a, Py_ssize_t n, Py_ssize_t c, Py_ssize_t s) noexcept nogil:
    return a.data + n * a.n + c * a.c + s * a.s


cdef void read_piece(const Frame* a, const Piece* p, bint by_rows, element* tile) noexcept nogil:
    """The piece of an array, as a dense (n, c, s) tile or, by rows, (n, s, c)."""
    cdef Py_ssize_t n, C = p.c1 - p.c0, S = p.s1 - p.s0, step = C if by_rows else S
    for n in range(p.n0, p.n1):
        if a.by_rows:
            read_tile(a.type, tile, step, in_frame(a, n, p.c0, p.s0), a.s // a.itemsize, S, C,
                      not by_rows)
        else:
            read_tile(a.type, tile, step, in_frame(a, n, p.c0, p.s0), a.c // a.itemsize, C, S,
                      by_rows)
        tile += C * S


cdef void write_piece(const Frame* a, const Piece* p, const element* tile,
                      bint stream) noexcept nogil:
    cdef Py_ssize_t n, C = p.c1 - p.c0, S = p.s1 - p.s0
    for n in range(p.n0, p.n1):
        if a.by_rows:
            write_tile(a.type, in_frame(a, n, p.c0, p.s0), a.s // a.itemsize, tile, C, S, C,
                       stream)
        else:
            write_tile(a.type, in_frame(a, n, p.c0, p.s0), a.c // a.itemsize, tile, S, C, S,
                       stream)
        tile += C * S


cdef Operand tile_operand(const Task* own, element* tile) noexcept nogil:
    cdef Operand o
    o.data = <char*> tile
    o.g, o.n = 0, own.C * own.S
    o.c = 1 if own.channels_last else own.S
    return o


cdef Operand frame_operand(const Frame* a, const Piece* p, const Task* own) noexcept nogil:
    """Where a frame of elements is, from a piece on."""
    cdef Operand o
    o.data = in_frame(a, p.n0, p.c0, p.s0)
    o.g = 0
    o.c = a.c // a.itemsize
    o.n = (own.fold * a.s if own.channels_last else a.n) // a.itemsize
    return o


cdef void shape_of_piece(Task* own, const Task* t, const Piece* p) noexcept nogil:
    """A task of the piece alone, of one chunk. Rows are folded as all are."""
    cdef Py_ssize_t C = p.c1 - p.c0, S = p.s1 - p.s0, rows = (p.n1 - p.n0) * S
    own.channels = C
    if own.channels_last:
        own.N, own.C, own.S = rows // t.fold, C * t.fold, 1
        own.rest_columns = rows % t.fold * C
    else:
        own.N, own.C, own.S = p.n1 - p.n0, C, S
        own.joined = t.joined and S == t.frame_S
    own.chunks, own.rows, own.pieces, own.piece = 1, max(own.N, 1), 1, own.S
    own.packed = t.packed + p.c0 * <Py_ssize_t> sizeof(real)


cdef void map_piece(Task* own, const Task* t, const Piece* p, element* tile) noexcept nogil:
    """y of a piece."""
    cdef bint direct = t.leaving.type == STORED_ELEMENT and t.curve == 0
    shape_of_piece(own, t, p)
    own.source = tile_operand(own, tile)
    if t.as_is:
        own.source = frame_operand(&t.arriving, p, own)
    else:
        read_piece(&t.arriving, p, t.leaving.by_rows, tile)
    own.x = own.other = own.source
    if t.beside.data != NULL:
        own.other = tile_operand(own, tile + t.piece_n * t.piece_c * t.piece_s)
        read_piece(&t.beside, p, t.leaving.by_rows, <element*> own.other.data)
    own.out = frame_operand(&t.leaving, p, own) if direct else tile_operand(own, tile)
    own.dresidual = own.out
    map_chunk(own, 0, 0, own.C, 0, 0)
    if t.curve != 0:
        apply_curve(t.curve, tile, (p.n1 - p.n0) * (p.c1 - p.c0) * (p.s1 - p.s0))
    if not direct:
        write_piece(&t.leaving, p, tile, t.stream)


cdef void map_pieces(const Task* t, Py_ssize_t thread, Py_ssize_t team) noexcept nogil:
    cdef Task own = t[0]
    cdef Py_ssize_t pieces = count_pieces(t), i
    cdef Piece p
    cdef element* tile = <element*> (t.tiles + thread * t.tile_bytes)
    own.fetch, own.planes_ahead = False, 0
    own.stream = t.stream and t.leaving.type == STORED_ELEMENT and t.curve == 0
    for i in range(pieces * thread // team, pieces * (thread + 1) // team):
        p = piece_at(t, i)
        map_piece(&own, t, &p, tile)


cdef void sum_integers(const Task* t, Py_ssize_t thread, Py_ssize_t team) noexcept nogil:
    """A thread's share of the pieces, into its own table."""
    cdef Py_ssize_t pieces = count_pieces(t), i, n
    cdef Py_ssize_t C = t.channels
    cdef long long* sums = t.integer_sums + thread * 2 * C
    cdef const Frame* x = &t.arriving
    cdef Piece p
    for i in range(pieces * thread // team, pieces * (thread + 1) // team):
        p = piece_at(t, i)
        for n in range(p.n0, p.n1):
            add_integers(x.type, in_frame(x, n, p.c0, p.s0), x.by_rows, x.c, x.s, p.c1 - p.c0,
                         p.s1 - p.s0, sums + p.c0, sums + C + p.c0)
