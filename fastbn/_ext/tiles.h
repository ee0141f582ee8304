/* Tiles: pieces of arrays of other types, or in another order, as dense `element`s; and back.
 *
 * 1. The kernels' loops know one element type, and go along rows or planes. What arrives otherwise
 *    (the bytes of an image, say, or channels last for a result by planes) is brought into a tile
 *    that stays in the cache, and the usual loops run on that: so y has the usual bits.
 * 2. Either rows stay rows, or they are *turned*: rows of what is read are columns of the tile.
 * 3. Three or four channels that lie side by side are split, or joined, by loops that compilers
 *    vectorize. More channels are turned in squares (transpose.h), a strip of rows at a time.
 * 4. Integers and half types are read and written by the kernels of float32 alone, which holds each
 *    of their values.
 */
#ifndef FASTBN_TILES_H
#define FASTBN_TILES_H

#include "simd.h"
#include "stored.h"
#include "transpose.h"

enum { STRIP_ROWS = 16, STRIP_COLUMNS = 128 };

/* to[c * to_step + r] = from[r * 3 + c], and the reverse; the same for four. */
#define SPLIT(WIDTH)                                                                               \
    for (long r = 0; r < rows; r++)                                                                \
        _Pragma("GCC unroll 4") for (int c = 0; c < WIDTH; c++)                                    \
            to[c * to_step + r] = (element)from[r * WIDTH + c];
#define JOIN(WIDTH)                                                                                \
    for (long c = 0; c < columns; c++)                                                             \
        _Pragma("GCC unroll 4") for (int r = 0; r < WIDTH; r++)                                    \
            to[c * WIDTH + r] = (element)from[r * from_step + c];

static void turn(element *to, long to_step, const element *from, long from_step, long rows,
                 long columns) {
    transpose((const char *)from, from_step, (char *)to, to_step, rows, columns, sizeof(element));
}

/* Any numbers of rows and columns, by strips of elements. */
#define STRIPS_OF(NAME, T)                                                                         \
    static void tile_strips_##NAME(element *to, long to_step, const T *from, long from_step,       \
                                   long rows, long columns) {                                      \
        element strip[STRIP_ROWS * STRIP_COLUMNS];                                                 \
        for (long r = 0; r < rows; r += STRIP_ROWS)                                                \
            for (long c = 0; c < columns; c += STRIP_COLUMNS) {                                    \
                long some = rows - r < STRIP_ROWS ? rows - r : STRIP_ROWS;                         \
                long wide = columns - c < STRIP_COLUMNS ? columns - c : STRIP_COLUMNS;             \
                tile_rows_##NAME(strip, wide, from + r * from_step + c, from_step, some, wide);    \
                turn(to + c * to_step + r, to_step, strip, wide, some, wide);                      \
            }                                                                                      \
    }

/* Types that C converts. */
#define ROWS_OF(NAME, T)                                                                           \
    static void tile_rows_##NAME(element *restrict to, long to_step, const T *restrict from,       \
                                 long from_step, long rows, long columns) {                        \
        for (long r = 0; r < rows; r++)                                                            \
            for (long c = 0; c < columns; c++)                                                     \
                to[r * to_step + c] = (element)from[r * from_step + c];                            \
    }
#define TURNED_OF(NAME, T)                                                                         \
    static void tile_turned_##NAME(element *restrict to, long to_step, const T *restrict from,     \
                                   long from_step, long rows, long columns) {                      \
        if (columns == 3 && from_step == 3) {                                                      \
            SPLIT(3)                                                                               \
        } else if (columns == 4 && from_step == 4) {                                               \
            SPLIT(4)                                                                               \
        } else if (rows == 3 && to_step == 3) {                                                    \
            JOIN(3)                                                                                \
        } else if (rows == 4 && to_step == 4) {                                                    \
            JOIN(4)                                                                                \
        } else {                                                                                   \
            tile_strips_##NAME(to, to_step, from, from_step, rows, columns);                       \
        }                                                                                          \
    }
#define TILES_OF(NAME, T) ROWS_OF(NAME, T) STRIPS_OF(NAME, T) TURNED_OF(NAME, T)

/* Elements need no strip. */
static void tile_strips_element(element *to, long to_step, const element *from, long from_step,
                                long rows, long columns) {
    turn(to, to_step, from, from_step, rows, columns);
}
ROWS_OF(element, element)
TURNED_OF(element, element)
#ifdef FASTBN_F32
TILES_OF(uint8, uint8_t)
TILES_OF(int8, int8_t)
TILES_OF(uint16, uint16_t)
TILES_OF(int16, int16_t)

/* Rows of a half type, a register of floats at a time. */
#define FROM_HALF(HALF, n)                                                                         \
    do {                                                                                           \
        half_register raw = {0};                                                                   \
        memcpy(&raw, from + r * from_step + c, (n) * sizeof(uint16_t));                            \
        vec_register v = HALF##_to_reals(raw);                                                     \
        memcpy(to + r * to_step + c, &v, (n) * sizeof(float));                                     \
    } while (0)
#define TO_HALF(HALF, n)                                                                           \
    do {                                                                                           \
        vec_register v = {0};                                                                      \
        memcpy(&v, from + r * from_step + c, (n) * sizeof(float));                                 \
        half_register raw = reals_to_##HALF(v);                                                    \
        memcpy(to + r * to_step + c, &raw, (n) * sizeof(uint16_t));                                \
    } while (0)
#define EACH_ROW(STEP, HALF)                                                                       \
    for (long r = 0; r < rows; r++) {                                                              \
        long c = 0;                                                                                \
        for (; c + FLOATS <= columns; c += FLOATS) STEP(HALF, FLOATS);                             \
        if (c < columns) STEP(HALF, columns - c);                                                  \
    }
#define HALVES_OF(HALF)                                                                            \
    static void tile_rows_##HALF(float *to, long to_step, const uint16_t *from, long from_step,    \
                                 long rows, long columns) {                                        \
        EACH_ROW(FROM_HALF, HALF)                                                                  \
    }                                                                                              \
    static void untile_##HALF(uint16_t *to, long to_step, const float *from, long from_step,       \
                              long rows, long columns) {                                           \
        EACH_ROW(TO_HALF, HALF)                                                                    \
    }                                                                                              \
    STRIPS_OF(HALF, uint16_t)
HALVES_OF(float16)
HALVES_OF(bfloat16)
#endif

/* Rows that follow each other, here and there, are one long row. */
static void join_rows(long *rows, long *columns, long from_step, long to_step) {
    if (from_step == *columns && to_step == *columns) {
        *columns *= *rows;
        *rows = 1;
    }
}

/* A piece into a tile: to[r * to_step + c] = from[r * from_step + c] or, where rows are turned,
 * to[c * to_step + r]. */
#define READ(HOW, NAME, T) tile_##HOW##_##NAME(to, to_step, (const T *)from, from_step, rows, columns)
#define READ_TILE(NAME, T, TURNED)                                                                 \
    if (turned)                                                                                    \
        READ(TURNED, NAME, T);                                                                     \
    else                                                                                           \
        READ(rows, NAME, T);                                                                       \
    return;
static void read_tile(int type, element *to, long to_step, const char *from, long from_step,
                      long rows, long columns, int turned) {
    if (!turned) join_rows(&rows, &columns, from_step, to_step);
#ifdef FASTBN_F32
    switch (type) {
    case STORED_UINT8: READ_TILE(uint8, uint8_t, turned)
    case STORED_INT8: READ_TILE(int8, int8_t, turned)
    case STORED_UINT16: READ_TILE(uint16, uint16_t, turned)
    case STORED_INT16: READ_TILE(int16, int16_t, turned)
    case STORED_FLOAT16: READ_TILE(float16, uint16_t, strips)
    case STORED_BFLOAT16: READ_TILE(bfloat16, uint16_t, strips)
    }
#else
    (void)type;
#endif
    READ_TILE(element, element, turned)
}

/* A row of elements, past the caches but for its ends. */
static void stream_row(element *to, const element *from, long n) {
    long i = (-(uintptr_t)to & (BOUND - 1)) / sizeof(element);
    i = i < n ? i : n;
    memcpy(to, from, i * sizeof(element));
    for (; i + LANES <= n; i += LANES) vstream(to + i, vload(from + i));
    memcpy(to + i, from + i, (n - i) * sizeof(element));
}

/* A tile to where it belongs, as elements or a half type. */
static void write_tile(int type, char *to, long to_step, const element *from, long from_step,
                       long rows, long columns, int stream) {
    join_rows(&rows, &columns, from_step, to_step);
    if (type == STORED_ELEMENT) {
        element *row = (element *)to;
        for (long r = 0; r < rows; r++, row += to_step, from += from_step)
            if (stream)
                stream_row(row, from, columns);
            else
                memcpy(row, from, columns * sizeof(element));
        return;
    }
#ifdef FASTBN_F32
    (type == STORED_FLOAT16 ? untile_float16 : untile_bfloat16)((uint16_t *)to, to_step, from,
                                                               from_step, rows, columns);
#else
#endif
}

#endif
