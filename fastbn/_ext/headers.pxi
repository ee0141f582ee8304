# What C gives to the kernels, header by header.

cdef extern from "simd.h" nogil:
    ctypedef float real     # or double: C knows; so mixed expressions are double here
    ctypedef float element  # what memory holds: a real, or a half type
    ctypedef struct vec:
        pass
    ctypedef struct wide:
        pass
    vec vload(const element* p)
    vec vload_some(const element* p, long n)
    vec vload_any(const element* p, long n)
    void vstore(element* p, vec v)
    void vstore_part(element* p, vec v, long n)
    void vstore_some(element* p, vec v, long n)
    void vstore_any(element* p, vec v, long n)
    void vstream(element* p, vec v)
    void stream_fence()
    const int BOUND         # bytes; streaming starts at a multiple
    void vsplat_each(vec* v, const real* p, long pitch, int count)
    void vload_each(vec* v, const real* p, long pitch, int count)
    vec vsplat(real a)
    const int Y_HI, Y_SCALE, Y_SHIFT, Y_ROWS, Y_X_SCALE     # rows of packed coefficients
    const int DX_DHI, DX_A, DX_HI, DX_LO, DX_B, DX_REST, DX_ROWS, DX_DY_SCALE, DX_X_SCALE
    vec affine(vec x, const vec* k)
    vec gradient_weighed(vec dy, vec x, vec w, const vec* k)
    vec gradient(vec dy, vec x, const vec* k)
    vec vadd(vec a, vec b)
    vec vmul(vec a, vec b)
    wide wload_table(const double* p)
    wide wload_table_part(const double* p, long n)
    void wstore_table(double* p, wide w)
    wide wsplat(double a)
    wide wadd(wide a, wide b)
    wide wsub(wide a, wide b)
    double wsum(wide a)
    double value_of(const element* p)
    bint is_finite(double a)

cdef extern from "masks.h" nogil:
    ctypedef struct mask16:     # which of sixteen places count
        pass
    ctypedef struct lanes:      # the same, as a mask of lanes
        pass
    mask16 mask_load(const unsigned char* p)
    mask16 mask_broadcast(const unsigned char* p)
    mask16 mask_load_before(const unsigned char* end, const unsigned char* p)
    mask16 mask_permute(mask16 numbers, mask16 some)
    mask16 sample_numbers(const unsigned char* p)
    lanes lanes_of(mask16 some)
    vec vand(vec v, lanes mask)
    ctypedef struct weights:    # what samples weigh
        const double* first
        const double* end
        long left, each
    wide weights_by(const weights* p, mask16 numbers)
    vec vweights_by(const weights* p, mask16 numbers)

cdef extern from "epilogue.h" nogil:
    ctypedef struct ActivationParams:
        pass
    ActivationParams activation_params(double slope, double top)
    vec activate(vec v, const ActivationParams* act)
    vec activation_grad(vec dy, vec y, const ActivationParams* act)

cdef extern from "sums.h" nogil:
    ctypedef struct Sources:
        const element* x
        const element* dy
        const element* y
    ctypedef struct SumPair:
        wide* first
        wide* second
    ctypedef struct RowGradient:
        double mean, rstd
        const ActivationParams* act
    void add_moments(Sources p, long n, wide shift, wide unit, SumPair sums)
    void add_gradients(Sources p, long n, wide mean, const ActivationParams* act, SumPair sums)
    void add_row_gradients(Sources p, long n, const RowGradient* row, const double* gamma,
                           SumPair sums, double* column, long pitch)
    void add_masked_moments(Sources p, mask16 mask, wide weight, long n, wide shift, wide unit,
                            SumPair sums)
    void add_masked_gradients(Sources p, mask16 mask, long n, wide mean,
                              const ActivationParams* act, SumPair sums)

cdef extern from "finalize.h" nogil:
    ctypedef double doubles "f64_register"   # C knows how many
    const int DOUBLES
    doubles load(const double* p, long i)
    void store(double* p, long i, doubles a)
    void store_reals(real* p, long i, doubles a)
    doubles rounded_to_real(doubles a)
    doubles splat(double a)
    doubles inverse_root(doubles a)
    doubles divide(doubles a, double n, double inverse)
    double exact_inverse(double n)
    doubles not_negative(doubles a)
    doubles product(doubles difference, doubles factor)
    ctypedef long long lane_mask "i64_register"
    lane_mask all_lanes()
    bint every_lane(lane_mask mask)
    lane_mask usual_scales(doubles a)
    lane_mask usual_slopes(doubles a)
    lane_mask usual_means(doubles a)
    doubles sqrt_pow2(doubles a)
    doubles gradient_pow2(doubles b, doubles rstd, doubles mean)
    doubles inverse_of_power(doubles a)
    doubles saturated(doubles a)

cdef extern from "tiles.h" nogil:
    void read_tile(int type, element* to, long to_step, const char* source, long step, long rows,
                   long columns, bint turned)
    void write_tile(int type, char* to, long to_step, const element* tile, long step, long rows,
                    long columns, bint stream)

cdef extern from "curves.h" nogil:
    void apply_curve(int kind, element* tile, long n)

cdef extern from "integers.h" nogil:
    void add_integers(int type, const char* data, bint by_rows, long c_step, long s_step, long C,
                      long S, long long* sums, long long* squares)

cdef extern from "machine.h" nogil:
    ctypedef struct fp_mode:
        pass
    fp_mode enter_usual_mode()
    void leave_mode(fp_mode was)
    void prefetch(const element* p, bint wanted)
    void set_flag(unsigned char* flag)
    long fetch_add(long* counter, long by)
    int thread_number()
    int team_size()
    void team_barrier()
