# Plain calls: arguments as most calls have them, read by NumPy's C interface in a few nanoseconds
# each.
#
# None of these functions says why something is not plain: that is for fastbn.checks. Nothing has
# been touched when one says no.

cdef dict layouts = LAYOUTS
cdef Py_ssize_t short_plane = SHORT, row_bytes = sizes.ROW_BYTES


cdef int axis_of_channels(object x, object layout):
    """Of a contiguous, native array that is not empty, in a known layout; else -1."""
    cdef int axis
    if not cnp.PyArray_CheckExact(x) or not cnp.PyArray_ISCARRAY_RO(<cnp.ndarray> x):
        return -1
    if type(layout) is not str or cnp.PyArray_NDIM(x) < 2 or cnp.PyArray_SIZE(x) == 0:
        return -1
    known = layouts.get(layout)
    if known is None:
        return -1
    axis = known
    return axis if axis >= 0 else cnp.PyArray_NDIM(x) - 1


cdef bint set_plain_shape(Task* t, object x, object layout):
    """Whether x is a plain array of elements: then its shape is set."""
    cdef int axis = axis_of_channels(x, layout)
    cdef Py_ssize_t N, C, S
    if axis < 0 or element_of(x) == NO_ELEMENT:
        return False
    N, C, S = cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, axis), 1
    if axis == cnp.PyArray_NDIM(x) - 1:
        N = cnp.PyArray_SIZE(x) // C
    else:
        S = cnp.PyArray_SIZE(x) // (N * C)
    if C == 1 and S < short_plane:
        N, S = 1, N * S
    set_shape(t, 1, N, C, S, S == 1)
    return True


cdef object set_plain_samples(Task* t, object x, object layout, object groups, object samples):
    """A plain shape with runs of some samples, or with rows, of `groups` of channels: the shape of
    a table of what shares statistics. None where these are not plain, or where tables of all rows
    would not be small."""
    cdef Py_ssize_t N, C, S, of_run, count, pool
    cdef bint last
    cdef tuple shape
    if not set_plain_shape(t, x, layout) or type(groups) is not int or type(samples) is not int:
        return None
    set_element(t, element_of(x))
    N, C, last = cnp.PyArray_DIM(x, 0), t.channels, layouts[layout] < 0
    if not 1 <= samples <= N or groups > C:
        return None
    of_run = samples
    count = C if groups == EACH_CHANNEL else 1 if groups == ALL_CHANNELS else groups
    if N % of_run != 0 or C % count != 0:
        return None
    S, pool = cnp.PyArray_SIZE(x) // (N * C), C // count
    shape = (N // of_run, count)
    if groups == ALL_CHANNELS:
        shape = (N // of_run,)
    if of_run * S == 1 and are_rows(count, pool):
        if N * count * row_bytes > verb_limit(t):
            return None
        set_shape(t, 1, 1, N * count, pool, False)
        t.period = count
        return shape
    if C == 1 and (last or S < short_plane):
        set_shape(t, N // of_run, 1, 1, of_run * S, of_run * S == 1)
    elif S == 1 or last:
        set_shape(t, N // of_run, of_run * S, C, 1, is_channels_last(of_run * S, 1, pool))
    else:
        set_shape(t, N // of_run, of_run, C, S, False)
    t.pool = pool
    return shape


cdef bint set_plain_rows(Task* t, object x, object where):
    """Whether x, of elements, has plain rows along its last axis, and a plain mask of rows or none:
    then these are set."""
    cdef Py_ssize_t C
    cdef int last, i
    last = axis_of_channels(x, "NHWC")
    if last < 0 or element_of(x) == NO_ELEMENT:
        return False
    C = cnp.PyArray_DIM(x, last)
    set_element(t, element_of(x))
    set_shape(t, 1, 1, cnp.PyArray_SIZE(x) // C, C, False)
    t.period = 1
    if where is not None:
        if not cnp.PyArray_CheckExact(where) or not cnp.PyArray_ISCARRAY_RO(<cnp.ndarray> where):
            return False
        if cnp.PyArray_TYPE(where) != cnp.NPY_BOOL or cnp.PyArray_NDIM(where) != last + 1:
            return False
        for i in range(last + 1):
            if cnp.PyArray_DIM(where, i) != (cnp.PyArray_DIM(x, i) if i < last else 1):
                return False
        t.row_mask = <unsigned char*> cnp.PyArray_DATA(where)
    return True


cdef bint are_statistics(object a, tuple shape):
    """Whether these are contiguous, native float64 statistics of that shape."""
    cdef int i
    if not cnp.PyArray_CheckExact(a) or cnp.PyArray_NDIM(a) != len(shape):
        return False
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) != shape[i]:
            return False
    return cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT64 and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray> a)


cdef bint is_parameter(Task* t, object v):
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
    if step == 1 and (are_finite_32(<const uint32_t*> var, entries) if floating is float
                      else are_finite_64(<const uint64_t*> var, entries)):
        return True
    for c in range(entries):
        if not (var[c * step] >= 0 or nan and var[c * step] != var[c * step]):
            return False
    return True


# Whether no number has its sign set or is infinite or NaN, by the bits, several at a time: one more
# in the exponent of these sets the sign, too.

cdef bint are_finite_32(const uint32_t* bits, Py_ssize_t entries) noexcept nogil:
    cdef uint32_t seen = 0
    cdef Py_ssize_t c
    for c in range(entries):
        seen |= bits[c] | (bits[c] + (<uint32_t> 1 << 23))
    return seen >> 31 == 0


cdef bint are_finite_64(const uint64_t* bits, Py_ssize_t entries) noexcept nogil:
    cdef uint64_t seen = 0
    cdef Py_ssize_t c
    for c in range(entries):
        seen |= bits[c] | (bits[c] + (<uint64_t> 1 << 52))
    return seen >> 63 == 0


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


cdef bint all_apart(object out, object a, object b=None, object c=None, object d=None):
    """Whether `out` lies apart from all arrays that are not None."""
    cdef object other
    for other in (a, b, c, d):
        if other is not None and not apart(out, other):
            return False
    return True


cdef bint set_activation(Task* t, object activation, bint curves=False):
    """The activation, by its public name; `curves` too, where these are applied."""
    if activation is None:
        t.slope, t.top = 1, INFINITY
        return True
    known = activations.of(activation)
    if known is None:
        return False
    t.slope, t.top, t.curve = known
    return curves or t.curve == 0


cdef bint set_residual(Task* t, object residual, object x):
    if residual is None:
        return True
    if not is_like(residual, x):
        return False
    t.residual = dense(t, residual)
    return True


cdef bint set_activation_grad(Task* t, object activation, object y, object dy):
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


cdef void set_parameters(Task* t, object gamma, object beta):
    if t.period > 0:
        return      # by column
    if gamma is not None:
        t.gamma = table(gamma)
    if beta is not None:
        t.beta = table(beta)


cdef void keep_dresidual(Task* t, Operand dresidual) noexcept:
    """Store dy as the activation lets it through; without one, dy itself."""
    t.dresidual = dresidual
    if t.y.data == NULL:
        t.y = t.dy


cdef bint set_plain_parameters(Task* t, object gamma, object beta, object eps):
    """Whether what a forward is given beside arrays is plain: then it is set."""
    if not is_valid_eps(eps):
        return False
    if not (gamma is None or is_parameter(t, gamma)) or not (beta is None or is_parameter(t, beta)):
        return False
    t.eps = eps
    set_parameters(t, gamma, beta)
    return True


cdef bint set_plain_constants(Task* t, object mean, object var):
    """The same of statistics that are given."""
    if not is_parameter(t, mean) or not is_parameter(t, var):
        return False
    t.mean, t.var = table(mean), table(var)
    return is_valid_variance(t, False)


cdef object set_plain_forward(Task* t, object x, object gamma, object beta, object eps,
                              object activation, object residual, object out):
    """A training forward on a shape that is set: its output, or None."""
    if not set_plain_parameters(t, gamma, beta, eps):
        return None
    if not set_activation(t, activation) or not set_residual(t, residual, x):
        return None
    if out is None:
        out = empty_like(x)
    elif not (is_plain_out(out, x) and in_place_or_apart(out, x)
              and in_place_or_apart(out, residual) and all_apart(out, None, None, gamma, beta)):
        return None
    t.reduce, t.map = MOMENTS, AFFINE
    t.x, t.out = dense(t, x), dense(t, out)
    return out


cdef object set_plain_normalize(Task* t, object x, object mean, object var, object gamma,
                                object beta, object eps, object activation, object residual,
                                object out):
    """The same of y by given statistics."""
    if not set_plain_constants(t, mean, var):
        return None
    y = set_plain_forward(t, x, gamma, beta, eps, activation, residual, out)
    if y is None or not all_apart(y, mean, var, None, None):
        return None
    t.reduce = NO_REDUCE
    return y


cdef dict plain_types = {np.float32: np.dtype(np.float32), np.float16: np.dtype(np.float16)}


cdef cnp.dtype plain_result_type(object x, object dtype, object out):
    """The type of y, by its own argument, `out` or x; None where that is not plain, or y cannot be
    of it."""
    cdef bint is_integer = integer_of(x) != STORED_ELEMENT
    cdef int own = F32 if is_integer else element_of(x), wanted
    if type(dtype) is type:
        dtype = plain_types.get(dtype)
    elif dtype is None and out is not None and cnp.PyArray_CheckExact(out):
        dtype = out.dtype
    elif dtype is None:
        dtype = plain_types[np.float32] if is_integer else x.dtype
    if own == NO_ELEMENT or not isinstance(dtype, cnp.dtype) or not dtype.isnative:
        return None
    wanted = element_of_type(dtype)
    return dtype if wanted == own or own == F32 and (wanted == F16 or wanted == BF16) else None


cdef bint is_plain_target(object out, object x, int ndim, cnp.npy_intp* shape, cnp.dtype dtype):
    """Whether `out` is a contiguous native array of this shape and type, and apart from x."""
    cdef int i
    if not cnp.PyArray_CheckExact(out) or not cnp.PyArray_ISCARRAY(<cnp.ndarray> out):
        return False
    if cnp.PyArray_NDIM(out) != ndim or cnp.PyArray_TYPE(out) != dtype.type_num:
        return False
    for i in range(ndim):
        if cnp.PyArray_DIM(out, i) != shape[i]:
            return False
    return apart(out, x)


cdef object set_plain_frames(Task* t, object x, object layout, object dtype, object out_layout,
                             object out):
    """Where y goes that may be of another type or in another layout, and whose frames are set with
    x's; None where something is not plain."""
    cdef int axis = axis_of_channels(x, layout), ndim, there, element, i
    cdef cnp.npy_intp[cnp.NPY_MAXDIMS] shape
    cdef Py_ssize_t N, C, S
    if axis < 0:
        return None
    there = axis if out_layout is None else axis_of_channels(x, out_layout)
    result_type = plain_result_type(x, dtype, out)
    if there < 0 or result_type is None:
        return None
    ndim = cnp.PyArray_NDIM(x)
    for i in range(ndim):
        shape[i] = cnp.PyArray_DIM(x, i)
    if there != axis:
        # The axes between the two places of the channels move by one.
        for i in range(1, ndim - 1):
            shape[i if there > axis else i + 1] = cnp.PyArray_DIM(x, i + 1 if there > axis else i)
        shape[there] = cnp.PyArray_DIM(x, axis)
    if out is None:
        out = new_array(ndim, shape, (<cnp.dtype> result_type).type_num)
    elif not is_plain_target(out, x, ndim, shape, result_type):
        return None
    N, C, element = shape[0], shape[there], element_of_frames(x, out, t.curve)
    S = cnp.PyArray_SIZE(x) // (N * C)
    t.arriving = dense_frame(x, element, C, S, axis == ndim - 1)
    t.leaving = dense_frame(out, element, C, S, there == ndim - 1)
    set_frames(t, N, C, S, element)
    return out


cdef bint set_plain_statistics(Task* t, object dy, object mean, object var, object layout,
                               object params, bint frozen):
    """Whether dy's shape and the statistics of a backward are plain: then they are set."""
    if not set_plain_shape(t, dy, layout) or not (params is True or params is False):
        return False
    if not is_parameter(t, mean) or not is_parameter(t, var):
        return False
    t.mean, t.var = table(mean), table(var)
    return frozen or not (t.mean.single or t.var.single)


cdef tuple set_plain_backward(Task* t, object dy, object x, object mean, object var, object gamma,
                              object eps, object activation, object y, object dresidual,
                              bint frozen, bint dx_only, object out):
    """A backward on dy's shape, which is set, by statistics that are: dx and dresidual, or None.
    `dx_only` is that of dx alone by fixed statistics."""
    if not is_valid_eps(eps) or not (gamma is None or is_parameter(t, gamma)):
        return None
    if not (dx_only and x is None) and not is_like(x, dy):
        return None
    if not is_valid_variance(t, not frozen) or not set_activation_grad(t, activation, y, dy):
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
    t.reduce = NO_REDUCE if dx_only else GRADIENT_MOMENTS
    t.map = AFFINE if frozen else INPUT_GRADIENT
    t.eps = eps
    t.dy, t.out = dense(t, dy), dense(t, out)
    set_parameters(t, gamma, None)
    if dx_only:
        memset(&t.mean, 0, sizeof(Table))   # dy is not centred
    else:
        t.x = dense(t, x)
    if dresidual is not None:
        keep_dresidual(t, dense(t, dresidual))
    return out, dresidual


cdef bint may_cut_sums(Task* t) noexcept:
    """Whether the sums of a run may be taken some channels at a time, or need not."""
    return t.fold == 1 and t.pool == 1 or t.channels * sum_bytes <= verb_limit(t)


# ---- For backends without compiled entries: the (G, N, C, S) shape, and outputs ----

cdef tuple shape_of(Task* t):
    return 1, <Py_ssize_t> t.count // t.S, t.channels, t.S


def plain_shape(x, layout):
    """Of an array as most are: its view's shape, or None."""
    cdef Task t
    memset(&t, 0, sizeof(Task))
    return shape_of(&t) if set_plain_shape(&t, x, layout) else None


def plain_forward(x, gamma, beta, eps, layout, activation, residual, out):
    """Of plain arguments of batch_norm: the shape, and where y goes; else None."""
    cdef Task t
    memset(&t, 0, sizeof(Task))
    if not set_plain_shape(&t, x, layout):
        return None
    out = set_plain_forward(&t, x, gamma, beta, eps, activation, residual, out)
    return None if out is None else (shape_of(&t), out)


def plain_normalize(x, mean, var, gamma, beta, eps, layout, activation, residual, dtype, out_layout,
                    out):
    """The same of normalize, where y is of x's type and layout."""
    cdef Task t
    memset(&t, 0, sizeof(Task))
    if dtype is not None or out_layout is not None or not set_plain_shape(&t, x, layout):
        return None
    out = set_plain_normalize(&t, x, mean, var, gamma, beta, eps, activation, residual, out)
    return None if out is None else (shape_of(&t), out)


def plain_backward(dy, x, mean, var, gamma, eps, layout, params, activation, y, dresidual, frozen,
                   out):
    """The same of both backward functions: the shape, and where dx and dresidual go."""
    cdef Task t
    memset(&t, 0, sizeof(Task))
    if not set_plain_statistics(&t, dy, mean, var, layout, params, frozen):
        return None
    results = set_plain_backward(&t, dy, x, mean, var, gamma, eps, activation, y, dresidual, frozen,
                                 frozen and params is False, out)
    return None if results is None else (shape_of(&t), *results)
