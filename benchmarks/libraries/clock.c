/* The clock of the processor: an addition that waits for the one before takes one cycle. */

#include <time.h>

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

double cycles_per_second(void)
{
    enum { ADDITIONS = 16, TIMES = 1 << 22 };
    unsigned long sum = 0;
    double start = seconds();
    for (int i = 0; i < TIMES; i++) {
#pragma GCC unroll 16
        for (int j = 0; j < ADDITIONS; j++) {
            sum += 1;
            __asm__ volatile("" : "+r"(sum));
        }
    }
    return (double)ADDITIONS * TIMES / (seconds() - start);
}
