/* From sums to coefficients, a register of float64 at a time.
 */
#ifndef FASTBN_FINALIZE_H
#define FASTBN_FINALIZE_H

#include "simd.h"

/* Register i of a table. */
INLINE f64_register load(const double *p, long i) { return load_register(p + i * DOUBLES); }
INLINE void store(double *p, long i, f64_register a) { store_register(p + i * DOUBLES, a); }
INLINE f64_register square_root(f64_register a) {
#if defined(FASTBN_PORTABLE)
    return (f64_register){sqrt(a[0]), sqrt(a[1])};
#elif FASTBN_WIDTH == 64
    return _mm512_sqrt_pd(a);
#elif FASTBN_WIDTH == 32
    return _mm256_sqrt_pd(a);
#else
    return _mm_sqrt_pd(a);
#endif
}
/* 1 / sqrt(a), and 0 for 0. */
INLINE f64_register inverse_root(f64_register a) {
    f64_register inverse = 1 / square_root(a);
    return (f64_register)((i64_register)inverse & (a != 0));
}
/* a / n; `inverse` is 1 / n where that is exact, else 0. */
INLINE f64_register divide(f64_register a, double n, double inverse) {
    return inverse != 0 ? a * inverse : a / n;
}
/* a, and 0 where it is negative. */
INLINE f64_register not_negative(f64_register a) {
    return (f64_register)((i64_register)a & ~(a < 0));
}
/* The product, and 0 for a difference of 0, whatever the factor. */
INLINE f64_register product(f64_register difference, f64_register factor) {
    return (f64_register)((i64_register)(difference * factor) & (difference != 0));
}
INLINE f64_register magnitude(f64_register a) {
    return (f64_register)((i64_register)a & INT64_MAX);
}
INLINE i64_register all_lanes(void) { return ~(i64_register){0}; }
INLINE int every_lane(i64_register mask) {
    int64_t all = -1;
    UNROLLED (int i = 0; i < DOUBLES; i++) all &= mask[i];
    return all != 0;
}
/* Which are 0, not finite, or between these bounds. */
INLINE i64_register is_special_or_between(f64_register a, double least, double most) {
    f64_register size = magnitude(a);
    return ((size > least) & (size < most)) | (size == 0) | ~(size <= DBL_MAX);
}
/* Coefficients for which the element type's products stay in range without x_scale and dy_scale; so
 * are 0, infinity and NaN, which no scale helps. */
INLINE i64_register usual_scales(f64_register a) { return is_special_or_between(a, 1e-18, 1e18); }
/* For the slope of x - mean the bounds are wider, since x - mean is itself in range. For the mean
 * the lower one is narrower: lo, its last digits, must stay normal. */
INLINE i64_register usual_slopes(f64_register a) { return is_special_or_between(a, 1e-36, 1e36); }
INLINE i64_register usual_means(f64_register a) { return is_special_or_between(a, 1e-20, 1e36); }
/* A power of two near |a|, in the range of the element type; 1 for 0, infinity and NaN. */
INLINE f64_register power_of_two(f64_register a) {
    f64_register size = magnitude(a), least = splat(LEAST_POWER), most = splat(MOST_POWER);
    f64_register power = (f64_register)((i64_register)a & INT64_C(0x7ff0000000000000));
    power = where_wide(power < least, least, power);
    power = where_wide(power > most, most, power);
    return where_wide((size != 0) & (size <= DBL_MAX), power, splat(1));
}
/* Numbers within a factor of two of sqrt(|a|), by halving the exponent; some power for 0. */
INLINE f64_register rough_root(f64_register a) {
    i64_register bits = ((i64_register)magnitude(a) >> 1) + (INT64_C(1023) << 51);
    return (f64_register)bits;
}
/* 1 for usual scales; else a power of two near |a|'s square root. */
INLINE f64_register sqrt_pow2(f64_register a) {
    return where_wide(usual_scales(a), splat(1), power_of_two(rough_root(a)));
}
/* 1 / a for a power of two: the exponent mirrored about 0. */
INLINE f64_register inverse_of_power(f64_register a) {
    return (f64_register)((INT64_C(2046) << 52) - (i64_register)a);
}
/* x_scale, a power of two P near rstd * sqrt|b|: (x - mean)*P is then near xhat * sqrt|b|, and
 * b*rstd/P near sqrt|b|. Smaller where mean*P would overflow. */
INLINE f64_register gradient_pow2(f64_register b, f64_register rstd, f64_register mean) {
    f64_register wanted = rstd * where_wide(b != 0, rough_root(b), splat(1));
    f64_register most = FARTHEST / magnitude(mean);
    return power_of_two(where_wide(wanted < most, wanted, most));
}
/* a, with finite values cut to the largest of the element type: as infinity, a coefficient would
 * turn 0 into NaN. */
INLINE f64_register saturated(f64_register a) {
    f64_register nearest = where_wide(a < -LARGEST, splat(-LARGEST), a);
    nearest = where_wide(nearest > LARGEST, splat(LARGEST), nearest);
    return where_wide(magnitude(a) <= DBL_MAX, nearest, a);
}
#ifdef FASTBN_F64
INLINE f64_register rounded_to_real(f64_register a) { return a; }
INLINE void store_reals(real *p, long i, f64_register a) { store(p, i, a); }
#else
/* As the type of arithmetic has it. */
INLINE f64_register rounded_to_real(f64_register a) {
    return __builtin_convertvector(__builtin_convertvector(a, f32_half), f64_register);
}
INLINE void store_reals(real *p, long i, f64_register a) {
    f32_half half = __builtin_convertvector(a, f32_half);
    memcpy(p + i * DOUBLES, &half, sizeof half);
}
#endif
/* 1 / n where that is a power of two, else 0. */
INLINE double exact_inverse(double n) {
    int exponent;
    return frexp(n, &exponent) == 0.5 && abs(exponent) < 1000 ? ldexp(1, 1 - exponent) : 0;
}

#endif
