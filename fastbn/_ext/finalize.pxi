# Finalize: from sums to coefficients, in float64, for channels [c0, c1) of run g.
#
# 1. Sixty-four channels at a time are gathered into arrays of their own, padded to whole vectors.
#    Loops over these take a register of float64 after the other, without branches, so that square
#    roots and divisions are done for several channels at once.
# 2. y = (x - hi)*scale + shift has scale = gamma*rstd and shift = beta - lo*scale, where hi is the
#    mean as the element type has it, and lo what remains. dx = a*(dy - dy_mean) + b*xhat is
#    (dy - dhi)*a + (((x - hi) - lo)*b*rstd + rest) with what the roundings of dy_mean and of lo
#    lose in `rest`. Coefficients stand in rows, `pitch` apart.
# 3. The last rows are x_scale and dy_scale, powers of two by which x and dy are multiplied where
#    coefficients are so extreme that a product would leave the element type's range. They are 1
#    everywhere else, and the loops leave them out but for runs that are marked `extreme`.

cdef enum:
    STEP = 64           # channels that are finalized at a time


cdef inline Py_ssize_t registers(Py_ssize_t count) noexcept nogil:
    """Of float64, in arrays that are padded."""
    return (count + DOUBLES - 1) // DOUBLES


cdef inline Py_ssize_t channels_of_run(const Task* t, Py_ssize_t c1) noexcept nogil:
    """Where the channels of a block of columns end: folded rows hold each several times."""
    return min(c1, t.channels)


cdef void gather_pooled(const Table* table, Py_ssize_t g, Py_ssize_t c, Py_ssize_t count,
                        double* values) noexcept nogil:
    cdef Py_ssize_t i = 0, end
    cdef double value
    while i < count:
        value = table_value(table, g, c + i, 0)
        end = min(i + table.pool - (c + i) % table.pool, count)
        while i < end:
            values[i] = value
            i += 1


cdef void gather_periodic(const Table* table, Py_ssize_t g, Py_ssize_t c, Py_ssize_t count,
                          double* values) noexcept nogil:
    cdef Py_ssize_t i, place = (c + table.phase) % table.period
    cdef const char* row = table.data + g * table.g
    for i in range(count):
        if table.single:
            values[i] = (<const float*> (row + place * table.c))[0]
        else:
            values[i] = (<const double*> (row + place * table.c))[0]
        place = place + 1 if place + 1 < table.period else 0


cdef void store_ones(double* values) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(STEP):
        values[i] = 1


# Defaults of `gather`, as many as are finalized at a time.
cdef double[STEP] zeros, ones
memset(zeros, 0, sizeof(zeros))
store_ones(ones)


cdef const double* gather(const Table* table, Py_ssize_t g, Py_ssize_t c, Py_ssize_t count,
                          const double* default, double* values) noexcept nogil:
    """`count` entries from channel c on, as they lie or in `values`; the default where there are
    none."""
    cdef const char* row = table.data + g * table.g + c * table.c
    cdef bint dense = table.pool <= 1 and table.period == 0
    cdef Py_ssize_t i
    if table.data == NULL:
        return default
    if dense and not table.single and table.c == sizeof(double) and count % DOUBLES == 0:
        return <const double*> row
    for i in range(count, (count + 15) // 16 * 16):
        values[i] = default[0]
    if table.pool > 1:
        gather_pooled(table, g, c, count, values)
    elif table.period > 0:
        gather_periodic(table, g, c, count, values)
    elif table.single and table.c == sizeof(float):
        for i in range(count):
            values[i] = (<const float*> row)[i]
    else:
        for i in range(count):
            values[i] = table_value(table, g, c + i, default[0])
    return values


cdef void scatter(const Table* table, Py_ssize_t g, Py_ssize_t c, Py_ssize_t count,
                  const double* values) noexcept nogil:
    """`count` entries of a dense table of results, from channel c on, if it is wanted."""
    cdef char* row = table.data + g * table.g + c * table.c
    cdef Py_ssize_t i
    if table.data == NULL:
        return
    if table.single:
        for i in range(count):
            (<float*> row)[i] = <float> values[i]
    else:
        memcpy(row, values, count * sizeof(double))


cdef inline const double* padded(const Task* t, double* row, Py_ssize_t c, Py_ssize_t count,
                                 double* aside) noexcept nogil:
    """Entries of a table of the task from channel c on, with zeros up to a whole register: as they
    lie or, where others' follow, aside."""
    cdef Py_ssize_t i
    if count % DOUBLES == 0:
        return row + c
    if c + count == t.channels:     # what follows is needed no more
        for i in range(count, registers(count) * DOUBLES):
            row[c + i] = 0
        return row + c
    store(aside, count // DOUBLES, splat(0))
    memcpy(aside, row + c, count * sizeof(double))
    return aside


cdef struct Rows:
    # Where some channels' coefficients are written: in their rows or, where a register reaches into
    # the next channels, which may be another thread's, aside.
    real* first
    Py_ssize_t pitch
    real[PACKED * STEP] aside


cdef inline void begin_rows(Rows* rows, const Task* t, Py_ssize_t g, Py_ssize_t c,
                            Py_ssize_t count) noexcept nogil:
    rows.first, rows.pitch = packed(t, g) + c, t.pitch
    if count % DOUBLES != 0 and c + count < t.channels:
        rows.first, rows.pitch = rows.aside, STEP


cdef inline void end_rows(const Rows* rows, const Task* t, Py_ssize_t g, Py_ssize_t c,
                          Py_ssize_t count, Py_ssize_t used) noexcept nogil:
    cdef Py_ssize_t i
    if rows.first == rows.aside:
        for i in range(used):
            memcpy(packed(t, g) + i * t.pitch + c, rows.aside + i * STEP, count * sizeof(real))


cdef inline void put_row(const Rows* rows, Py_ssize_t row, Py_ssize_t i,
                         doubles a) noexcept nogil:
    store_reals(rows.first + row * rows.pitch, i, a)


# ---- Moments ----

cdef void first_values(const element* x, Py_ssize_t stride, Py_ssize_t count,
                       double* values) noexcept nogil:
    """The values of some channels at one place."""
    cdef Py_ssize_t i
    if stride == 1:
        for i in range(count):
            values[i] = value_of(x + i)
    else:
        for i in range(count):
            values[i] = value_of(x + i * stride)


cdef inline const element* first_place(const Task* t, Py_ssize_t g, Py_ssize_t c) noexcept nogil:
    """Channel c's first value that weighs anything."""
    cdef Py_ssize_t step = t.fold if t.channels_last else t.S
    cdef Py_ssize_t n = t.starts[g] // step, rest = t.starts[g] % step
    if t.channels_last:
        return at(&t.x, g, n, c + rest * t.channels)
    return at(&t.x, g, n, c) + rest


cdef void set_shift(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """What is subtracted before summing: each channel's first value, or its given mean."""
    cdef Py_ssize_t c, count, end = channels_of_run(t, c1)
    cdef double* shift = t.shift + g * t.pitch
    cdef double* unit = t.unit + g * t.pitch
    cdef double[STEP] values
    cdef const double* found = values
    for c in range(c0, c1):
        unit[c] = 1
    for c in range(c0, end, 64):
        count = min(STEP, end - c)
        if t.reduce == MOMENTS:
            first_values(first_place(t, g, c), t.x.c, count, values)
        else:
            found = gather(&t.mean, g, c, count, zeros, values)
        memcpy(shift + c, found, count * sizeof(double))
    for c in range(t.channels, t.C if t.fold > 1 else 0):
        shift[c] = shift[c - t.channels]


cdef inline bint is_doubtful(const Task* t, Py_ssize_t g, Py_ssize_t c,
                             double per_value) noexcept nogil:
    """Whether the shift was too far from the mean, or the squares too large, for the sums."""
    cdef double sum_d = t.total[g * 2 * t.pitch + c]
    cdef double sum_dd = t.total[(g * 2 + 1) * t.pitch + c]
    # |m| <= 16 s, said in sums: m*m <= 256 var = 256 (sum_dd/n - m*m), so m*m * 257/256 <=
    # sum_dd/n.
    cdef bint fits = is_finite(sum_dd) & (sum_d * (sum_d * per_value) * (257 / 256.) <= sum_dd)
    return is_finite(sum_d) & (not fits)


cdef void sum_again(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Sum the doubtful channels about the mean just found; the others come out as they were."""
    cdef Py_ssize_t c, v, j
    cdef double m, count = count_at(t, g), per_value = 1 / count
    cdef bint any_doubtful = False
    for c in range(c0, channels_of_run(t, c1)):
        any_doubtful |= is_doubtful(t, g, c, per_value)
    if not any_doubtful:
        return
    for c in range(c0, channels_of_run(t, c1)):
        if is_doubtful(t, g, c, per_value):
            m = t.total[g * 2 * t.pitch + c] / count
            for v in range(t.fold):
                t.shift[g * t.pitch + v * t.channels + c] += m
                if not is_finite(t.total[(g * 2 + 1) * t.pitch + c]):
                    t.unit[g * t.pitch + v * t.channels + c] = ldexp(1, -600)
    for j in range(t.chunks):
        reduce_chunk(t, g, c0, c1, j)
        if t.n_partials < t.chunks:
            add_chunk(t, g, c0, c1, j)
    merge(t, g, c0, c1)


cdef inline double* moments_of_channels(const Task* t, Py_ssize_t g) noexcept nogil:
    """Mean and variance of channels that are pooled."""
    return t.channel_moments + g * 2 * t.pitch


cdef void finish_moments(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Sums -> mean and biased variance, into the results."""
    cdef Py_ssize_t c, i, count, end = channels_of_run(t, c1)
    cdef double* total = t.total + g * 2 * t.pitch
    cdef double[STEP] mean, var, sums, squares, shifts, units
    cdef const double* sum
    cdef const double* square
    cdef const double* shift
    cdef const double* unit
    cdef double values = count_at(t, g), inverse = exact_inverse(values)
    cdef doubles m, v, u
    sum_again(t, g, c0, c1)
    for c in range(c0, end, 64):
        count = min(STEP, end - c)
        sum = padded(t, total, c, count, sums)
        square = padded(t, total + t.pitch, c, count, squares)
        shift = padded(t, t.shift + g * t.pitch, c, count, shifts)
        unit = padded(t, t.unit + g * t.pitch, c, count, units)
        for i in range(registers(count)):
            m = divide(load(sum, i), values, inverse)
            u = inverse_of_power(load(unit, i))
            v = not_negative(divide(load(square, i), values, inverse) - m * m) * u * u
            m = load(shift, i) + m * u
            store(mean, i, splat(0) if t.about_zero else m)
            store(var, i, v + m * m if t.about_zero else v)
        if t.pool > 1:
            memcpy(moments_of_channels(t, g) + c, mean, count * sizeof(double))
            memcpy(moments_of_channels(t, g) + t.pitch + c, var, count * sizeof(double))
        else:
            scatter(&t.first, g, c, count, mean)
            scatter(&t.second, g, c, count, var)
    for c in range((end - c0) // t.pool if t.pool > 1 else 0):
        pool_moments(t, g, c0 // t.pool + c)


cdef void pool_moments(const Task* t, Py_ssize_t g, Py_ssize_t group) noexcept nogil:
    """Its channels' means and variances -> a group's: no two large squares are subtracted (Chan,
    Golub & LeVeque 1983, equation 2.1)."""
    cdef const double* mean = moments_of_channels(t, g) + group * t.pool
    cdef const double* var = mean + t.pitch
    cdef Py_ssize_t i
    cdef double together = 0, square = 0
    for i in range(t.pool):
        together += mean[i] - mean[0]
    together = mean[0] + together / t.pool
    for i in range(t.pool):
        square += (var[i] + (mean[i] - together) * (mean[i] - together)) * (1. / t.pool)
    scatter(&t.first, g, group, 1, &together)
    scatter(&t.second, g, group, 1, &square)


# ---- Coefficients of y ----

cdef void invert_pooled(const Table* var, double eps, Py_ssize_t c, Py_ssize_t count,
                        double* values) noexcept nogil:
    """Variances of channels -> 1 / sqrt(var + eps), once for each group."""
    cdef Py_ssize_t i = 0, end
    cdef double rstd
    while i < count:
        rstd = 1 / sqrt(values[i] + eps) if values[i] + eps != 0 else 0
        end = min(i + var.pool - (c + i) % var.pool, count)
        while i < end:
            values[i] = rstd
            i += 1


cdef struct Variances:
    # Some channels' variances or, where they are pooled or there are none, 1 / sqrt(var + eps).
    const double* values
    double eps
    bint inverted


cdef inline Variances gather_variances(const Task* t, const Table* var, Py_ssize_t g,
                                         Py_ssize_t c, Py_ssize_t count,
                                         double* aside) noexcept nogil:
    cdef Variances k
    k.values, k.eps = gather(var, g, c, count, ones, aside), t.eps
    k.inverted = var.pool > 1 or var.data == NULL
    if var.pool > 1 and var.data != NULL:
        invert_pooled(var, t.eps, c, count, aside)
    return k


cdef inline doubles load_rstd(const Variances* k, Py_ssize_t i) noexcept nogil:
    """1 / sqrt(var + eps), and 0 where that sum is 0: the channel is constant, y = beta. 1 without
    variances, when gamma already is the scale."""
    return load(k.values, i) if k.inverted else inverse_root(load(k.values, i) + k.eps)


cdef inline lane_mask put_affine(const Rows* rows, Py_ssize_t i, bint extreme, doubles mean,
                                 doubles scale, doubles beta) noexcept nogil:
    """Write a register of channels' rows hi, scale, shift of y = (x - hi)*scale + shift; which do
    without x_scale."""
    cdef doubles x_scale = splat(1)
    cdef lane_mask usual = usual_scales(scale)
    if extreme:
        x_scale = sqrt_pow2(scale)
        mean = mean * x_scale
        scale = scale * inverse_of_power(x_scale)
    put_row(rows, Y_SHIFT, i, beta - product(mean - rounded_to_real(mean), scale))
    if extreme:
        scale = saturated(scale)
    put_row(rows, Y_HI, i, mean)
    put_row(rows, Y_SCALE, i, scale)
    put_row(rows, Y_X_SCALE, i, x_scale)
    return usual


cdef bint pack_affine(const Task* t, Py_ssize_t g, Py_ssize_t c, Py_ssize_t count,
                      bint extreme) noexcept nogil:
    """Some channels' mean, var, gamma, beta -> coefficients of y; whether all are usual."""
    cdef double[STEP] means, vars, gammas, betas
    cdef const Table* table = &t.second if t.reduce == MOMENTS else &t.var
    cdef const double* mean = gather(&t.first if t.reduce == MOMENTS else &t.mean, g, c, count,
                                     zeros, means)
    cdef Variances rstd = gather_variances(t, table, g, c, count, vars)
    cdef const double* gamma = gather(&t.gamma, g, c, count, ones, gammas)
    cdef const double* beta = gather(&t.beta, g, c, count, zeros, betas)
    cdef lane_mask usual = all_lanes()
    cdef doubles scale
    cdef Rows rows
    cdef Py_ssize_t i
    begin_rows(&rows, t, g, c, count)
    for i in range(registers(count)):
        scale = load_rstd(&rstd, i) * load(gamma, i)
        usual &= put_affine(&rows, i, extreme, load(mean, i), scale, load(beta, i))
    end_rows(&rows, t, g, c, count, Y_X_SCALE + 1)
    return every_lane(usual)


# ---- Coefficients of dx ----

cdef struct Gradient:
    # A register of channels' dx = a*(dy - dy_mean) + b*xhat + rest, xhat = (x - mean)*rstd.
    doubles a, b, dy_mean, mean, rstd, rest


cdef inline lane_mask put_gradient(const Rows* rows, Py_ssize_t i, bint extreme,
                                   Gradient k) noexcept nogil:
    """Write the rows dhi, a, hi, lo, b, rest of dx = (dy - dhi)*a + (((x - hi) - lo)*b + rest);
    which channels do without x_scale and dy_scale. hi + lo is the mean to twice the element type's
    digits. What dhi and lo lose in rounding goes into rest, so that dy = mean(dy) gives 0."""
    cdef doubles dy_scale = splat(1), x_scale = splat(1), lo
    cdef lane_mask usual = usual_scales(k.a) & usual_slopes(k.b * k.rstd) & usual_means(k.mean)
    if extreme:
        dy_scale = sqrt_pow2(k.a)
        x_scale = gradient_pow2(k.b, k.rstd, k.mean)
        k.a = k.a * inverse_of_power(dy_scale)
        k.dy_mean = k.dy_mean * dy_scale
        k.rstd = k.rstd * inverse_of_power(x_scale)
        k.mean = k.mean * x_scale
    k.b = k.b * k.rstd
    lo = k.mean - rounded_to_real(k.mean)
    k.rest = k.rest - product(k.dy_mean - rounded_to_real(k.dy_mean), k.a)
    put_row(rows, DX_REST, i, k.rest - product(lo - rounded_to_real(lo), k.b))
    if extreme:
        k.a, k.b = saturated(k.a), saturated(k.b)
    put_row(rows, DX_DHI, i, k.dy_mean)
    put_row(rows, DX_A, i, k.a)
    put_row(rows, DX_HI, i, k.mean)
    put_row(rows, DX_LO, i, lo)
    put_row(rows, DX_B, i, k.b)
    put_row(rows, DX_DY_SCALE, i, dy_scale)
    put_row(rows, DX_X_SCALE, i, x_scale)
    return usual


cdef bint pack_gradient(const Task* t, Py_ssize_t g, Py_ssize_t c, Py_ssize_t count,
                        bint extreme) noexcept nogil:
    """Some channels' sums of dy * (x - mean) and of dy -> dgamma and dbeta, into the results, and
    the coefficients of dx or, by fixed statistics, of its affine map; whether all are usual."""
    cdef double[STEP] means, vars, gammas, sums_dy_xhat, sums_dy, dgamma
    cdef double* total = t.total + g * 2 * t.pitch
    cdef const double* sum_dy_xhat = padded(t, total, c, count, sums_dy_xhat)
    cdef const double* sum_dy = padded(t, total + t.pitch, c, count, sums_dy)
    cdef const double* mean = gather(&t.mean, g, c, count, zeros, means)
    cdef Variances rstd = gather_variances(t, &t.var, g, c, count, vars)
    cdef const double* gamma = gather(&t.gamma, g, c, count, ones, gammas)
    cdef double values = count_at(t, g), inverse = exact_inverse(values)
    cdef lane_mask usual = all_lanes()
    cdef doubles dy_xhat, dy
    cdef Gradient k
    cdef Rows rows
    cdef Py_ssize_t i
    begin_rows(&rows, t, g, c, count)
    k.rest = splat(0)
    for i in range(registers(count)):
        k.rstd = load_rstd(&rstd, i)
        dy_xhat, dy = load(sum_dy_xhat, i) * k.rstd, load(sum_dy, i)
        store(dgamma, i, dy_xhat)
        k.a, k.mean = load(gamma, i) * k.rstd, load(mean, i)
        if t.map == INPUT_GRADIENT:
            k.b = -k.a * divide(dy_xhat, values, inverse)
            k.dy_mean = splat(0) if t.about_zero else divide(dy, values, inverse)
            usual &= put_gradient(&rows, i, extreme, k)
        elif t.map == AFFINE:
            usual &= put_affine(&rows, i, extreme, splat(0), k.a, splat(0))
    if t.map != NO_MAP:
        end_rows(&rows, t, g, c, count, rows_written(t))
    scatter(&t.first, g, c, count, dgamma)
    scatter(&t.second, g, c, count, sum_dy)
    return every_lane(usual)


cdef bint pack_pooled(const Task* t, Py_ssize_t g, Py_ssize_t c, Py_ssize_t count,
                      bint extreme) noexcept nogil:
    """The same of means over groups: nothing is taken off dy before gamma multiplies it, which is
    a channel's own."""
    cdef double[STEP] means, vars, gammas, means_dy_xhat, means_dy
    cdef double* total = t.total + g * 2 * t.pitch
    cdef const double* dy_xhat = padded(t, total, c, count, means_dy_xhat)
    cdef const double* dy = padded(t, total + t.pitch, c, count, means_dy)
    cdef const double* mean = gather(&t.mean, g, c, count, zeros, means)
    cdef Variances rstd = gather_variances(t, &t.var, g, c, count, vars)
    cdef const double* gamma = gather(&t.gamma, g, c, count, ones, gammas)
    cdef lane_mask usual = all_lanes()
    cdef Gradient k
    cdef Rows rows
    cdef Py_ssize_t i
    begin_rows(&rows, t, g, c, count)
    k.dy_mean = splat(0)
    for i in range(registers(count)):
        k.rstd = load_rstd(&rstd, i)
        k.a, k.mean = load(gamma, i) * k.rstd, load(mean, i)
        k.b, k.rest = load(dy_xhat, i) * -k.rstd, load(dy, i) * -k.rstd
        usual &= put_gradient(&rows, i, extreme, k)
    end_rows(&rows, t, g, c, count, PACKED)
    return every_lane(usual)


cdef bint pack_given(const Task* t, Py_ssize_t g, Py_ssize_t c, Py_ssize_t count,
                     bint extreme) noexcept nogil:
    """The same of given coefficients."""
    cdef double[STEP] as_, bs, dy_means, means, rstds, rests
    cdef const double* a = gather(&t.a, g, c, count, zeros, as_)
    cdef const double* b = gather(&t.b, g, c, count, zeros, bs)
    cdef const double* dy_mean = gather(&t.dy_mean, g, c, count, zeros, dy_means)
    cdef const double* mean = gather(&t.mean, g, c, count, zeros, means)
    cdef const double* rstd = gather(&t.rstd, g, c, count, ones, rstds)
    cdef const double* rest = gather(&t.rest, g, c, count, zeros, rests)
    cdef lane_mask usual = all_lanes()
    cdef Gradient k
    cdef Rows rows
    cdef Py_ssize_t i
    begin_rows(&rows, t, g, c, count)
    for i in range(registers(count)):
        k.a, k.b, k.dy_mean = load(a, i), load(b, i), load(dy_mean, i)
        k.mean, k.rstd, k.rest = load(mean, i), load(rstd, i), load(rest, i)
        usual &= put_gradient(&rows, i, extreme, k)
    end_rows(&rows, t, g, c, count, PACKED)
    return every_lane(usual)


cdef void sum_gradients(const Task* t, Py_ssize_t g, Py_ssize_t c, Py_ssize_t count) noexcept nogil:
    """Sums of dy * (x - mean) and of dy -> dgamma and dbeta of channels that are pooled, into the
    results and in place of the sums."""
    cdef double[STEP] vars, sums, dy_xhat
    cdef double* total = t.total + g * 2 * t.pitch
    cdef const double* sum = padded(t, total, c, count, sums)
    cdef Variances rstd = gather_variances(t, &t.var, g, c, count, vars)
    cdef Py_ssize_t i
    for i in range(registers(count)):
        store(dy_xhat, i, load(sum, i) * load_rstd(&rstd, i))
    memcpy(total + c, dy_xhat, count * sizeof(double))
    scatter(&t.first, g, c, count, total + c)
    scatter(&t.second, g, c, count, total + t.pitch + c)


cdef void pool_gradients(const Task* t, Py_ssize_t g, Py_ssize_t c0) noexcept nogil:
    """dgamma and dbeta of a group's channels -> the means of gamma*dy*xhat and gamma*dy."""
    cdef double* total = t.total + g * 2 * t.pitch
    cdef double[STEP] gammas
    cdef const double* gamma
    cdef double dy_xhat = 0, dy = 0, values = count_at(t, g)
    cdef Py_ssize_t c, i, count, end = c0 + t.pool
    for c in range(c0, end, 64):
        count = min(STEP, end - c)
        gamma = gather(&t.gamma, g, c, count, ones, gammas)
        for i in range(count):
            dy_xhat += gamma[i] * total[c + i]
            dy += gamma[i] * total[t.pitch + c + i]
    dy_xhat, dy = dy_xhat / (values * t.pool), dy / (values * t.pool)
    for c in range(c0, end):
        total[c], total[t.pitch + c] = dy_xhat, dy


cdef inline int rows_written(const Task* t) noexcept nogil:
    """How many rows of coefficients the map has."""
    return PACKED if t.map == INPUT_GRADIENT else Y_X_SCALE + 1


# ---- All channels of a block ----

cdef bint pack(const Task* t, Py_ssize_t g, Py_ssize_t c, Py_ssize_t count,
               bint extreme) noexcept nogil:
    """Write some channels' coefficients of whatever the map is; whether all are usual."""
    if t.reduce == GRADIENT_MOMENTS and t.pool > 1:
        return pack_pooled(t, g, c, count, extreme)
    if t.reduce == GRADIENT_MOMENTS:
        return pack_gradient(t, g, c, count, extreme)
    if t.map == INPUT_GRADIENT:
        return pack_given(t, g, c, count, extreme)
    return pack_affine(t, g, c, count, extreme)


cdef void finish_coefficients(const Task* t, Py_ssize_t g, Py_ssize_t c0,
                              Py_ssize_t c1) noexcept nogil:
    """Sums of gradients -> results; and the packed coefficients of the map, if there is one."""
    cdef Py_ssize_t c, count, end = channels_of_run(t, c1)
    if t.reduce == GRADIENT_MOMENTS and t.pool > 1:
        for c in range(c0, end, 64):
            sum_gradients(t, g, c, min(STEP, end - c))
        for c in range((end - c0) // t.pool):
            pool_gradients(t, g, c0 + c * t.pool)
    for c in range(c0, end, 64):
        count = min(STEP, end - c)
        if not pack(t, g, c, count, False):
            set_flag(&t.extreme[g])
            pack(t, g, c, count, True)
    if t.map != NO_MAP:
        repeat(t, packed(t, g), c0, rows_written(t))


cdef void repeat(const Task* t, real* row, Py_ssize_t c0, int rows) noexcept nogil:
    """The channels' coefficients once for each sample in a row of memory, and their beginning
    once more behind the end, for vectors that are streamed and reach into the next row."""
    cdef bint reaches = c0 == 0 and t.channels_last and t.stream
    cdef Py_ssize_t i, done, more, end = t.pitch if reaches else t.C
    for i in range(rows):
        done = t.channels
        while done < end:
            more = min(done, end - done)
            memcpy(row + done, row, more * sizeof(real))
            done += more
        row += t.pitch


cdef void unpack(const Task* t, Py_ssize_t g, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Coefficients that were packed before, for rows of memory that hold several samples."""
    cdef const real* row = <const real*> t.prepared
    cdef Py_ssize_t i, pitch = pitch_of(t.channels), end = channels_of_run(t, c1)
    if t.fold == 1:
        return
    for i in range(Y_X_SCALE + 1):
        memcpy(packed(t, g) + i * t.pitch + c0, row + i * pitch + c0, (end - c0) * sizeof(real))
    repeat(t, packed(t, g), c0, Y_X_SCALE + 1)


cdef void finalize(const Task* t, const Task* summed, Py_ssize_t g, Py_ssize_t c0,
                   Py_ssize_t c1) noexcept nogil:
    """Sums -> results and coefficients; `summed` is the task, or all of its groups."""
    cdef Py_ssize_t first = 0 if t.grouped else c0, end = summed.C if t.grouped else c1
    if t.prepared != NULL:
        unpack(t, g, c0, c1)
        return
    if t.reduce != NO_REDUCE:
        merge(summed, g, first, end)
    if t.reduce == MOMENTS:
        finish_moments(summed, g, first, end)
    if t.reduce == GRADIENT_MOMENTS or t.map != NO_MAP:
        finish_coefficients(t, g, c0, c1)
