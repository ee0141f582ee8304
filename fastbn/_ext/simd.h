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
 * 4. The arithmetic is the compiler's own on vector types. Intrinsics stand where it has no
 *    expression for what is meant, or makes several instructions of one: loads and stores of part
 *    of a vector, streaming stores, conversions, additions by FMA, and the floating-point mode.
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

#ifndef FASTBN_PORTABLE
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

/* What a register of arithmetic takes up in memory, and the way there and back. */
#ifndef FASTBN_F64
typedef uint16_t half_register __attribute__((vector_size(FASTBN_WIDTH / 2)));
#include "halves.h"
#endif
#ifdef FASTBN_HALF
#define RAW_WIDTH (FASTBN_WIDTH / 2)
typedef half_register raw_register;
#else
#define RAW_WIDTH FASTBN_WIDTH
typedef vec_register raw_register;
#endif
#if defined(FASTBN_BF16)
INLINE vec_register from_raw(raw_register v) { return bfloat16_to_reals(v); }
INLINE raw_register to_raw(vec_register v) { return reals_to_bfloat16(v); }
#elif defined(FASTBN_F16)
INLINE vec_register from_raw(raw_register v) { return float16_to_reals(v); }
INLINE raw_register to_raw(vec_register v) { return reals_to_float16(v); }
#else
INLINE vec_register from_raw(raw_register v) { return v; }
INLINE raw_register to_raw(vec_register v) { return v; }
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
/* GCC spreads a scalar over a vector operand; minus 0, unlike plus 0, leaves a -0 as it is. */
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
/* Rows of packed coefficients. Y_ROWS and DX_ROWS are those of the usual loops, which leave the
 * powers of two behind them out. */
enum { Y_HI, Y_SCALE, Y_SHIFT, Y_ROWS, Y_X_SCALE = Y_ROWS };
enum { DX_DHI, DX_A, DX_HI, DX_LO, DX_B, DX_REST, DX_ROWS, DX_DY_SCALE = DX_ROWS, DX_X_SCALE };
/* y = (x - hi)*scale + shift. */
INLINE vec affine(vec x, const vec *k) {
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++)
        x.r[i] = (x.r[i] - k[Y_HI].r[i]) * k[Y_SCALE].r[i] + k[Y_SHIFT].r[i];
    return x;
}
/* dx = (dy - dhi)*a + (((x - hi) - lo)*b + rest). */
INLINE vec gradient(vec dy, vec x, const vec *k) {
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++) {
        vec_register d = x.r[i] - k[DX_HI].r[i] - k[DX_LO].r[i];
        vec_register own = (dy.r[i] - k[DX_DHI].r[i]) * k[DX_A].r[i];
        dy.r[i] = own + (d * k[DX_B].r[i] + k[DX_REST].r[i]);
    }
    return dy;
}
/* The same where samples weigh w, of the means alone. */
INLINE vec gradient_weighed(vec dy, vec x, vec w, const vec *k) {
    UNROLLED (int i = 0; i < VEC_REGISTERS; i++) {
        vec_register d = x.r[i] - k[DX_HI].r[i] - k[DX_LO].r[i];
        vec_register own = (dy.r[i] - k[DX_DHI].r[i] * w.r[i]) * k[DX_A].r[i];
        dy.r[i] = own + (d * k[DX_B].r[i] + k[DX_REST].r[i]) * w.r[i];
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
INLINE f64_register splat(double a) { return a - (f64_register){0}; }
INLINE wide wsplat(double a) {
    wide w;
    UNROLLED (int i = 0; i < WIDE_REGISTERS; i++) w.r[i] = splat(a);
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
INLINE f64_register where_wide(i64_register mask, f64_register then, f64_register other) {
    return (f64_register)((mask & (i64_register)then) | (~mask & (i64_register)other));
}

#endif
