/* Copies between memory orders: rows of one array are columns of the other.
 *
 * 1. In whatever order values are taken, one of the two arrays is walked across its rows. So they
 *    are taken in squares, as many rows as there are elements in a register: each row is read by
 *    one load, a few shuffles turn the square, and each column is written by one store.
 * 2. Squares follow each other along the columns that are written until a cache line is full: no
 *    line of the result is fetched twice. What is read stays in L1 meanwhile.
 * 3. Values are moved, not looked at: one function for each size of an element.
 */
#ifndef FASTBN_TRANSPOSE_H
#define FASTBN_TRANSPOSE_H

#include <stdint.h>
#include <string.h>

enum { TRANSPOSED_LINE = 64, TRANSPOSED_REGISTER = 16 };

/* One step of turning a square: rows r and r + SIDE/2 are interleaved. */
#define LOW_8(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH_8(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define LOW_4(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HIGH_4(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#define LOW_2(a, b) __builtin_shufflevector(a, b, 0, 2)
#define HIGH_2(a, b) __builtin_shufflevector(a, b, 1, 3)

/* to[c * to_step + r] = from[r * from_step + c], r below `rows` and c below `columns`; SIDE elements
 * of type T are a register. */
#define TRANSPOSE(T, SIDE)                                                                         \
    static inline __attribute__((always_inline)) void transpose_square_##T(                        \
        const T *from, long from_step, T *to, long to_step) {                                      \
        typedef T row __attribute__((vector_size(TRANSPOSED_REGISTER)));                           \
        row r[SIDE], turned[SIDE];                                                                 \
        _Pragma("GCC unroll 8") for (int i = 0; i < SIDE; i++)                                     \
            memcpy(&r[i], from + i * from_step, sizeof r[i]);                                      \
        _Pragma("GCC unroll 8") for (int half = 1; half < SIDE; half *= 2) {                       \
            _Pragma("GCC unroll 8") for (int i = 0; i < SIDE / 2; i++) {                           \
                turned[2 * i] = LOW_##SIDE(r[i], r[i + SIDE / 2]);                                 \
                turned[2 * i + 1] = HIGH_##SIDE(r[i], r[i + SIDE / 2]);                            \
            }                                                                                      \
            _Pragma("GCC unroll 8") for (int i = 0; i < SIDE; i++) r[i] = turned[i];               \
        }                                                                                          \
        _Pragma("GCC unroll 8") for (int i = 0; i < SIDE; i++)                                     \
            memcpy(to + i * to_step, &r[i], sizeof r[i]);                                          \
    }                                                                                              \
    static void transpose_##T(const T *from, long from_step, T *to, long to_step, long rows,       \
                              long columns) {                                                      \
        enum { LINE = TRANSPOSED_LINE / sizeof(T) };                                               \
        long whole = columns / SIDE * SIDE;                                                        \
        for (long r0 = 0; r0 < rows; r0 += LINE) {                                                 \
            long end = r0 + LINE < rows ? r0 + LINE : rows, squares = r0 + (end - r0) / SIDE * SIDE;\
            for (long c = 0; c < whole; c += SIDE)                                                 \
                for (long r = r0; r < squares; r += SIDE)                                          \
                    transpose_square_##T(from + r * from_step + c, from_step,                      \
                                         to + c * to_step + r, to_step);                           \
            for (long c = 0; c < columns; c++)                                                     \
                for (long r = c < whole ? squares : r0; r < end; r++)                              \
                    to[c * to_step + r] = from[r * from_step + c];                                 \
        }                                                                                          \
    }
TRANSPOSE(uint16_t, 8)
TRANSPOSE(uint32_t, 4)
TRANSPOSE(uint64_t, 2)

static void transpose(const char *from, long from_step, char *to, long to_step, long rows,
                      long columns, int itemsize) {
    if (itemsize == 2)
        transpose_uint16_t((const uint16_t *)from, from_step, (uint16_t *)to, to_step, rows, columns);
    else if (itemsize == 4)
        transpose_uint32_t((const uint32_t *)from, from_step, (uint32_t *)to, to_step, rows, columns);
    else
        transpose_uint64_t((const uint64_t *)from, from_step, (uint64_t *)to, to_step, rows, columns);
}

#endif
