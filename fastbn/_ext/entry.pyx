# cython: embedsignature=True, embedsignature.format=clinic
"""Between Python and the kernels: fills in a Task for each call, and runs it.

1. `Engine` holds the kernels of one instruction set. Its eight functions are those of
   `base.Backend`; its plain entries do a whole public call for contiguous arrays that fit, and
   answer None, having touched nothing, for everything else: only then Python checks and explains.
2. One chapter a file: schedule.pxi (chunks, and the order of work), scratch.pxi (the tables between
   the passes), arrays.pxi (NumPy's arrays as operands and tables), copies.pxi (from one memory order
   to another), frames.pxi (arrays of other types or in another order), parts.pxi (what is joined, and
   what is done in parts), plain.pxi (what is plain), runtime.h (calls in flight, forks).
"""

import numpy as np

from fastbn import activations
from fastbn._ext import pool
from fastbn._pool import SMALLEST
from fastbn.backends import tuning as sizes
from fastbn.backends.base import rows_per_sum
from fastbn.elements import is_bfloat16
from fastbn.layouts import ALL_CHANNELS, EACH_CHANNEL, LAYOUTS, SHORT, are_rows

cimport numpy as cnp
from cython cimport floating
from cython.parallel cimport prange
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport INFINITY, isfinite
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

from fastbn._ext.task cimport (
    AFFINE, AHEAD, GRADIENT_MOMENTS, INPUT_GRADIENT, INTEGER_SUMS, MOMENTS, MOST_MASKED_ROWS, NO_MAP,
    NO_REDUCE, PACKED, STORED_BFLOAT16, STORED_ELEMENT, STORED_FLOAT16, STORED_INT16, STORED_INT8,
    STORED_UINT16, STORED_UINT8, WIDE, Frame, Map, Operand, Reduce, Run, Table, Task, pitch_of,
    stored, sums_pitch,
)

cnp.import_array()

cdef extern from "runtime.h":
    bint flushes() nogil
    int is_serial
    int enter_call() nogil
    void leave_call() nogil
    int guard_forks() nogil

cdef extern from "transpose.h":
    void transpose(const char*, long, char*, long, long, long, int) noexcept nogil

if guard_forks() != 0:
    raise MemoryError("fastbn: no memory for the handlers that make fork safe")

include "schedule.pxi"
include "scratch.pxi"
include "arrays.pxi"
include "copies.pxi"
include "frames.pxi"
include "parts.pxi"
include "plain.pxi"


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

    cdef int run_task(self, Task* t, cnp.ndarray x, int threads) except -1:
        """Cut into chunks and parts, schedule, run: on what other calls in flight leave."""
        cdef int element = element_of(x), calls
        with nogil:
            set_element(t, element)
            join_planes(t)
            join_runs(t)
            use_values_as_means(t, element)
            set_chunks(t)
            set_groups(t)
            calls = enter_call()
            try:
                run_parts(t, self.runs[element], max(1, threads // calls))
            finally:
                leave_call()
        return 0

    cdef int run_pieces(self, Task* t, int element, int threads) except -1:
        """Map frames."""
        cdef int calls
        cdef char* memory = NULL
        t.reduce, t.map = NO_REDUCE, AFFINE
        with nogil:
            calls = enter_call()
            try:
                schedule(t, max(1, threads // calls))
                set_pieces(t, t.threads)
                set_scratch(t, &memory)
                self.runs[element](t)
            finally:
                PyMem_RawFree(memory)
                leave_call()
        return 0

    cdef tuple with_tables(self, Task* t, cnp.ndarray x, int threads, Py_ssize_t pool=1):
        """Run with fresh (G, C / pool) tables for the results, and return them."""
        cdef cnp.ndarray first = new_table(t, pool)
        cdef cnp.ndarray second = new_table(t, pool, has_one_value(t))
        t.first, t.second = table(first), table(second)
        t.first.pool = t.second.pool = pool
        self.run_task(t, x, threads)
        return first, second

    cdef cnp.ndarray backward_by_column(self, Task* t, cnp.ndarray x, object gamma, int threads):
        """Run, and give the sums of columns, (2, P, S)."""
        cdef cnp.npy_intp size
        cdef cnp.ndarray sums, columns, doubles
        columns = new_columns(t, gamma, None, arithmetic_type(t))
        doubles = new_columns(t, gamma, None, cnp.NPY_FLOAT64)
        set_columns(t, columns)
        t.gamma_wide = <const double*> cnp.PyArray_DATA(doubles)
        t.rows_per_sum = rows_per_sum(t.period, t.S, t.C)
        size = ceil_div(t.C, t.rows_per_sum) * 2 * t.period * t.places + LINE
        sums = at_line(cnp.PyArray_EMPTY(1, &size, cnp.NPY_FLOAT64, 0))
        t.column_sums = <double*> cnp.PyArray_DATA(sums)
        self.run_task(t, x, threads)
        sums = sums[: 2 * t.period * t.places].reshape(2, t.period, t.places)
        return sums[:, :, : t.S]

    cdef tuple sum_runs(self, Task* t, cnp.ndarray x, int threads):
        """Run, some runs and channels at a time, whose tables of sums are small, and add up the
        sums of all runs, one after the other."""
        cdef Py_ssize_t limit = verb_limit(t) // sum_bytes, C, G, g, c = 0
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

    def walks(self, cnp.ndarray view, Py_ssize_t pool=1):
        """Whether a view can be processed where it lies: folded rows must be dense, and so must
        what is summed as one plane."""
        cdef Py_ssize_t N = cnp.PyArray_DIM(view, 1), C = cnp.PyArray_DIM(view, 2)
        cdef Py_ssize_t S = cnp.PyArray_DIM(view, 3), itemsize = cnp.PyArray_ITEMSIZE(view)
        cdef bint dense_rows = N == 1 or cnp.PyArray_STRIDE(view, 1) == C * itemsize
        cdef Task t
        memset(&t, 0, sizeof(Task))
        set_view(&t, view, 1)
        if t.fold > 1 or pool == C and S == 1:
            return dense_rows
        return pool == 1 or S == 1 or cnp.PyArray_STRIDE(view, 2) == S * itemsize

    def copy(self, cnp.ndarray a, cnp.ndarray out, int threads):
        copy(a, out, threads)

    def moments(self, cnp.ndarray x, int threads, selection=None):
        cdef Task t = new_task(x, MOMENTS, NO_MAP, selection)
        t.x = operand(&t, x)
        return self.with_tables(&t, x, threads)

    def normalize(self, cnp.ndarray x, affine, cnp.ndarray out, int threads, epilogue=None,
                  selection=None):
        cdef Task t = new_task(x, NO_REDUCE, AFFINE, selection)
        t.x, t.out = operand(&t, x), operand(&t, out)
        t.mean, t.gamma, t.beta = table(affine.mean), table(affine.scale), table(affine.beta)
        fuse_epilogue(&t, epilogue)
        self.run_task(&t, x, threads)

    def gradient_moments(self, cnp.ndarray dy, cnp.ndarray x, cnp.ndarray mean, int threads,
                         activation_grad=None, selection=None):
        cdef Task t = new_task(x, GRADIENT_MOMENTS, NO_MAP, selection)
        t.x, t.dy = operand(&t, x), operand(&t, dy)
        t.mean = table(mean)
        fuse_activation_grad(&t, activation_grad, False)
        sum_dy_xmu, sum_dy = self.with_tables(&t, x, threads)
        return sum_dy, sum_dy_xmu

    def input_gradient(self, cnp.ndarray dy, x, coefficients, cnp.ndarray out, int threads,
                       activation_grad=None, selection=None):
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
        fuse_activation_grad(&t, activation_grad, True)
        self.run_task(&t, dy, threads)

    def forward(self, cnp.ndarray x, tables, cnp.ndarray out, int threads, epilogue=None,
                selection=None):
        cdef Task t = new_task(x, MOMENTS, AFFINE, selection, tables.pool)
        t.x, t.out = operand(&t, x), operand(&t, out)
        set_parameters(&t, tables.gamma, tables.beta)
        t.eps = tables.eps
        fuse_epilogue(&t, epilogue)
        return self.with_tables(&t, x, threads, t.pool)

    def backward(self, cnp.ndarray dy, cnp.ndarray x, tables, cnp.ndarray out, int threads,
                 activation_grad=None, selection=None):
        cdef Map map = AFFINE if tables.is_fixed else INPUT_GRADIENT
        cdef Task t = new_task(x, GRADIENT_MOMENTS, map, selection, tables.pool)
        t.x, t.dy, t.out = operand(&t, x), operand(&t, dy), operand(&t, out)
        t.mean, t.var = table(tables.mean), table(tables.var)
        set_parameters(&t, tables.gamma, None)
        t.mean.pool, t.var.pool, t.eps = t.pool, t.pool, tables.eps
        fuse_activation_grad(&t, activation_grad, True)
        return self.with_tables(&t, x, threads)

    # Rows, by column: gamma and beta are contiguous (P, S) tables

    def forward_rows(self, cnp.ndarray x, tables, cnp.ndarray out, int threads, epilogue=None,
                     mask=None):
        cdef Task t = new_row_task(x, tables, MOMENTS, AFFINE, mask)
        t.x, t.out = operand(&t, x), operand(&t, out)
        columns = new_columns(&t, tables.gamma, tables.beta, arithmetic_type(&t))
        set_columns(&t, columns)
        fuse_epilogue(&t, epilogue)
        return self.with_tables(&t, x, threads)

    def backward_rows(self, cnp.ndarray dy, cnp.ndarray x, tables, cnp.ndarray out, int threads,
                      activation_grad=None, mask=None, dsum=None):
        cdef Task t = new_row_task(x, tables, GRADIENT_MOMENTS, INPUT_GRADIENT, mask)
        t.x, t.dy, t.out = operand(&t, x), operand(&t, dy), operand(&t, out)
        t.mean, t.var = table(tables.mean), table(tables.var)
        fuse_activation_grad(&t, activation_grad, True)
        if dsum is not None:
            t.residual = operand(&t, dsum)
        dgamma, dbeta = self.backward_by_column(&t, x, tables.gamma, threads)
        return dgamma, dbeta

    # Arrays of other types, or in another order: (N, C, S), of which channels or values lie together

    def normalize_into(self, cnp.ndarray x, affine, cnp.ndarray out, int threads, epilogue=None):
        cdef int element
        cdef Task t
        memset(&t, 0, sizeof(Task))
        t.slope, t.top = 1, INFINITY
        if epilogue is not None:
            t.slope, t.top, t.curve = epilogue.activation
        element = element_of_frames(x, out, t.curve)
        t.arriving, t.leaving = frame(x, element), frame(out, element)
        if epilogue is not None:
            if epilogue.residual is not None:
                t.beside = frame(epilogue.residual, element)
        set_frames(&t, cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1), cnp.PyArray_DIM(x, 2), element)
        t.mean, t.gamma, t.beta = table(affine.mean), table(affine.scale), table(affine.beta)
        self.run_pieces(&t, element, threads)

    def integer_sums(self, cnp.ndarray x, int threads):
        cdef int calls
        cdef cnp.npy_intp[3] shape
        cdef cnp.ndarray sums
        cdef Task t
        memset(&t, 0, sizeof(Task))
        t.arriving = t.leaving = frame(x, F32)
        set_frames(&t, cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1), cnp.PyArray_DIM(x, 2), F32)
        t.reduce, t.map = INTEGER_SUMS, NO_MAP
        calls = enter_call()
        try:
            schedule(&t, max(1, threads // calls))
            set_pieces(&t, t.threads)
            shape[0], shape[1], shape[2] = t.threads, 2, t.channels
            sums = cnp.PyArray_ZEROS(3, shape, cnp.NPY_INT64, 0)
            t.integer_sums = <long long*> cnp.PyArray_DATA(sums)
            with nogil:
                self.runs[<int> F32](&t)
        finally:
            leave_call()
        both = sums.view(np.uint64).sum(0)
        return both[0].view(np.int64), both[1]

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
        var = new_vector(t.channels, cnp.NPY_FLOAT64, has_one_value(&t))
        t.first, t.second = table(mean), table(var)
        self.run_task(&t, x, threads)
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
        var = new_vector(t.channels, cnp.NPY_FLOAT64, has_one_value(&t))
        t.first, t.second = table(mean), table(var)
        self.run_task(&t, x, threads)
        return out, mean, var

    def plain_samples(self, x, groups, samples, gamma, beta, eps, layout, activation, residual,
                      out, int threads):
        cdef Task t
        memset(&t, 0, sizeof(Task))
        shape = set_plain_samples(&t, x, layout, groups, samples)
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

    def plain_normalize(self, x, mean, var, gamma, beta, eps, layout, activation, residual, dtype,
                        out_layout, out, int threads):
        cdef Task t
        memset(&t, 0, sizeof(Task))
        if dtype is None and out_layout is None and set_plain_shape(&t, x, layout):
            y = set_plain_normalize(&t, x, mean, var, gamma, beta, eps, activation, residual, out)
            if y is not None:
                self.run_task(&t, x, threads)
                return y
            memset(&t, 0, sizeof(Task))
        if residual is not None:
            return None
        if not set_activation(&t, activation, True):
            return None
        y = set_plain_frames(&t, x, layout, dtype, out_layout, out)
        if y is None or not (set_plain_constants(&t, mean, var)
                             and set_plain_parameters(&t, gamma, beta, eps)
                             and all_apart(y, mean, var, gamma, beta)):
            return None
        self.run_pieces(&t, element_of_frames(x, y, t.curve), threads)
        return y

    def plain_frozen(self, affine, str layout, activation, dtype, out_layout):
        """The plain entry of a frozen batch norm."""
        cdef Frozen made = Frozen(self, len(affine.mean), layout, activation, dtype, out_layout)
        cdef Task t
        cdef Run run
        memset(&t, 0, sizeof(Task))
        t.G, t.C, t.channels, t.fold, t.S = 1, made.channels, made.channels, 1, 1
        t.channels_last, t.reduce, t.map, t.slope = True, NO_REDUCE, AFFINE, 1
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
        cdef bint dx_only = frozen and params is False
        if not set_plain_statistics(&t, dy, mean, var, layout, params, frozen):
            return None
        results = set_plain_backward(&t, dy, x, mean, var, gamma, eps, activation, y, dresidual,
                                     frozen, dx_only, out)
        if results is None:
            return None
        out, dresidual = results
        if not dx_only:
            element = gradient_type(dy if gamma is None else gamma)
            dgamma, dbeta = new_vector(t.channels, element), new_vector(t.channels, element)
            t.first, t.second = table(dgamma), table(dbeta)
        self.run_task(&t, dy, threads)
        if params is False:
            return out, None, None, dresidual
        return out, dgamma, dbeta, dresidual

    def plain_rows(self, x, gamma, beta, eps, bint is_centred, skip, where, activation, residual, out,
                   int threads):
        cdef Task t
        memset(&t, 0, sizeof(Task))
        if not set_plain_rows(&t, x, where) or not (skip is None or is_like(skip, x)):
            return None
        if out is not None and not (is_plain_out(out, x) and in_place_or_apart(out, x)
                                    and in_place_or_apart(out, skip) and all_apart(out, where)):
            return None
        total = x if skip is None else empty_like(x)
        y = set_plain_forward(&t, total, gamma, beta, eps, activation, residual, out)
        if y is None:
            return None
        t.about_zero = not is_centred
        if skip is not None:
            t.x, t.skip, t.sum = dense(&t, x), dense(&t, skip), t.x
        columns = new_columns(&t, gamma, beta, arithmetic_type(&t))
        set_columns(&t, columns)
        mean, var = self.with_tables(&t, x, threads)
        return y, mean, var, total

    def plain_rows_backward(self, dy, x, mean, var, gamma, eps, where, dsum, params, activation,
                            y, dresidual, out, int threads):
        cdef Task t
        cdef int element
        memset(&t, 0, sizeof(Task))
        if not set_plain_rows(&t, x, where) or not is_like(dy, x) or type(params) is not bool:
            return None
        # Sums over rows are those of parts of them where tables of all would not be small.
        if t.C * row_bytes > verb_limit(&t):
            return None
        if not are_statistics(var, x.shape[:-1]):
            return None
        if dsum is not None and not (is_like(dsum, x) and activation is None and dresidual is False):
            return None
        t.var, t.about_zero = sample_table(&t, var), mean is None
        if mean is not None:
            if not are_statistics(mean, x.shape[:-1]):
                return None
            t.mean = sample_table(&t, mean)
        results = set_plain_backward(&t, dy, x, mean, var, gamma, eps, activation, y, dresidual,
                                     False, False, out)
        if results is None:
            return None
        out, dresidual = results
        for result in results:
            if result is not None and not all_apart(result, where, dsum):
                return None
        if dsum is not None:
            t.residual = dense(&t, dsum)
        sums = self.backward_by_column(&t, x, gamma, threads).reshape(2, -1)
        if not params:
            return out, None, None, dresidual
        element = gradient_type(dy if gamma is None else gamma)
        return out, rounded(sums[0], element), rounded(sums[1], element), dresidual

    def plain_samples_backward(self, dy, x, groups, samples, mean, var, gamma, eps, layout, params,
                               activation, y, dresidual, out, int threads):
        cdef Task t
        cdef int element
        memset(&t, 0, sizeof(Task))
        shape = set_plain_samples(&t, x, layout, groups, samples)
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
            sums = self.backward_by_column(&t, x, gamma, threads).reshape(2, -1)
        else:
            sums = self.sum_runs(&t, x, threads)
        if not params:
            return out, None, None, dresidual
        element = gradient_type(dy if gamma is None else gamma)
        return out, rounded(sums[0], element), rounded(sums[1], element), dresidual


cdef void fuse_epilogue(Task* t, object epilogue):
    t.slope, t.top = 1, INFINITY
    if epilogue is None:
        return
    t.slope, t.top, _ = epilogue.activation
    if epilogue.residual is not None:
        t.residual = operand(t, epilogue.residual)


cdef void fuse_activation_grad(Task* t, object activation_grad, bint maps):
    """The activation's gradient and, in a map, where dy times it is stored."""
    t.slope, t.top = 1, INFINITY
    if activation_grad is None:
        return
    t.slope, t.top, _ = activation_grad.activation
    t.y = operand(t, activation_grad.y)
    if maps and activation_grad.dresidual is not None:
        t.dresidual = operand(t, activation_grad.dresidual)


cdef Task new_task(cnp.ndarray x, int reduce, int map, object selection, Py_ssize_t pool=1):
    """A task on x's (G, N, C, S) shape."""
    cdef Task t
    memset(&t, 0, sizeof(Task))
    set_view(&t, x, pool)
    t.reduce, t.map, t.pool = <Reduce> reduce, <Map> map, pool
    t.verb_bytes = verb_bytes
    if reduce == MOMENTS or (reduce != NO_REDUCE and t.map != NO_MAP):
        t.verb_bytes = sum_bytes
    if selection is not None:
        select_places(&t, selection.mask, selection.weights, selection.counts)
    return t


cdef Task new_row_task(cnp.ndarray x, object tables, int reduce, int map, object mask):
    """A task on rows, with as many rows of gamma as there are."""
    cdef Task t = new_task(x, reduce, map, None)
    set_shape(&t, 1, 1, cnp.PyArray_DIM(x, 2), cnp.PyArray_DIM(x, 3), False)
    set_element(&t, element_of(x))
    t.period, t.eps = cnp.PyArray_DIM(tables.gamma, 0), tables.eps
    t.about_zero = not tables.is_centred
    if mask is not None:
        t.row_mask = <unsigned char*> cnp.PyArray_DATA(mask)
    return t


cdef int select_places(Task* t, cnp.ndarray mask, object weights, cnp.ndarray counts) except -1:
    """Which places count, and how much."""
    t.mask, t.mask_g = <unsigned char*> cnp.PyArray_DATA(mask), cnp.PyArray_STRIDE(mask, 0)
    t.counts = <double*> cnp.PyArray_DATA(counts)
    if weights is not None:
        t.weights = <double*> cnp.PyArray_DATA(weights)
        t.weights_g = cnp.PyArray_DIM(weights, 1)
        t.weight_samples = cnp.PyArray_DIM(mask, 1) // t.weights_g
    return 0


cdef void set_view(Task* t, cnp.ndarray x, Py_ssize_t pool) noexcept:
    """The shape of a (G, N, C, S) array."""
    cdef Py_ssize_t N = cnp.PyArray_DIM(x, 1), S = cnp.PyArray_DIM(x, 3)
    set_shape(t, cnp.PyArray_DIM(x, 0), N, cnp.PyArray_DIM(x, 2), S, is_channels_last(N, S, pool))


cdef class Frozen:
    """A frozen batch norm's packed coefficients, in both types of arithmetic, and all else that its
    calls have in common."""

    cdef Engine engine
    cdef Py_ssize_t channels
    cdef str layout
    cdef object dtype, out_layout
    cdef double slope, top
    cdef int curve
    cdef object memory
    cdef char* single
    cdef char* double
    cdef unsigned char[2] extreme   # of these two

    def __init__(self, Engine engine, Py_ssize_t channels, str layout, activation, dtype,
                 out_layout):
        cdef Py_ssize_t bytes_of_reals = 4 * pitch_of(channels) * sizeof(double)
        cdef char* free
        self.engine, self.channels, self.layout = engine, channels, layout
        self.dtype, self.out_layout = dtype, out_layout
        self.slope, self.top, self.curve = activation
        self.memory = bytearray(2 * bytes_of_reals + LINE)
        free = self.memory
        self.single = free + (-<size_t> free & (LINE - 1))
        self.double = self.single + bytes_of_reals

    def normalize(self, x, residual, out, int threads):
        y = None
        if self.dtype is None and self.out_layout is None and self.curve == 0:
            y = self.normalize_alike(x, residual, out, threads)
        if y is None and residual is None:
            y = self.normalize_into(x, out, threads)
        return y

    cdef object normalize_alike(self, object x, object residual, object out, int threads):
        """y of x's type and layout, or None."""
        cdef Task t
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
        t.reduce, t.map = NO_REDUCE, AFFINE
        t.x, t.out = dense(&t, x), dense(&t, out)
        self.set_coefficients(&t, x)
        self.engine.run_task(&t, x, threads)
        return out

    cdef object normalize_into(self, object x, object out, int threads):
        """y of another type or in another layout, or None."""
        cdef Task t
        memset(&t, 0, sizeof(Task))
        t.curve = self.curve
        y = set_plain_frames(&t, x, self.layout, self.dtype, self.out_layout, out)
        if y is None or t.channels != self.channels:
            return None
        self.set_coefficients(&t, x)
        self.engine.run_pieces(&t, element_of_frames(x, y, t.curve), threads)
        return y

    cdef void set_coefficients(self, Task* t, object x):
        cdef bint wide = cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT64
        t.slope, t.top = self.slope, self.top
        t.prepared = self.double if wide else self.single
        t.extreme = self.extreme + wide
