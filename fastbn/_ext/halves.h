/* Half types: bits to float32, exactly, and back, rounded; NaN and subnormals are kept. A part of
 * simd.h, whose registers it converts.
 */
/* bfloat16. The bits are the upper words of float32's. To round, half of the last place is added,
 * less one bit where that is even, and the rest cut off; a NaN, which arithmetic left with its first
 * digit set, is just cut. One shuffle moves words, where conversion and shift would be two or
 * three. */
#if defined(FASTBN_PORTABLE) || FASTBN_WIDTH < 64
INLINE i32_register rounded(vec_register v) {
    i32_register bits = (i32_register)v, number = (i32_register)(v == v);
    return bits + ((((bits >> 16) & 1) + 0x7fff) & number);
}
#endif
#if defined(FASTBN_PORTABLE)
INLINE vec_register bfloat16_to_reals(half_register v) {
    return (vec_register)(__builtin_convertvector(v, i32_register) << 16);
}
INLINE half_register reals_to_bfloat16(vec_register v) {
    return __builtin_convertvector(rounded(v) >> 16, half_register);
}
#elif FASTBN_WIDTH == 64
/* For each upper word the number of its half, and for each of the first sixteen its upper word. */
static const uint16_t UPPER_PLACES[2 * LANES] = {0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7,
    0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
static const uint16_t UPPER_WORDS[2 * LANES] = {
    1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
INLINE vec_register bfloat16_to_reals(half_register v) {
    __m512i places, words = _mm512_castsi256_si512((__m256i)v);
    memcpy(&places, UPPER_PLACES, sizeof places);
    return (vec_register)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places, words);
}
INLINE half_register reals_to_bfloat16(vec_register v) {
    __m512i bits = (__m512i)v, half = _mm512_set1_epi32(0x8000), less = _mm512_set1_epi32(0x7fff);
    __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
    __mmask16 odd = _mm512_mask_test_epi32_mask(number, bits, _mm512_set1_epi32(0x10000));
    __m512i sum = _mm512_mask_add_epi32(bits, number, bits, less), upper;
    sum = _mm512_mask_add_epi32(sum, odd, bits, half);
    memcpy(&upper, UPPER_WORDS, sizeof upper);
    return (half_register)_mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, sum));
}
#elif FASTBN_WIDTH == 32
/* The same by bytes, which stay among sixteen; those of -1 become 0. */
static const int8_t UPPER_PLACES[32] = {-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,
    -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15};
static const int8_t UPPER_BYTES[32] = {2, 3, 6, 7, 10, 11, 14, 15, 0, 0, 0, 0, 0, 0, 0, 0,
    2, 3, 6, 7, 10, 11, 14, 15};
INLINE vec_register bfloat16_to_reals(half_register v) {
    __m256i places, both = _mm256_broadcastsi128_si256((__m128i)v);
    memcpy(&places, UPPER_PLACES, sizeof places);
    return (vec_register)_mm256_shuffle_epi8(both, places);
}
INLINE half_register reals_to_bfloat16(vec_register v) {
    __m256i upper, sum = (__m256i)rounded(v);
    memcpy(&upper, UPPER_BYTES, sizeof upper);
    sum = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(sum, upper), 0x08);
    return (half_register)_mm256_castsi256_si128(sum);
}
#else
INLINE vec_register bfloat16_to_reals(half_register v) {
    return (vec_register)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_cvtsi64_si128((int64_t)v));
}
INLINE half_register reals_to_bfloat16(vec_register v) {
    __m128i words = (__m128i)(rounded(v) >> 16); /* with their signs they fit */
    return (half_register)_mm_cvtsi128_si64(_mm_packs_epi32(words, words));
}
#endif

/* float16. */
#if FASTBN_WIDTH == 64 && !defined(FASTBN_PORTABLE)
INLINE vec_register float16_to_reals(half_register v) { return _mm512_cvtph_ps((__m256i)v); }
INLINE half_register reals_to_float16(vec_register v) {
    return (half_register)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
}
#elif FASTBN_WIDTH == 32 && !defined(FASTBN_PORTABLE)
INLINE vec_register float16_to_reals(half_register v) { return _mm256_cvtph_ps((__m128i)v); }
INLINE half_register reals_to_float16(vec_register v) {
    return (half_register)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
}
#else
INLINE i32_register choose_bits(i32_register mask, i32_register then, i32_register other) {
    return (mask & then) | (~mask & other);
}
/* The bits in float32's places are 2**-112 times the number, subnormal or not. */
INLINE vec_register float16_to_reals(half_register v) {
    i32_register half = __builtin_convertvector(v, i32_register);
    i32_register sign = (half & 0x8000) << 16, size = (half & 0x7fff) << 13;
    i32_register bits = (i32_register)((vec_register)size * 0x1p112f);
    bits |= (size >= 0x7c00 << 13) & 0x7f800000; /* infinity or NaN */
    return (vec_register)(bits | sign);
}
INLINE half_register reals_to_float16(vec_register v) {
    i32_register sign = ((i32_register)v >> 16) & 0x8000, size = (i32_register)v & 0x7fffffff;
    /* Subnormal: what is added to 1/2 is rounded to the unit of its last place, 2**-24. */
    i32_register small = (i32_register)((vec_register)size + 0.5f) - 0x3f000000;
    i32_register usual = (size - (112 << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
    i32_register half = choose_bits(size < 113 << 23, small, usual);
    half = choose_bits(size >= 143 << 23, (i32_register){0} + 0x7c00, half);
    half = choose_bits(size > 255 << 23, (i32_register){0} + 0x7e00, half);
    return __builtin_convertvector(half | sign, half_register);
}
#endif
