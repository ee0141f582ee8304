# Arrays: NumPy's as a Task's operands and tables, and new ones for results.

cdef enum Element:
    F32, F64, F16, BF16, NO_ELEMENT


ELEMENTS = ("f32", "f64", "f16", "bf16")
"""The names of the element types, in the order of `Element`."""


cdef int bfloat16_type = -1     # the number that NumPy gave to the last one seen


cdef int element_of(object a):
    """The element type of an array."""
    return element_of_type((<cnp.ndarray> a).descr)


cdef int element_of_type(cnp.dtype dtype):
    """The element type of a dtype; bfloat16 is whatever has that name."""
    global bfloat16_type
    cdef int kind = dtype.type_num
    if kind == cnp.NPY_FLOAT32:
        return F32
    if kind == cnp.NPY_FLOAT64:
        return F64
    if kind == cnp.NPY_FLOAT16:
        return F16
    if kind != bfloat16_type and cnp.PyTypeNum_ISUSERDEF(kind) and is_bfloat16(dtype):
        bfloat16_type = kind
    return BF16 if kind == bfloat16_type else NO_ELEMENT


cdef void set_element(Task* t, int element) noexcept nogil:
    t.itemsize = 8 if element == F64 else 4 if element == F32 else 2
    t.real_bytes = 8 if element == F64 else 4


cdef int arithmetic_type(Task* t) noexcept:
    return cnp.NPY_FLOAT64 if t.real_bytes == 8 else cnp.NPY_FLOAT32


cdef int gradient_type(object a):
    """The type of a parameter's gradient, by the parameter or else dy."""
    return cnp.NPY_FLOAT64 if cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT64 else cnp.NPY_FLOAT32


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
    o.g = (t.N * t.C + t.rest_columns) * t.S
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


cdef Table sample_table(Task* t, cnp.ndarray a) noexcept:
    """Contiguous statistics of samples, as a (G, C / pool) table."""
    cdef Table result = table(a)
    result.g, result.c = t.channels // t.pool * <Py_ssize_t> sizeof(double), sizeof(double)
    result.pool = t.pool
    return result


cdef Py_ssize_t pooled_bytes = SMALLEST


cdef cnp.ndarray new_array(int ndim, cnp.npy_intp* shape, int type):
    """An array that nothing has been written to, from the pool where it is large."""
    cdef Py_ssize_t size = cnp.PyArray_MultiplyList(shape, ndim)
    cdef cnp.dtype dtype = cnp.PyArray_DescrFromType(type)
    if size * dtype.itemsize < pooled_bytes:
        return cnp.PyArray_EMPTY(ndim, shape, type, 0)
    return pool.empty(tuple([shape[i] for i in range(ndim)]), dtype)


cdef cnp.ndarray new_vector(Py_ssize_t C, int element, bint zero=False):
    cdef cnp.npy_intp length = C
    if zero:
        return cnp.PyArray_ZEROS(1, &length, element, 0)
    return new_array(1, &length, element)


cdef cnp.ndarray new_table(Task* t, Py_ssize_t pool, bint zero=False):
    cdef cnp.npy_intp[2] shape
    shape[0], shape[1] = t.G, t.channels // pool
    if zero:
        return cnp.PyArray_ZEROS(2, shape, cnp.NPY_FLOAT64, 0)
    return new_array(2, shape, cnp.NPY_FLOAT64)


cdef cnp.ndarray empty_like(object x):
    return new_array(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), cnp.PyArray_TYPE(x))


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


cdef void add_runs(cnp.ndarray totals, cnp.ndarray sums, Py_ssize_t first):
    """Add the sums of some runs, (G, C) and dense, to those of channels from the first on."""
    cdef Py_ssize_t G = cnp.PyArray_DIM(sums, 0), C = cnp.PyArray_DIM(sums, 1), g, c
    cdef double* total = <double*> cnp.PyArray_DATA(totals) + first
    cdef const double* sum = <double*> cnp.PyArray_DATA(sums)
    for g in range(G):
        for c in range(C):
            total[c] += sum[g * C + c]


cdef cnp.ndarray at_line(cnp.ndarray flat):
    """From its first cache line on: a vector of it is in no more lines than it must be."""
    cdef Py_ssize_t before = -<size_t> cnp.PyArray_DATA(flat) & (LINE - 1)
    return flat[before // cnp.PyArray_ITEMSIZE(flat) :]


cdef cnp.ndarray new_columns(Task* t, object gamma, object beta, int element):
    """gamma and beta by column, (2, P, places), with room for a vector behind each row's end."""
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


cdef void set_columns(Task* t, cnp.ndarray columns) noexcept:
    t.columns = <const char*> cnp.PyArray_DATA(columns)
    t.period, t.places = cnp.PyArray_DIM(columns, 1), cnp.PyArray_DIM(columns, 2)


cdef Py_ssize_t parameters_of(Task* t) noexcept:
    """How many values gamma and beta have."""
    return t.period * t.S if t.period > 0 else t.channels
