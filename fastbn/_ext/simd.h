/* Sixteen lanes of one element type, behind the same inline functions on every instruction set.
 *
 * 1. A kernel works on 16 elements at a time, whatever the machine: one 64-byte register, two of
 *    32 bytes or four of 16. The number of lanes, and with it the order of every sum, is thus a
 *    property of the source and not of the processor: all variants give the same bits.
 * 2. Two types. `vec` holds 16 elements in the type that elementwise work is done in; `wide` holds
 *    16 float64 accumulators, for sums. They are structs of native registers: a vector type wider
 *    than the register would be spilled to memory by the compiler.
 * 3. Memory holds `element`s, arithmetic is done in `real`s, and load and store alone know the
 *    difference: float16 and bfloat16 become float32 there, and are rounded to nearest even.
 * 4. The arithmetic is the compiler's own on vector types. Intrinsics stand only where it has no
 *    word for what is meant, or finds too many: loads and stores of part of a vector, streaming
 *    stores, conversions, sums on the pipes that multiply, and the floating-point mode.
 * 5. The build defines FASTBN_WIDTH (bytes in a register), FASTBN_F32, FASTBN_F64, FASTBN_F16 or
 *    FASTBN_BF16 (the element type), and FASTBN_PORTABLE where no intrinsic may be used.
 */
#ifndef FASTBN_SIMD_H
#define FASTBN_SIMD_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef FASTBN_PORTABLE
#include <fenv.h>
#else
#include <immintrin.h>
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16") for

enum { DOUBLES = FASTBN_WIDTH / 8, WIDE_REGISTERS = LANES / DOUBLES };

typedef double f64_register __attribute__((vector_size(FASTBN_WIDTH)));
typedef double f64_pair __attribute__((vector_size(16)));
typedef int64_t i64_register __attribute__((vector_size(FASTBN_WIDTH)));
typedef struct { f64_register r[WIDE_REGISTERS]; } wide;

#ifdef FASTBN_F64
enum { VEC_REGISTERS = WIDE_REGISTERS };
typedef double real;
typedef double element;
#define LARGEST DBL_MAX
#define LEAST_POWER 0x1p-1000
#define MOST_POWER 0x1p1000
#define FARTHEST 1e300
typedef f64_register vec_register;
typedef i64_register mask_register;
typedef wide vec;
#else
enum { FLOATS = FASTBN_WIDTH / 4, VEC_REGISTERS = LANES / FLOATS };
typedef float real;
#define LARGEST ((double)FLT_MAX)
#define LEAST_POWER 0x1p-126
#define MOST_POWER 0x1p127
#define FARTHEST 1e36
typedef float f32_register __attribute__((vector_size(FASTBN_WIDTH)));
typedef float f32_half __attribute__((vector_size(FASTBN_WIDTH / 2)));
typedef int32_t i32_register __attribute__((vector_size(FASTBN_WIDTH)));
typedef f32_register vec_register;
typedef i32_register mask_register;
typedef struct { vec_register r[VEC_REGISTERS]; } vec;
#ifdef FASTBN_F32
typedef float element;
#else
#define FASTBN_HALF
typedef uint16_t element;
#endif
#endif
enum { ELEMENTS = LANES / VEC_REGISTERS };

/* What a register of arithmetic takes up in memory. */
#ifdef FASTBN_HALF
#define RAW_WIDTH (FASTBN_WIDTH / 2)
typedef uint16_t raw_register __attribute__((vector_size(RAW_WIDTH)));
#else
#define RAW_WIDTH FASTBN_WIDTH
typedef vec_register raw_register;
#endif

/* ---- Half types: bits to float32, exactly, and back, rounded; NaN and subnormals are kept ---- */

#if !defined(FASTBN_HALF)
INLINE vec_register from_raw(raw_register v) { return v; }
INLINE raw_register to_raw(vec_register v) { return v; }
#elif defined(FASTBN_BF16)
/* The bits are the upper words of float32's. To round, half of the last place is added, less one
 * bit where that is even, and the rest cut off; a NaN, which arithmetic left with its first digit
 * set, is just cut. One shuffle moves words, where conversion and shift would be two or three. */
#if defined(FASTBN_PORTABLE) || FASTBN_WIDTH < 64
INLINE i32_register rounded(vec_register v) {
    i32_register bits = (i32_register)v, number = (i32_register)(v == v);
    return bits + ((((bits >> 16) & 1) + 0x7fff) & number);
}
#endif
#if defined(FASTBN_PORTABLE)
INLINE vec_register from_raw(raw_register v) {
    return (vec_register)(__builtin_convertvector(v, i32_register) << 16);
}
INLINE raw_register to_raw(vec_register v) {
    return __builtin_convertvector(rounded(v) >> 16, raw_register);
}
#elif FASTBN_WIDTH == 64
/* For each upper word the number of its half, and for each of the first sixteen its upper word. */
static const uint16_t UPPER_PLACES[2 * LANES] = {0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7,
    0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
static const uint16_t UPPER_WORDS[2 * LANES] = {
    1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
INLINE vec_register from_raw(raw_register v) {
    __m512i places, words = _mm512_castsi256_si512((__m256i)v);
    memcpy(&places, UPPER_PLACES, sizeof places);
    return (vec_register)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places, words);
}
INLINE raw_register to_raw(vec_register v) {
    __m512i bits = (__m512i)v, half = _mm512_set1_epi32(0x8000), less = _mm512_set1_epi32(0x7fff);
    __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
    __mmask16 odd = _mm512_mask_test_epi32_mask(number, bits, _mm512_set1_epi32(0x10000));
    __m512i sum = _mm512_mask_add_epi32(bits, number, bits, less), upper;
    sum = _mm512_mask_add_epi32(sum, odd, bits, half);
    memcpy(&upper, UPPER_WORDS, sizeof upper);
    return (raw_register)_mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, sum));
}
#elif FASTBN_WIDTH == 32
/* The same by bytes, which stay among sixteen; those of -1 become 0. */
static const int8_t UPPER_PLACES[32] = {-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,
    -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15};
static const int8_t UPPER_BYTES[32] = {2, 3, 6, 7, 10, 11, 14, 15, 0, 0, 0, 0, 0, 0, 0, 0,
    2, 3, 6, 7, 10, 11, 14, 15};
INLINE vec_register from_raw(raw_register v) {
    __m256i places, both = _mm256_broadcastsi128_si256((__m128i)v);
    memcpy(&places, UPPER_PLACES, sizeof places);
    return (vec_register)_mm256_shuffle_epi8(both, places);
}
INLINE raw_register to_raw(vec_register v) {
    __m256i upper, sum = (__m256i)rounded(v);
    memcpy(&upper, UPPER_BYTES, sizeof upper);
    sum = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(sum, upper), 0x08);
    return (raw_register)_mm256_castsi256_si128(sum);
}
#else
INLINE vec_register from_raw(raw_register v) {
    return (vec_register)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_cvtsi64_si128((int64_t)v));
}
INLINE raw_register to_raw(vec_register v) {
    __m128i words = (__m128i)(rounded(v) >> 16); /* with their signs they fit */
    return (raw_register)_mm_cvtsi128_si64(_mm_packs_epi32(words, words));
}
#endif
#elif FASTBN_WIDTH == 64 && !defined(FASTBN_PORTABLE)
INLINE vec_register from_raw(raw_register v) { return _mm512_cvtph_ps((__m256i)v); }
INLINE raw_register to_raw(vec_register v) {
    return (raw_register)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
}
#elif FASTBN_WIDTH == 32 && !defined(FASTBN_PORTABLE)
INLINE vec_register from_raw(raw_register v) { return _mm256_cvtph_ps((__m128i)v); }
INLINE raw_register to_raw(vec_register v) {
    return (raw_register)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
}
#else
INLINE i32_register choose_bits(i32_register mask, i32_register then, i32_register other) {
    return (mask & then) | (~mask & other);
}
/* The bits in float32's places are 2**-112 times the number, subnormal or not. */
INLINE vec_register from_raw(raw_register v) {
    i32_register half = __builtin_convertvector(v, i32_register);
    i32_register sign = (half & 0x8000) << 16, size = (half & 0x7fff) << 13;
    i32_register bits = (i32_register)((vec_register)size * 0x1p112f);
    bits |= (size >= 0x7c00 << 13) & 0x7f800000; /* infinity or NaN */
    return (vec_register)(bits | sign);
}
INLINE raw_register to_raw(vec_register v) {
    i32_register sign = ((i32_register)v >> 16) & 0x8000, size = (i32_register)v & 0x7fffffff;
    /* Subnormal: what is added to 1/2 is rounded to the unit of its last place, 2**-24. */
    i32_register small = (i32_register)((vec_register)size + 0.5f) - 0x3f000000;
    i32_register usual = (size - (112 << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
    i32_register half = choose_bits(size < 113 << 23, small, usual);
    half = choose_bits(size >= 143 << 23, (i32_register){0} + 0x7c00, half);
    half = choose_bits(size > 255 << 23, (i32_register){0} + 0x7e00, half);
    return __builtin_convertvector(half | sign, raw_register);
}
#endif

/* ---- Parts of a vector: the first n of 16 lanes, n from 0 to 16. Absent lanes load as 0. ---- */

/* Sixteen set lanes, then unset ones: a window that starts at 16 - n selects n lanes. */
static const int64_t LANE_MASK64[2 * LANES] = {
    -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
#if FASTBN_WIDTH == 32 && !defined(FASTBN_PORTABLE) && defined(FASTBN_F32)
static const int32_t LANE_MASK32[2 * LANES] = {
    -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
#endif

/* Of the first n of 16 lanes, how many are among the `of` of register i. */
INLINE long elements_in(long n, int i, int of) {
    long left = n - (long)i * of;
    return left < 0 ? 0 : left > of ? of : left;
}

#if FASTBN_WIDTH == 64 && !defined(FASTBN_PORTABLE)
#define OF_PART INLINE
#define PART(n, i) ((uint32_t)((1u << (n)) - 1) >> ((i) * ELEMENTS))
#if defined(FASTBN_F32)
INLINE raw_register load_part(const element *p, long n, int i) {
    return _mm512_maskz_loadu_ps((__mmask16)PART(n, i), p);
}
INLINE void store_part(element *p, raw_register v, long n, int i) {
    _mm512_mask_storeu_ps(p, (__mmask16)PART(n, i), v);
}
#elif defined(FASTBN_F64)
INLINE raw_register load_part(const element *p, long n, int i) {
    return _mm512_maskz_loadu_pd((__mmask8)PART(n, i), p);
}
INLINE void store_part(element *p, raw_register v, long n, int i) {
    _mm512_mask_storeu_pd(p, (__mmask8)PART(n, i), v);
}
#else
INLINE raw_register load_part(const element *p, long n, int i) {
    return (raw_register)_mm256_maskz_loadu_epi16((__mmask16)PART(n, i), p);
}
INLINE void store_part(element *p, raw_register v, long n, int i) {
    _mm256_mask_storeu_epi16(p, (__mmask16)PART(n, i), (__m256i)v);
}
#endif

#elif FASTBN_WIDTH == 32 && !defined(FASTBN_PORTABLE) && !defined(FASTBN_HALF)
#define OF_PART INLINE
#ifdef FASTBN_F32
INLINE __m256i part(long n, int i) {
    return _mm256_loadu_si256((const __m256i *)(LANE_MASK32 + LANES - n + i * ELEMENTS));
}
INLINE raw_register load_part(const element *p, long n, int i) {
    return _mm256_maskload_ps(p, part(n, i));
}
INLINE void store_part(element *p, raw_register v, long n, int i) {
    _mm256_maskstore_ps(p, part(n, i), v);
}
#else
INLINE __m256i part(long n, int i) {
    return _mm256_loadu_si256((const __m256i *)(LANE_MASK64 + LANES - n + i * ELEMENTS));
}
INLINE raw_register load_part(const element *p, long n, int i) {
    return _mm256_maskload_pd(p, part(n, i));
}
INLINE void store_part(element *p, raw_register v, long n, int i) {
    _mm256_maskstore_pd(p, part(n, i), v);
}
#endif

#else /* no masked loads: element by element, too much code to inline everywhere */
#define OF_PART static __attribute__((noinline, unused))
OF_PART raw_register load_part(const element *p, long n, int i) {
    raw_register v = {0};
    memcpy(&v, p, elements_in(n, i, ELEMENTS) * sizeof(element));
    return v;
}
OF_PART void store_part(element *p, raw_register v, long n, int i) {
    memcpy(p, &v, elements_in(n, i, ELEMENTS) * sizeof(element));
}
#endif

/* ---- Picks: of sixteen places those that count, a byte each, not 0 ---- */

typedef uint8_t picks __attribute__((vector_size(LANES)));

/* Sixteen bytes in a row. */
INLINE picks picks_of(const uint8_t *p) {
    picks some;
    memcpy(&some, p, sizeof some);
    return some;
}
/* One byte, sixteen times. */
INLINE picks picks_alike(const uint8_t *p) { return (picks){0} + *p; }
/* Sixteen in a row, and zeros past the end. */
OF_PART picks picks_before(const uint8_t *end, const uint8_t *p) {
    picks some = {0};
    if (end - p >= LANES)
        return picks_of(p);
    memcpy(&some, p, end - p);
    return some;
}
/* For each lane the byte of its number, from 0 to 15. */
INLINE picks picks_by(picks numbers, picks bytes) {
#if FASTBN_WIDTH > 16 && !defined(FASTBN_PORTABLE)
    return (picks)_mm_shuffle_epi8((__m128i)bytes, (__m128i)numbers);
#else
    picks some;
    for (int i = 0; i < LANES; i++)
        some[i] = bytes[numbers[i]];
    return some;
#endif
}
/* The first sixteen numbers (of which bytes are enough), counted from the first of them. */
INLINE picks numbers_of(const uint8_t *p) { return picks_of(p) - p[0]; }

#if FASTBN_WIDTH == 64 && !defined(FASTBN_PORTABLE)
/* A bit a lane. */
typedef struct { __mmask16 bits; } lanes;
INLINE lanes lanes_of(picks some) {
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
INLINE f64_register picked(f64_register a, lanes mask, picks some, int i) {
    (void)some;
    return _mm512_maskz_mov_pd((__mmask8)(mask.bits >> i * DOUBLES), a);
}
#else
/* All bits of a lane, or none. */
typedef struct { mask_register r[VEC_REGISTERS]; } lanes;
typedef uint8_t element_bytes __attribute__((vector_size(ELEMENTS)));
typedef uint8_t double_bytes __attribute__((vector_size(DOUBLES)));
INLINE lanes lanes_of(picks some) {
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
INLINE f64_register picked(f64_register a, lanes mask, picks some, int i) {
    double_bytes part;
    (void)mask;
    memcpy(&part, (const uint8_t *)&some + i * DOUBLES, sizeof part);
    return (f64_register)((i64_register)a & (__builtin_convertvector(part, i64_register) != 0));
}
#endif

/* ---- Scalars: without branches, so that loops over channels become vectors ---- */

INLINE double choose(int condition, double a, double b) { return condition ? a : b; }
INLINE int is_finite(double a) { return fabs(a) <= DBL_MAX; }

/* ---- vec: elementwise work ---- */

INLINE vec vload(const element *p) {
    vec v;
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++) {
        raw_register raw;
        memcpy(&raw, p + i * ELEMENTS, sizeof raw);
        v.r[i] = from_raw(raw);
    }
    return v;
}
/* Whether n is known to the compiler, and all lanes. */
#define IS_WHOLE(n) (__builtin_constant_p(n) && (n) == LANES)
/* The first n. */
OF_PART vec vload_part(const element *p, long n) {
    vec v;
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++)
        v.r[i] = from_raw(load_part(p + i * ELEMENTS, n, i));
    return v;
}
INLINE vec vload_some(const element *p, long n) {
    return IS_WHOLE(n) ? vload(p) : vload_part(p, n);
}
/* The same where n is known when it runs, and is mostly all. */
INLINE vec vload_any(const element *p, long n) { return n == LANES ? vload(p) : vload_part(p, n); }
INLINE void vstore(element *p, vec v) {
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++) {
        raw_register raw = to_raw(v.r[i]);
        memcpy(p + i * ELEMENTS, &raw, sizeof raw);
    }
}
OF_PART void vstore_part(element *p, vec v, long n) {
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++)
        store_part(p + i * ELEMENTS, to_raw(v.r[i]), n, i);
}
INLINE void vstore_some(element *p, vec v, long n) {
    if (IS_WHOLE(n))
        vstore(p, v);
    else
        vstore_part(p, v, n);
}
INLINE void vstore_any(element *p, vec v, long n) {
    if (n == LANES)
        vstore(p, v);
    else
        vstore_part(p, v, n);
}
/* Streaming wants its sixteen elements from one of these bounds on. */
enum { BOUND = LANES * sizeof(element) < 64 ? LANES * sizeof(element) : 64 };
/* Past the caches; stream_fence() before another thread may look. */
INLINE void vstream(element *p, vec v) {
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++) {
        raw_register raw = to_raw(v.r[i]);
        void *at = p + i * ELEMENTS;
#ifdef FASTBN_PORTABLE
        memcpy(at, &raw, sizeof raw);
#elif RAW_WIDTH == 64
        _mm512_stream_si512((__m512i *)at, (__m512i)raw);
#elif RAW_WIDTH == 32
        _mm256_stream_si256((__m256i *)at, (__m256i)raw);
#elif RAW_WIDTH == 16
        _mm_stream_si128((__m128i *)at, (__m128i)raw);
#else
        long long bits;
        memcpy(&bits, &raw, sizeof bits);
        _mm_stream_si64((long long *)at, bits);
#endif
    }
}
INLINE void stream_fence(void) {
#ifndef FASTBN_PORTABLE
    _mm_sfence();
#endif
}
INLINE vec vsplat(real a) {
    vec v;
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++)
        v.r[i] = a - (vec_register){0};
    return v;
}
/* `count` vectors of coefficients, each of one or of sixteen, that stand `pitch` apart. */
INLINE void vsplat_each(vec *v, const real *p, long pitch, int count) {
    UNROLLED (int i = 0; i < count; i++) v[i] = vsplat(p[i * pitch]);
}
INLINE void vload_each(vec *v, const real *p, long pitch, int count) {
    UNROLLED (int i = 0; i < count; i++)
        UNROLLED (int j = 0; j < VEC_REGISTERS; j++)
            memcpy(&v[i].r[j], p + i * pitch + j * ELEMENTS, sizeof v[i].r[j]);
}
/* y = (x - hi)*scale + shift, of coefficients k in this order. */
INLINE vec affine(vec x, const vec *k) {
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++)
        x.r[i] = (x.r[i] - k[0].r[i]) * k[1].r[i] + k[2].r[i];
    return x;
}
/* dx = (dy - dhi)*a + (((x - hi) - lo)*b + rest), of coefficients k in this order. */
INLINE vec gradient(vec dy, vec x, const vec *k) {
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++) {
        vec_register d = x.r[i] - k[2].r[i] - k[3].r[i];
        dy.r[i] = (dy.r[i] - k[0].r[i]) * k[1].r[i] + (d * k[4].r[i] + k[5].r[i]);
    }
    return dy;
}
/* The same where samples weigh w, of the means alone. */
INLINE vec gradient_weighed(vec dy, vec x, vec w, const vec *k) {
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++) {
        vec_register d = x.r[i] - k[2].r[i] - k[3].r[i];
        vec_register own = (dy.r[i] - k[0].r[i] * w.r[i]) * k[1].r[i];
        dy.r[i] = own + (d * k[4].r[i] + k[5].r[i]) * w.r[i];
    }
    return dy;
}
INLINE vec vmul(vec a, vec b) {
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++) a.r[i] *= b.r[i];
    return a;
}
INLINE vec vadd(vec a, vec b) {
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++) a.r[i] += b.r[i];
    return a;
}

/* An activation: v * slope below 0, `top` above it. */
typedef struct {
    double slope;
    double top;    /* y is no larger */
    double crest;  /* from here on y is the top, and level; NaN where there is no top */
} bends;

INLINE bends bends_of(double slope, double top) {
    return (bends){slope, top, choose(is_finite(top), top, NAN)};
}
/* v * slope, and 0 for a slope of 0 whatever v is. */
INLINE vec_register sloped(vec_register v, real slope) {
    mask_register kept = (mask_register){0} - (slope != 0);
    return (vec_register)((mask_register)(v * slope) & kept);
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
INLINE vec activate(vec v, const bends *b) {
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++) {
        vec_register a = v.r[i], most = (real)b->top - (vec_register){0};
        v.r[i] = up_to(a, 0, sloped(a, (real)b->slope), lesser(most, a));
    }
    return v;
}
/* dy times the slope of the activation where it gave y; a NaN lets dy through. */
INLINE vec gate(vec dy, vec y, const bends *b) {
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++) {
        vec_register a = dy.r[i], at = y.r[i];
        a = up_to(at, 0, sloped(a, (real)b->slope), a);
        dy.r[i] = below(at, (real)b->crest, a);
    }
    return dy;
}

/* ---- wide: float64 sums ---- */

/* The conversion has intrinsics because GCC makes two halves of it, or single elements. */
#if defined(FASTBN_F64)
INLINE f64_register widen(const element *p) {
    f64_register v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE f64_register widen_part(const element *p, long n, int i) { return load_part(p, n, i); }
#elif defined(FASTBN_HALF)
INLINE f64_register widen(const element *p) {
#if FASTBN_WIDTH == 16
    uint32_t two;
    vec_register v;
    memcpy(&two, p, sizeof two);
    v = from_raw((raw_register)(uint64_t)two);
#ifdef FASTBN_PORTABLE
    return (f64_register){v[0], v[1]};
#else
    return _mm_cvtps_pd(v);
#endif
#elif FASTBN_WIDTH == 32
    __m128i raw = _mm_loadl_epi64((const __m128i *)p);
#ifdef FASTBN_F16
    return _mm256_cvtps_pd(_mm_cvtph_ps(raw));
#else
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), raw)));
#endif
#else
    __m128i raw = _mm_loadu_si128((const __m128i *)p);
#ifdef FASTBN_F16
    return _mm512_cvtps_pd(_mm256_cvtph_ps(raw));
#else
    __m256i places, words = _mm256_castsi128_si256(raw);
    memcpy(&places, UPPER_PLACES, sizeof places);
    words = _mm256_maskz_permutexvar_epi16(0xaaaa, places, words);
    return _mm512_cvtps_pd(_mm256_castsi256_ps(words));
#endif
#endif
}
OF_PART f64_register widen_part(const element *p, long n, int i) {
    element lanes[DOUBLES] = {0};
    memcpy(lanes, p, elements_in(n, i, DOUBLES) * sizeof(element));
    return widen(lanes);
}
#elif defined(FASTBN_PORTABLE)
INLINE f64_register widen_some(const element *p, long count) {
    f32_half half = {0};
    memcpy(&half, p, count * sizeof(element));
    return __builtin_convertvector(half, f64_register);
}
INLINE f64_register widen(const element *p) { return widen_some(p, DOUBLES); }
OF_PART f64_register widen_part(const element *p, long n, int i) {
    return widen_some(p, elements_in(n, i, DOUBLES));
}
#elif FASTBN_WIDTH == 64
INLINE f64_register widen(const element *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
OF_PART f64_register widen_part(const element *p, long n, int i) {
    uint32_t part = ((1u << n) - 1) >> (i * DOUBLES);
    return _mm512_cvtps_pd(_mm256_maskz_loadu_ps((__mmask8)part, p));
}
#elif FASTBN_WIDTH == 32
INLINE f64_register widen(const element *p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
OF_PART f64_register widen_part(const element *p, long n, int i) {
    const int32_t *mask = LANE_MASK32 + LANES - n + i * DOUBLES;
    return _mm256_cvtps_pd(_mm_maskload_ps(p, _mm_loadu_si128((const __m128i *)mask)));
}
#else
INLINE f64_register widen(const element *p) {
    return _mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)p)));
}
OF_PART f64_register widen_part(const element *p, long n, int i) {
    __m128 v = {0};
    memcpy(&v, p, elements_in(n, i, DOUBLES) * sizeof(element));
    return _mm_cvtps_pd(v);
}
#endif
/* One element. */
INLINE double value_of(const element *p) {
#ifdef FASTBN_HALF
    return vload_some(p, 1).r[0][0];
#else
    return *p;
#endif
}
INLINE f64_register load_register(const double *p) {
    f64_register v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store_register(double *p, f64_register v) { memcpy(p, &v, sizeof v); }
/* Register by register: a struct copied whole would live in memory. */
INLINE wide wload_table(const double *p) {
    wide w;
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) w.r[i] = load_register(p + i * DOUBLES);
    return w;
}
INLINE wide wload_table_part(const double *p, long n) {
    wide w = {0};
    if (n >= LANES)
        return wload_table(p);
    memcpy(&w, p, n * sizeof(double));
    return w;
}
INLINE void wstore_table(double *p, wide w) {
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) store_register(p + i * DOUBLES, w.r[i]);
}
INLINE wide wsplat(double a) {
    wide w;
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) w.r[i] = a - (f64_register){0};
    return w;
}
INLINE wide wadd(wide a, wide b) {
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) a.r[i] += b.r[i];
    return a;
}
INLINE wide wsub(wide a, wide b) {
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) a.r[i] -= b.r[i];
    return a;
}
/* The sum of the lanes, halves onto halves: the same tree on every instruction set. */
INLINE double wsum(wide a) {
    f64_pair pair[DOUBLES / 2];
    UNROLLED (int half = WIDE_REGISTERS / 2; half > 0; half /= 2)
        UNROLLED (int i = 0; i < half; i++) a.r[i] += a.r[i + half];
    memcpy(pair, &a.r[0], sizeof pair);
    UNROLLED (int half = DOUBLES / 4; half > 0; half /= 2)
        UNROLLED (int i = 0; i < half; i++) pair[i] += pair[i + half];
    return pair[0][0] + pair[0][1];
}

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

INLINE wide weights_permuted(const double *p, picks numbers) {
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
static __attribute__((noinline, unused)) wide weights_counted(const weights *p, picks numbers) {
    double w[LANES];
    for (int i = 0; i < LANES; i++) {
        long at = numbers[i] < p->left ? 0 : 1 + (numbers[i] - p->left) / p->each;
        w[i] = p->first[at < p->end - p->first ? at : 0];
    }
    return wload_table(w);
}
INLINE int weigh_alike(const weights *p, picks numbers) { return numbers[LANES - 1] < p->left; }
/* Each lane's, by the number of its sample. */
INLINE wide weights_by(const weights *p, picks numbers) {
    if (weigh_alike(p, numbers))
        return wsplat(p->first[0]);
    if (p->each == 1 && p->end - p->first >= LANES)
        return weights_permuted(p->first, numbers);
    return weights_counted(p, numbers);
}
/* As reals. */
INLINE vec vweights_by(const weights *p, picks numbers) {
    if (weigh_alike(p, numbers))
        return vsplat((real)p->first[0]);
    return vnarrow(weights_by(p, numbers));
}

/* ---- What reductions add up, a register after the other: more would not fit at once ---- */

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
/* The same of those picked that weigh anything, times their weights. */
INLINE void add_picked_moments(const element *x, picks some, wide weight, long n, wide shift,
                               wide unit, wide *first, wide *second) {
    lanes mask = lanes_of(some);
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) {
        const element *p = x + i * DOUBLES;
        f64_register d = (IS_WHOLE(n) ? widen(p) : widen_part(p, n, i)) - shift.r[i];
        f64_register w = weight.r[i];
        d = (f64_register)((i64_register)picked(d, mask, some, i) & (w != 0));
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
INLINE f64_register where_wide(i64_register mask, f64_register then, f64_register other) {
    return (f64_register)((mask & (i64_register)then) | (~mask & (i64_register)other));
}
/* As `gate`, in float64. */
INLINE f64_register gate_wide(f64_register dy, f64_register y, const bends *b) {
    i64_register kept = (i64_register){0} - (b->slope != 0);
    f64_register sloped = (f64_register)((i64_register)(dy * b->slope) & kept);
    dy = where_wide(y <= 0, sloped, dy);
    return where_wide(y >= b->crest, (f64_register){0}, dy);
}
/* Add dy * (x - mean) and dy, of n values; where y is given, dy is gated. */
INLINE void add_gradients(const element *dy, const element *x, const element *y, long n, wide mean,
                          const bends *b, wide *first, wide *second) {
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) {
        const element *p = x + i * DOUBLES, *q = dy + i * DOUBLES, *r = y + i * DOUBLES;
        f64_register d = (IS_WHOLE(n) ? widen(p) : widen_part(p, n, i)) - mean.r[i];
        f64_register slope = IS_WHOLE(n) ? widen(q) : widen_part(q, n, i);
        if (!IS_WHOLE(n))
            d = first_lanes(d, n, i);
        if (b)
            slope = gate_wide(slope, IS_WHOLE(n) ? widen(r) : widen_part(r, n, i), b);
        first->r[i] = add_beside(first->r[i], slope * d);
        second->r[i] = add_beside(second->r[i], slope);
    }
}
/* Of n columns of a row: add gamma * dy * (x - mean) and gamma * dy to the row's sums, and dy * xhat
 * and dy to those of the columns, which are in memory. */
INLINE void add_both_ways(const element *dy, const element *x, const element *y, long n,
                          double mean, double rstd, const double *gamma, const bends *b,
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
            slope = gate_wide(slope, IS_WHOLE(n) ? widen(r) : widen_part(r, n, i), b);
        d *= slope;
        first->r[i] += d * scale;
        second->r[i] += slope * scale;
        store_register(of_xhat, load_register(of_xhat) + d * rstd);
        store_register(of_dy, add_beside(load_register(of_dy), slope));
    }
}
/* As `add_gradients`, of those picked. */
INLINE void add_picked_gradients(const element *dy, const element *x, const element *y, picks some,
                                 long n, wide mean, const bends *b, wide *first, wide *second) {
    lanes mask = lanes_of(some);
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) {
        const element *p = x + i * DOUBLES, *q = dy + i * DOUBLES, *r = y + i * DOUBLES;
        f64_register d = (IS_WHOLE(n) ? widen(p) : widen_part(p, n, i)) - mean.r[i];
        f64_register slope = IS_WHOLE(n) ? widen(q) : widen_part(q, n, i);
        if (b)
            slope = gate_wide(slope, IS_WHOLE(n) ? widen(r) : widen_part(r, n, i), b);
        d = picked(d, mask, some, i);
        slope = picked(slope, mask, some, i);
        if (!IS_WHOLE(n))
            d = first_lanes(d, n, i);
        first->r[i] += slope * d;
        second->r[i] += slope;
    }
}

/* ---- Finalize: from sums to coefficients, a register of float64 at a time ---- */

/* Register i of a table. */
INLINE f64_register load(const double *p, long i) { return load_register(p + i * DOUBLES); }
INLINE void store(double *p, long i, f64_register a) { store_register(p + i * DOUBLES, a); }
INLINE f64_register splat(double a) { return a - (f64_register){0}; }
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
INLINE i64_register all_marks(void) { return ~(i64_register){0}; }
INLINE int are_all(i64_register mask) {
    int64_t all = -1;
    UNROLLED (int i = 0; i < DOUBLES; i++) all &= mask[i];
    return all != 0;
}
/* Which are 0, not finite, or between these bounds. */
INLINE i64_register between(f64_register a, double least, double most) {
    f64_register size = magnitude(a);
    return ((size > least) & (size < most)) | (size == 0) | ~(size <= DBL_MAX);
}
/* What the element type multiplies by without help from powers of two, or where nothing helps: */
INLINE i64_register usual_scales(f64_register a) { return between(a, 1e-18, 1e18); }
/* what multiplies x - mean, which is a factor of its own, and the mean, none of whose digits may fall
 * below the element type's range. */
INLINE i64_register usual_slopes(f64_register a) { return between(a, 1e-36, 1e36); }
INLINE i64_register usual_means(f64_register a) { return between(a, 1e-20, 1e36); }
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
INLINE f64_register power_half_way(f64_register a) {
    return where_wide(usual_scales(a), splat(1), power_of_two(rough_root(a)));
}
/* 1 / a for a power of two: the exponent mirrored about 0. */
INLINE f64_register inverse_of_power(f64_register a) {
    return (f64_register)((INT64_C(2046) << 52) - (i64_register)a);
}
/* The power of two that brings (x - mean)*b half of b's way, so that all stays in range. */
INLINE f64_register power_for_gradient(f64_register b, f64_register rstd, f64_register mean) {
    f64_register wanted = rstd * where_wide(b != 0, rough_root(b), splat(1));
    f64_register most = FARTHEST / magnitude(mean);
    return power_of_two(where_wide(wanted < most, wanted, most));
}
/* a, or if it is finite the element type's largest value: 0 times a factor stays 0. */
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

/* ---- Machine ---- */

/* The usual floating-point mode, in which nothing is flushed, while a kernel runs: a thread of the
 * team has the mode of whoever called first, and the caller may have another by now. */
#ifdef FASTBN_PORTABLE
typedef fenv_t fp_mode;
INLINE fp_mode usual_mode(void) {
    fp_mode was;
    fegetenv(&was);
    fesetenv(FE_DFL_ENV);
    return was;
}
INLINE void restore_mode(fp_mode mode) { fesetenv(&mode); }
#else
typedef unsigned fp_mode;
INLINE fp_mode usual_mode(void) {
    fp_mode was = _mm_getcsr();
    _mm_setcsr(_MM_MASK_MASK);
    return was;
}
INLINE void restore_mode(fp_mode mode) { _mm_setcsr(mode); }
#endif

INLINE void prefetch(const element *p, int wanted) {
    if (!wanted)
        return;
    __builtin_prefetch(p, 0, 2);
#ifdef FASTBN_F64 /* sixteen elements are two lines */
    __builtin_prefetch(p + 8, 0, 2);
#endif
}
INLINE void set_flag(unsigned char *flag) { __atomic_store_n(flag, 1, __ATOMIC_RELAXED); }
INLINE long fetch_add(long *counter, long by) {
    return __atomic_fetch_add(counter, by, __ATOMIC_RELAXED);
}
INLINE int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}
INLINE int team_size(void) {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}
/* All threads of the team wait for each other; what they wrote is then visible to all. */
INLINE void team_barrier(void) {
#ifdef _OPENMP
    _Pragma("omp barrier")
#endif
}

#endif
