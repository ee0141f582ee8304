/* The epilogue: an activation, and the gradient through it, which y alone gives.
 */
#ifndef FASTBN_EPILOGUE_H
#define FASTBN_EPILOGUE_H

#include "simd.h"

/* An activation: v * slope below 0, `top` above it. */
typedef struct {
    double slope;
    double top;    /* y is no larger */
    double cutoff;  /* from here on y is the top, and level; NaN where there is no top */
} ActivationParams;

INLINE ActivationParams activation_params(double slope, double top) {
    return (ActivationParams){slope, top, is_finite(top) ? top : NAN};
}
/* v * slope, and 0 for a slope of 0 whatever v is. */
INLINE vec_register sloped(vec_register v, real slope) {
    mask_register unless_zero = (mask_register){0} - (slope != 0);
    return (vec_register)((mask_register)(v * slope) & unless_zero);
}
#if FASTBN_WIDTH == 64 && !defined(FASTBN_PORTABLE)
#ifdef FASTBN_F64
#define OF_REAL(name) name##_pd
#define OF_MASK(name) name##_pd_mask
#else
#define OF_REAL(name) name##_ps
#define OF_MASK(name) name##_ps_mask
#endif
/* Intrinsics, because GCC makes vectors of masks. `then` where a <= bound, else `other`. */
INLINE vec_register up_to(vec_register a, real bound, vec_register then, vec_register other) {
    vec_register bounds = bound - (vec_register){0};
    return OF_REAL(_mm512_mask_mov)(other, OF_MASK(_mm512_cmp)(a, bounds, _CMP_LE_OQ), then);
}
/* a, and 0 where y >= bound. */
INLINE vec_register below(vec_register y, real bound, vec_register a) {
    vec_register bounds = bound - (vec_register){0};
    return OF_REAL(_mm512_maskz_mov)(OF_MASK(_mm512_cmp)(y, bounds, _CMP_NGE_UQ), a);
}
/* The lesser, and NaN where v is NaN. */
INLINE vec_register lesser(vec_register most, vec_register v) {
    return OF_REAL(_mm512_min)(most, v);
}
#else
INLINE vec_register where(mask_register mask, vec_register then, vec_register other) {
    return (vec_register)((mask & (mask_register)then) | (~mask & (mask_register)other));
}
INLINE vec_register up_to(vec_register a, real bound, vec_register then, vec_register other) {
    return where(a <= bound, then, other);
}
INLINE vec_register below(vec_register y, real bound, vec_register a) {
    return where(y >= bound, (vec_register){0}, a);
}
INLINE vec_register lesser(vec_register most, vec_register v) { return where(v > most, most, v); }
#endif
/* v <= 0 ? slope * v : min(v, top); NaN stays. */
INLINE vec activate(vec v, const ActivationParams *act) {
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++) {
        vec_register a = v.r[i], most = (real)act->top - (vec_register){0};
        v.r[i] = up_to(a, 0, sloped(a, (real)act->slope), lesser(most, a));
    }
    return v;
}
/* dy times the slope of the activation where it gave y; a NaN lets dy through. */
INLINE vec activation_grad(vec dy, vec y, const ActivationParams *act) {
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++) {
        vec_register a = dy.r[i], at = y.r[i];
        a = up_to(at, 0, sloped(a, (real)act->slope), a);
        dy.r[i] = below(at, (real)act->cutoff, a);
    }
    return dy;
}

/* As `activation_grad`, in float64. */
INLINE f64_register activation_grad_wide(f64_register dy, f64_register y,
                                         const ActivationParams *act) {
    i64_register unless_zero = (i64_register){0} - (act->slope != 0);
    f64_register sloped = (f64_register)((i64_register)(dy * act->slope) & unless_zero);
    dy = where_wide(y <= 0, sloped, dy);
    return where_wide(y >= act->cutoff, (f64_register){0}, dy);
}

#endif
