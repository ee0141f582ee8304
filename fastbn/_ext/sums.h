/* What reductions add up, a register after the other: more would not fit at once.
 */
#ifndef FASTBN_SUMS_H
#define FASTBN_SUMS_H

#include "epilogue.h"
#include "masks.h"

/* The first n of 16 lanes' part in register i; the others become 0. */
INLINE f64_register first_lanes(f64_register a, long n, int i) {
    i64_register mask;
    memcpy(&mask, LANE_MASK64 + LANES - n + i * DOUBLES, sizeof mask);
    return (f64_register)((i64_register)a & mask);
}
/* The sum on the pipes that multiply: conversions leave little room on those that add. */
INLINE f64_register add_beside(f64_register a, f64_register b) {
#if FASTBN_WIDTH > 16 && !defined(FASTBN_PORTABLE)
    f64_register one = 1 - (f64_register){0};
    __asm__("" : "+v"(one)); /* or the compiler adds after all */
#if FASTBN_WIDTH == 64
    return _mm512_fmadd_pd(b, one, a);
#else
    return _mm256_fmadd_pd(b, one, a);
#endif
#else
    return a + b;
#endif
}
/* Add (x - shift) * unit and its square, of n values. */
INLINE void add_moments(const element *x, long n, wide shift, wide unit, wide *first,
                        wide *second) {
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) {
        const element *p = x + i * DOUBLES;
        f64_register d = (IS_WHOLE(n) ? widen(p) : widen_part(p, n, i)) - shift.r[i];
        if (!IS_WHOLE(n))
            d = first_lanes(d, n, i);
#ifdef FASTBN_F64
        d *= unit.r[i]; /* the squares of others cannot overflow float64 */
#else
        (void)unit;
#endif
        first->r[i] = add_beside(first->r[i], d);
        second->r[i] += d * d;
    }
}
/* The same of those masked that weigh anything, times their weights. */
INLINE void add_masked_moments(const element *x, mask16 some, wide weight, long n, wide shift,
                               wide unit, wide *first, wide *second) {
    lanes mask = lanes_of(some);
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) {
        const element *p = x + i * DOUBLES;
        f64_register d = (IS_WHOLE(n) ? widen(p) : widen_part(p, n, i)) - shift.r[i];
        f64_register w = weight.r[i];
        d = (f64_register)((i64_register)masked(d, mask, some, i) & (w != 0));
        if (!IS_WHOLE(n))
            d = first_lanes(d, n, i);
#ifdef FASTBN_F64
        d *= unit.r[i];
#else
        (void)unit;
#endif
        first->r[i] += d * w;
        second->r[i] += d * w * d;
    }
}
/* Add dy * (x - mean) and dy, of n values; where y is given, dy is gated. */
INLINE void add_gradients(const element *dy, const element *x, const element *y, long n, wide mean,
                          const ActivationParams *b, wide *first, wide *second) {
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) {
        const element *p = x + i * DOUBLES, *q = dy + i * DOUBLES, *r = y + i * DOUBLES;
        f64_register d = (IS_WHOLE(n) ? widen(p) : widen_part(p, n, i)) - mean.r[i];
        f64_register slope = IS_WHOLE(n) ? widen(q) : widen_part(q, n, i);
        if (!IS_WHOLE(n))
            d = first_lanes(d, n, i);
        if (b)
            slope = activation_grad_wide(slope, IS_WHOLE(n) ? widen(r) : widen_part(r, n, i), b);
        first->r[i] = add_beside(first->r[i], slope * d);
        second->r[i] = add_beside(second->r[i], slope);
    }
}
/* Of n columns of a row: add gamma * dy * (x - mean) and gamma * dy to the row's sums, and dy * xhat
 * and dy to those of the columns, which are in memory. */
INLINE void add_row_gradients(const element *dy, const element *x, const element *y, long n,
                          double mean, double rstd, const double *gamma, const ActivationParams *b,
                          wide *first, wide *second, double *column_first,
                          double *column_second) {
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) {
        const element *p = x + i * DOUBLES, *q = dy + i * DOUBLES, *r = y + i * DOUBLES;
        double *of_xhat = column_first + i * DOUBLES, *of_dy = column_second + i * DOUBLES;
        f64_register d = (IS_WHOLE(n) ? widen(p) : widen_part(p, n, i)) - mean;
        f64_register slope = IS_WHOLE(n) ? widen(q) : widen_part(q, n, i);
        f64_register scale = load_register(gamma + i * DOUBLES);
        if (!IS_WHOLE(n))
            d = first_lanes(d, n, i);
        if (b)
            slope = activation_grad_wide(slope, IS_WHOLE(n) ? widen(r) : widen_part(r, n, i), b);
        d *= slope;
        first->r[i] += d * scale;
        second->r[i] += slope * scale;
        store_register(of_xhat, load_register(of_xhat) + d * rstd);
        store_register(of_dy, add_beside(load_register(of_dy), slope));
    }
}
/* As `add_gradients`, of those masked. */
INLINE void add_masked_gradients(const element *dy, const element *x, const element *y, mask16 some,
                                 long n, wide mean, const ActivationParams *b, wide *first, wide *second) {
    lanes mask = lanes_of(some);
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) {
        const element *p = x + i * DOUBLES, *q = dy + i * DOUBLES, *r = y + i * DOUBLES;
        f64_register d = (IS_WHOLE(n) ? widen(p) : widen_part(p, n, i)) - mean.r[i];
        f64_register slope = IS_WHOLE(n) ? widen(q) : widen_part(q, n, i);
        if (b)
            slope = activation_grad_wide(slope, IS_WHOLE(n) ? widen(r) : widen_part(r, n, i), b);
        d = masked(d, mask, some, i);
        slope = masked(slope, mask, some, i);
        if (!IS_WHOLE(n))
            d = first_lanes(d, n, i);
        first->r[i] += slope * d;
        second->r[i] += slope;
    }
}

#endif
