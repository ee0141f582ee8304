/* The limit that memory sets: out = a, a + b or a + b + c, by all threads.

   Ordinary stores read a line before they overwrite it; streaming stores pass the caches by. Which
   is faster depends on the size, so both are timed. The vector type is the widest that the compiler
   was told of. Build with -fno-tree-loop-distribute-patterns, lest loops become calls of memcpy,
   which chooses for itself. */

#include <stddef.h>
#include <stdint.h>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#define LINE 64

typedef float vector __attribute__((vector_size(WIDTH)));
typedef float loose __attribute__((vector_size(WIDTH), aligned(4)));

enum { VALUES = WIDTH / sizeof(float), PER_LINE = LINE / sizeof(float) };

/* Below this a parallel region costs more than it brings. */
enum { PARALLEL_FROM = 1 << 17 };

static inline void stream(float *out, vector v)
{
#if defined(__AVX512F__)
    _mm512_stream_ps(out, (__m512)v);
#elif defined(__AVX__)
    _mm256_stream_ps(out, (__m256)v);
#elif defined(__SSE2__)
    _mm_stream_ps(out, (__m128)v);
#else
    *(vector *)out = v;
#endif
}

/* `out` is at the start of a line, n is a number of whole lines. */
static inline void lines(
    float *out, const float *a, const float *b, const float *c, ptrdiff_t n, int streaming)
{
    for (ptrdiff_t i = 0; i < n; i += PER_LINE)
        for (ptrdiff_t j = i; j < i + PER_LINE; j += VALUES) {
            vector v = *(const loose *)(a + j);
            if (b)
                v += *(const loose *)(b + j);
            if (c)
                v += *(const loose *)(c + j);
            if (streaming)
                stream(out + j, v);
            else
                *(vector *)(out + j) = v;
        }
#ifdef __SSE2__
    if (streaming)
        _mm_sfence();
#endif
}

static inline void singly(
    float *out, const float *a, const float *b, const float *c, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++)
        out[i] = c ? a[i] + b[i] + c[i] : b ? a[i] + b[i] : a[i];
}

/* What to copy: n floats; c, or b and c, may be NULL. One argument, because ctypes takes its time for each. */
struct job {
    float *out;
    const float *a, *b, *c;
    ptrdiff_t n;
    int threads, streaming;
};

void copy(const struct job *job)
{
    float *out = job->out;
    const float *a = job->a, *b = job->b, *c = job->c;
    ptrdiff_t n = job->n;
    int threads = job->threads, streaming = job->streaming;
    ptrdiff_t head = (ptrdiff_t)(-(uintptr_t)out % LINE / sizeof(float));
    if (head > n)
        head = n;
    ptrdiff_t whole = (n - head) / PER_LINE, done = head + whole * PER_LINE;
    singly(out, a, b, c, head);
    singly(out + done, a + done, b ? b + done : NULL, c ? c + done : NULL, n - done);
    if (n * (ptrdiff_t)sizeof(float) < PARALLEL_FROM)
        threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        ptrdiff_t from = head + whole * t / threads * PER_LINE;
        ptrdiff_t to = head + whole * (t + 1) / threads * PER_LINE;
        if (c)
            lines(out + from, a + from, b + from, c + from, to - from, streaming);
        else if (b)
            lines(out + from, a + from, b + from, NULL, to - from, streaming);
        else
            lines(out + from, a + from, NULL, NULL, to - from, streaming);
    }
}
