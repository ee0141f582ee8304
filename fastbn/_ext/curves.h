/* Curves: the smooth activations of inference, of values that lie in a tile.
 *
 * 1. They cost more than all else that is done to a value, so they are a pass of their own, over what
 *    the loops have just left in the cache; in the arithmetic's type, before anything is rounded to a
 *    half type.
 * 2. e^v for v <= 0: with n the whole number nearest to v / ln 2, e^v = 2^n e^r and |r| <= ln(2) / 2.
 *    Taylor's series of e^r is short enough there. n ln 2 is subtracted in two parts, of which the
 *    first has so few digits that the product is exact. 2^n is multiplied by in two steps, for it may
 *    be no normal number where the result is subnormal.
 * 3. Only additions, multiplications, divisions and bits: the same on every instruction set.
 */
#ifndef FASTBN_CURVES_H
#define FASTBN_CURVES_H

#include "epilogue.h"

/* In the order of CURVES in activations.py. */
enum curve { NO_CURVE, HARD_SIGMOID, HARD_SWISH, SILU };

#ifndef FASTBN_HALF
/* `then` where a is below b, which NaN is not, else `other`. */
#define SELECT_BELOW(a, b, then, other)                                                            \
    ({                                                                                             \
        mask_register below_ = (mask_register)((a) < (b));                                         \
        (vec_register)((below_ & (mask_register)(then)) | (~below_ & (mask_register)(other)));     \
    })
#define EACH(x) ((vec_register){0} + (real)(x))

#ifdef FASTBN_F64
enum { MANTISSA = 52, BIAS = 1023, TERMS = 13 };
#define LOWEST -0x1.fffffffffffffp1023
#define SMALLEST_EXPONENT -746.0 /* below, e^v is 0 */
#define ROUNDER 0x1.8p52         /* added, it leaves a whole number in the last bits */
#define LN2_HIGH 0x1.62e42fefap-1
#define LN2_LOW 0x1.cf79abc9e3b3ap-40 /* LN2_HIGH + LN2_LOW = ln 2 */
#else
enum { MANTISSA = 23, BIAS = 127, TERMS = 7 };
#define LOWEST -0x1.fffffep127
#define SMALLEST_EXPONENT -104.0
#define ROUNDER 0x1.8p23
#define LN2_HIGH 0x1.62ep-1
#define LN2_LOW 0x1.0bfbe8p-15
#endif

/* 1 / k! */
static const double INVERSE_FACTORIALS[] = {
    1.0,           1.0,            1.0 / 2,        1.0 / 6,         1.0 / 24,
    1.0 / 120,     1.0 / 720,      1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
    1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};

/* 2^n of whole numbers that are normal there. */
INLINE vec_register two_to_the(mask_register n) {
    return (vec_register)((n + BIAS) << MANTISSA);
}
/* e^v, v <= 0; NaN stays. */
INLINE vec_register exponential(vec_register v) {
    v = SELECT_BELOW(v, EACH(SMALLEST_EXPONENT), EACH(SMALLEST_EXPONENT), v);
    vec_register shifted = v * (real)1.4426950408889634 + (real)ROUNDER;
    mask_register n = (mask_register)shifted - (mask_register)EACH(ROUNDER);
    vec_register whole = shifted - (real)ROUNDER;
    vec_register r = v - whole * (real)LN2_HIGH - whole * (real)LN2_LOW;
    vec_register sum = EACH(INVERSE_FACTORIALS[TERMS]);
    UNROLLED (int k = TERMS - 1; k >= 0; k--) sum = sum * r + (real)INVERSE_FACTORIALS[k];
    mask_register half = n >> 1;
    return sum * two_to_the(half) * two_to_the(n - half);
}
/* 1 / (1 + e^-v), from e^-|v|, which does not overflow. */
INLINE vec_register sigmoid(vec_register v) {
    vec_register zero = {0};
    vec_register e = exponential(SELECT_BELOW(v, zero, v, -v));
    return SELECT_BELOW(v, zero, e, EACH(1)) / (1 + e);
}
/* min(max(v + 3, 0), 6) / 6; NaN stays. */
INLINE vec_register hard_sigmoid(vec_register v) {
    vec_register zero = {0}, six = EACH(6), raised = v + 3;
    raised = SELECT_BELOW(raised, zero, zero, raised);
    return SELECT_BELOW(six, raised, six, raised) / 6;
}
INLINE vec_register curve_of(int kind, vec_register v) {
    if (kind == HARD_SIGMOID) return hard_sigmoid(v);
    vec_register zero = {0}, share = kind == SILU ? sigmoid(v) : hard_sigmoid(v);
    /* A share of 0 of -infinity is 0. */
    return SELECT_BELOW(v, EACH(LOWEST), zero, v * share);
}
/* n values of a tile, which has room for a whole register. */
#define EACH_REGISTER(KIND)                                                                        \
    for (long i = 0; i < n; i += ELEMENTS) {                                                       \
        vec_register v;                                                                            \
        memcpy(&v, tile + i, sizeof v);                                                            \
        v = curve_of(KIND, v);                                                                     \
        memcpy(tile + i, &v, sizeof v);                                                            \
    }
static void apply_curve(int kind, element *tile, long n) {
    if (kind == SILU) {
        EACH_REGISTER(SILU)
    } else if (kind == HARD_SWISH) {
        EACH_REGISTER(HARD_SWISH)
    } else {
        EACH_REGISTER(HARD_SIGMOID)
    }
}
#else
/* The kernels of float32 do it, which read and write half types. */
static void apply_curve(int kind, element *tile, long n) { (void)kind, (void)tile, (void)n; }
#endif

#endif
