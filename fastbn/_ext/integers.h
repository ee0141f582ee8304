/* Sums of integers of 8 and 16 bits, and of their squares: exact, in any order.
 *
 * 1. Each column of a row has lanes of its own, of 32 bits (64 for squares of 16 bits), which hold
 *    the sums of FULL rows; then they go into the 64 bits of their channel.
 * 2. Rows of few channels are taken several at a time, so that lanes fill registers; a plane is
 *    taken as rows of PLANE_LANES values.
 * Compiled with the kernels of float32.
 */
#ifndef FASTBN_INTEGERS_H
#define FASTBN_INTEGERS_H

#include "simd.h"
#include "stored.h"

enum { FULL = 1 << 15, PLANE_LANES = 64, SUMMED_COLUMNS = 256 };

#ifdef FASTBN_F32
#define INTEGERS_OF(T, PRODUCT, SQUARE)                                                            \
    /* Column j is of channel j % C. */                                                            \
    static void add_rows_##T(const T *from, long step, long rows, long columns, long C,            \
                             long long *sums, long long *squares) {                                \
        for (long r0 = 0; r0 < rows; r0 += FULL) {                                                 \
            int32_t sum[SUMMED_COLUMNS];                                                           \
            SQUARE square[SUMMED_COLUMNS];                                                         \
            memset(sum, 0, columns * sizeof *sum);                                                 \
            memset(square, 0, columns * sizeof *square);                                           \
            long end = rows - r0 < FULL ? rows : r0 + FULL;                                        \
            for (long r = r0; r < end; r++)                                                        \
                for (long j = 0; j < columns; j++) {                                               \
                    PRODUCT value = from[r * step + j];                                            \
                    sum[j] += (int32_t)value;                                                      \
                    square[j] += (SQUARE)(value * value);                                          \
                }                                                                                  \
            for (long j = 0; j < columns; j++) {                                                   \
                sums[j % C] += sum[j];                                                             \
                squares[j % C] += (long long)square[j];                                            \
            }                                                                                      \
        }                                                                                          \
    }                                                                                              \
    static void add_channels_##T(const T *from, long step, long rows, long C, long long *sums,     \
                                 long long *squares) {                                             \
        long at_once = step == C && C < PLANE_LANES ? 2 * PLANE_LANES / C : 1;                     \
        for (long c = 0; c < C; c += SUMMED_COLUMNS) {                                             \
            long some = C - c < SUMMED_COLUMNS ? C - c : SUMMED_COLUMNS, whole = rows / at_once;   \
            add_rows_##T(from + c, at_once * step, whole, at_once * some, some, sums + c,          \
                         squares + c);                                                             \
            add_rows_##T(from + c + whole * at_once * step, step, rows - whole * at_once, some,    \
                         some, sums + c, squares + c);                                             \
        }                                                                                          \
    }                                                                                              \
    static void add_planes_##T(const T *from, long step, long C, long S, long long *sums,          \
                               long long *squares) {                                               \
        long rows = S / PLANE_LANES, whole = rows * PLANE_LANES;                                   \
        for (long c = 0; c < C; c++) {                                                             \
            add_rows_##T(from + c * step, PLANE_LANES, rows, PLANE_LANES, 1, sums + c,             \
                         squares + c);                                                             \
            add_rows_##T(from + c * step + whole, 0, 1, S - whole, 1, sums + c, squares + c);      \
        }                                                                                          \
    }                                                                                              \
    static void add_##T(const char *data, int by_rows, long c_step, long s_step, long C, long S,   \
                        long long *sums, long long *squares) {                                     \
        if (by_rows)                                                                               \
            add_channels_##T((const T *)data, s_step / (long)sizeof(T), S, C, sums, squares);      \
        else                                                                                       \
            add_planes_##T((const T *)data, c_step / (long)sizeof(T), C, S, sums, squares);        \
    }
INTEGERS_OF(uint8_t, uint32_t, uint32_t)
INTEGERS_OF(int8_t, int32_t, uint32_t)
INTEGERS_OF(uint16_t, uint32_t, uint64_t)
INTEGERS_OF(int16_t, int32_t, uint64_t)
#endif

/* Add the sums of C channels of S values, whose steps are in bytes. */
static void add_integers(int type, const char *data, int by_rows, long c_step, long s_step, long C,
                         long S, long long *sums, long long *squares) {
#ifdef FASTBN_F32
    switch (type) {
    case STORED_UINT8: add_uint8_t(data, by_rows, c_step, s_step, C, S, sums, squares); break;
    case STORED_INT8: add_int8_t(data, by_rows, c_step, s_step, C, S, sums, squares); break;
    case STORED_UINT16: add_uint16_t(data, by_rows, c_step, s_step, C, S, sums, squares); break;
    case STORED_INT16: add_int16_t(data, by_rows, c_step, s_step, C, S, sums, squares); break;
    }
#else
    (void)type, (void)data, (void)by_rows, (void)c_step, (void)s_step, (void)C, (void)S;
    (void)sums, (void)squares;
#endif
}

#endif
