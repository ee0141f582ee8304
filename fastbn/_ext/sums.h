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
/* a + b as b*1 + a, which has the same bits: conversions to float64 keep the ports busy that add, a
 * multiplication with addition may use others. */
INLINE f64_register add_by_fma(f64_register a, f64_register b) {
#if FASTBN_WIDTH > 16 && !defined(FASTBN_PORTABLE)
    f64_register one = splat(1);
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
/* Register i of n values, in float64; absent lanes are 0. */
INLINE f64_register widen_any(const element *p, long n, int i) {
    p += i * DOUBLES;
    return IS_WHOLE(n) ? widen(p) : widen_part(p, n, i);
}
/* x - mean; absent lanes are 0, not -mean. */
INLINE f64_register centred(const element *x, f64_register mean, long n, int i) {
    f64_register d = widen_any(x, n, i) - mean;
    return IS_WHOLE(n) ? d : first_lanes(d, n, i);
}

/* Where values are that are summed: of moments x alone; y is the activation's output. */
typedef struct { const element *x, *dy, *y; } Sources;
/* Where two sums are. */
typedef struct { wide *first, *second; } SumPair;

/* dy times the slope of the activation, where there is one. */
INLINE f64_register dy_of(Sources p, long n, int i, const ActivationParams *act) {
    f64_register dy = widen_any(p.dy, n, i);
    return act ? activation_grad_wide(dy, widen_any(p.y, n, i), act) : dy;
}
/* Add (x - shift) * unit and its square, of n values. */
INLINE void add_moments(Sources p, long n, wide shift, wide unit, SumPair sums) {
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) {
        f64_register d = centred(p.x, shift.r[i], n, i);
#ifdef FASTBN_F64
        d *= unit.r[i]; /* the squares of others cannot overflow float64 */
#else
        (void)unit;
#endif
        sums.first->r[i] = add_by_fma(sums.first->r[i], d);
        sums.second->r[i] += d * d;
    }
}
/* The same where the mask is set and the weight is not 0, times weights. */
INLINE void add_masked_moments(Sources p, mask16 mask, wide weight, long n, wide shift, wide unit,
                               SumPair sums) {
    lanes set = lanes_of(mask);
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) {
        f64_register d = centred(p.x, shift.r[i], n, i), w = weight.r[i];
        d = (f64_register)((i64_register)masked(d, set, mask, i) & (w != 0));
#ifdef FASTBN_F64
        d *= unit.r[i];
#else
        (void)unit;
#endif
        sums.first->r[i] += d * w;
        sums.second->r[i] += d * w * d;
    }
}
/* Add dy * (x - mean) and dy, of n values; where `act` is given, dy is first multiplied by the
 * activation's slope at y. */
INLINE void add_gradients(Sources p, long n, wide mean, const ActivationParams *act, SumPair sums) {
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) {
        f64_register d = centred(p.x, mean.r[i], n, i), dy = dy_of(p, n, i, act);
        sums.first->r[i] = add_by_fma(sums.first->r[i], dy * d);
        sums.second->r[i] = add_by_fma(sums.second->r[i], dy);
    }
}
/* The same where the mask is set. */
INLINE void add_masked_gradients(Sources p, mask16 mask, long n, wide mean,
                                 const ActivationParams *act, SumPair sums) {
    lanes set = lanes_of(mask);
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) {
        f64_register d = masked(centred(p.x, mean.r[i], n, i), set, mask, i);
        f64_register dy = masked(dy_of(p, n, i, act), set, mask, i);
        sums.first->r[i] += dy * d;
        sums.second->r[i] += dy;
    }
}
/* What is the same for all columns of a row (of layer norm). */
typedef struct {
    double mean, rstd;
    const ActivationParams *act;
} RowGradient;
/* Of n columns of a row: add gamma * dy * (x - mean) and gamma * dy to the row's sums, and
 * dy * xhat and, `pitch` on, dy to those of the columns, which are in memory. */
INLINE void add_row_gradients(Sources p, long n, const RowGradient *row, const double *gamma,
                              SumPair sums, double *column, long pitch) {
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) {
        double *of_xhat = column + i * DOUBLES, *of_dy = of_xhat + pitch;
        f64_register d = centred(p.x, splat(row->mean), n, i), dy = dy_of(p, n, i, row->act);
        f64_register scale = load_register(gamma + i * DOUBLES);
        d *= dy;
        sums.first->r[i] += d * scale;
        sums.second->r[i] += dy * scale;
        store_register(of_xhat, load_register(of_xhat) + d * row->rstd);
        store_register(of_dy, add_by_fma(load_register(of_dy), dy));
    }
}

#endif
