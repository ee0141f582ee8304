/* Masks and weights: which of sixteen places count, a byte each, and what their samples weigh.
 */
#ifndef FASTBN_MASKS_H
#define FASTBN_MASKS_H

#include "simd.h"

typedef uint8_t mask16 __attribute__((vector_size(LANES)));

/* Sixteen bytes in a row. */
INLINE mask16 mask_load(const uint8_t *p) {
    mask16 some;
    memcpy(&some, p, sizeof some);
    return some;
}
/* One byte, sixteen times. */
INLINE mask16 mask_broadcast(const uint8_t *p) { return (mask16){0} + *p; }
/* Sixteen in a row, and zeros past the end. */
OF_PART mask16 mask_load_before(const uint8_t *end, const uint8_t *p) {
    mask16 some = {0};
    if (end - p >= LANES)
        return mask_load(p);
    memcpy(&some, p, end - p);
    return some;
}
/* For each lane the byte of its number, from 0 to 15. */
INLINE mask16 mask_permute(mask16 numbers, mask16 bytes) {
#if FASTBN_WIDTH > 16 && !defined(FASTBN_PORTABLE)
    return (mask16)_mm_shuffle_epi8((__m128i)bytes, (__m128i)numbers);
#else
    mask16 some;
    for (int i = 0; i < LANES; i++)
        some[i] = bytes[numbers[i]];
    return some;
#endif
}
/* The first sixteen numbers (of which bytes are enough), counted from the first of them. */
INLINE mask16 sample_numbers(const uint8_t *p) { return mask_load(p) - p[0]; }

#if FASTBN_WIDTH == 64 && !defined(FASTBN_PORTABLE)
/* A bit a lane. */
typedef struct { __mmask16 bits; } lanes;
INLINE lanes lanes_of(mask16 some) {
    return (lanes){_mm_test_epi8_mask((__m128i)some, (__m128i)some)};
}
INLINE vec vand(vec v, lanes mask) {
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++)
#ifdef FASTBN_F64
        v.r[i] = _mm512_maskz_mov_pd((__mmask8)(mask.bits >> i * DOUBLES), v.r[i]);
#else
        v.r[i] = _mm512_maskz_mov_ps(mask.bits, v.r[i]);
#endif
    return v;
}
/* Register i of float64. */
INLINE f64_register masked(f64_register a, lanes mask, mask16 some, int i) {
    (void)some;
    return _mm512_maskz_mov_pd((__mmask8)(mask.bits >> i * DOUBLES), a);
}
#else
/* All bits of a lane, or none. */
typedef struct { mask_register r[VEC_REGISTERS]; } lanes;
typedef uint8_t element_bytes __attribute__((vector_size(ELEMENTS)));
typedef uint8_t double_bytes __attribute__((vector_size(DOUBLES)));
INLINE lanes lanes_of(mask16 some) {
    lanes mask;
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++) {
        element_bytes part;
        memcpy(&part, (const uint8_t *)&some + i * ELEMENTS, sizeof part);
        mask.r[i] = __builtin_convertvector(part, mask_register) != 0;
    }
    return mask;
}
INLINE vec vand(vec v, lanes mask) {
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++)
        v.r[i] = (vec_register)((mask_register)v.r[i] & mask.r[i]);
    return v;
}
/* Register i of float64. */
INLINE f64_register masked(f64_register a, lanes mask, mask16 some, int i) {
    double_bytes part;
    (void)mask;
    memcpy(&part, (const uint8_t *)&some + i * DOUBLES, sizeof part);
    return (f64_register)((i64_register)a & (__builtin_convertvector(part, i64_register) != 0));
}
#endif

/* ---- Weights of samples ---- */

INLINE vec vnarrow(wide w) {
#ifdef FASTBN_F64
    return w;
#else
    vec v;
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) {
        f32_half half = __builtin_convertvector(w.r[i], f32_half);
        memcpy((char *)&v + i * sizeof half, &half, sizeof half);
    }
    return v;
#endif
}

/* Sixteen samples' weights: `left` of them have the first, then each has `each` samples. */
typedef struct {
    const double *first, *end;
    long left, each;
} weights;

INLINE wide weights_permuted(const double *p, mask16 numbers) {
#if FASTBN_WIDTH == 64 && !defined(FASTBN_PORTABLE)
    wide w;
    __m512d low = _mm512_loadu_pd(p), high = _mm512_loadu_pd(p + DOUBLES);
    __m128i upper = _mm_unpackhi_epi64((__m128i)numbers, (__m128i)numbers);
    w.r[0] = _mm512_permutex2var_pd(low, _mm512_cvtepu8_epi64((__m128i)numbers), high);
    w.r[1] = _mm512_permutex2var_pd(low, _mm512_cvtepu8_epi64(upper), high);
    return w;
#elif FASTBN_WIDTH == 32 && !defined(FASTBN_PORTABLE)
    wide w;
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) {
        __m128i four = _mm_cvtsi32_si128(((__v4si)numbers)[i]);
        w.r[i] = _mm256_i32gather_pd(p, _mm_cvtepu8_epi32(four), sizeof *p);
    }
    return w;
#else
    double w[LANES];
    UNROLLED (int i = 0; i < LANES; i++)
        w[i] = p[numbers[i]];
    return wload_table(w);
#endif
}
/* By a division for each lane: where few samples weigh alike, and at the end. */
static __attribute__((noinline, unused)) wide weights_counted(const weights *p, mask16 numbers) {
    double w[LANES];
    for (int i = 0; i < LANES; i++) {
        long at = numbers[i] < p->left ? 0 : 1 + (numbers[i] - p->left) / p->each;
        w[i] = p->first[at < p->end - p->first ? at : 0];
    }
    return wload_table(w);
}
INLINE int weigh_alike(const weights *p, mask16 numbers) { return numbers[LANES - 1] < p->left; }
/* Each lane's, by the number of its sample. */
INLINE wide weights_by(const weights *p, mask16 numbers) {
    if (weigh_alike(p, numbers))
        return wsplat(p->first[0]);
    if (p->each == 1 && p->end - p->first >= LANES)
        return weights_permuted(p->first, numbers);
    return weights_counted(p, numbers);
}
/* As reals. */
INLINE vec vweights_by(const weights *p, mask16 numbers) {
    if (weigh_alike(p, numbers))
        return vsplat((real)p->first[0]);
    return vnarrow(weights_by(p, numbers));
}

#endif
