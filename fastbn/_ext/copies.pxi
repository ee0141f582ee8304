# Copies: of arrays that the kernels cannot walk, or into such, by all threads.

cdef enum:
    PIECE = 512     # rows and columns that a thread takes at once


cdef struct Axis:
    Py_ssize_t length, a, out   # steps in bytes


cdef struct Copy:
    # The axes that do not merge, but for the two along which a and out are contiguous.
    Axis[32] axes
    int count
    Axis rows, columns      # contiguous in out; in a
    Py_ssize_t planes       # all places of the other axes
    char* a
    char* out
    int itemsize


cdef bint set_copy(Copy* t, cnp.ndarray a, cnp.ndarray out):
    """Whether each of the two is contiguous along an axis that is not the other's."""
    cdef int i, rows = -1, columns = -1
    cdef Axis axis
    t.a, t.out = <char*> cnp.PyArray_DATA(a), <char*> cnp.PyArray_DATA(out)
    t.itemsize, t.count, t.planes = cnp.PyArray_ITEMSIZE(a), 0, 1
    for i in range(cnp.PyArray_NDIM(a)):
        axis.length = cnp.PyArray_DIM(a, i)
        axis.a, axis.out = cnp.PyArray_STRIDE(a, i), cnp.PyArray_STRIDE(out, i)
        if axis.length == 1:
            continue
        if t.count > 0 and follow(&t.axes[t.count - 1], &axis):
            axis.length *= t.axes[t.count - 1].length
            t.count -= 1
        t.axes[t.count] = axis
        t.count += 1
    for i in range(t.count):
        if rows < 0 and t.axes[i].out == t.itemsize:
            rows = i
        elif columns < 0 and t.axes[i].a == t.itemsize:     # overlapping windows have several
            columns = i
        else:
            t.planes *= t.axes[i].length
    if rows < 0 or columns < 0 or t.itemsize not in (2, 4, 8):
        return False
    t.rows, t.columns = t.axes[rows], t.axes[columns]
    t.axes[rows].length = t.axes[columns].length = 1
    return True


cdef bint follow(const Axis* outer, const Axis* inner) noexcept:
    """Whether two axes are one, in both arrays."""
    return outer.a == inner.length * inner.a and outer.out == inner.length * inner.out


cdef void copy_piece(const Copy* t, Py_ssize_t plane, Py_ssize_t r, Py_ssize_t c) noexcept nogil:
    """PIECE rows and columns of a plane from here on, or what there is."""
    cdef const char* a = t.a + r * t.rows.a + c * t.columns.a
    cdef char* out = t.out + r * t.rows.out + c * t.columns.out
    cdef int i
    for i in range(t.count - 1, -1, -1):
        a += plane % t.axes[i].length * t.axes[i].a
        out += plane % t.axes[i].length * t.axes[i].out
        plane //= t.axes[i].length
    transpose(a, t.rows.a // t.itemsize, out, t.columns.out // t.itemsize,
              min(t.rows.length - r, PIECE), min(t.columns.length - c, PIECE), t.itemsize)


def copy(cnp.ndarray a, cnp.ndarray out, int threads):
    """`numpy.copyto(out, a)` of arrays of one shape and type that lie apart."""
    cdef Copy t
    cdef Py_ssize_t i, rows, columns
    cdef int team
    if (cnp.PyArray_TYPE(a) != cnp.PyArray_TYPE(out) or not cnp.PyArray_ISBEHAVED_RO(a)
            or not cnp.PyArray_ISBEHAVED(out) or not set_copy(&t, a, out)):
        np.copyto(out, a)
        return
    rows, columns = ceil_div(t.rows.length, PIECE), ceil_div(t.columns.length, PIECE)
    team = 1 if is_serial or 2 * cnp.PyArray_NBYTES(a) < tuning.serial_below else threads
    with nogil:
        team = max(1, team // enter_call())
        for i in prange(t.planes * rows * columns, num_threads=team, schedule="static"):
            copy_piece(&t, i // (rows * columns), i // columns % rows * PIECE, i % columns * PIECE)
        leave_call()
