/* Memory for fresh results: blocks that earlier results gave back, and new ones from the system.
 *
 * 1. A page that a process touches for the first time costs it a fault and the system a clearing,
 *    together more than most of this library's work on it. So a large block that is freed stays
 *    idle for a while, and the next result of about its size gets it, without clearing.
 * 2. A block is a mapping of its own. Its header has the page before the data, which thus begin on
 *    a page: results then trail x, which malloc puts 16 bytes into a page, and no load waits for a
 *    store because their addresses have the same last bits. From 2 MiB up data begin where a huge
 *    page may, and huge pages are asked for.
 * 3. Idle blocks form a list, the one freed last in front. Their bytes are bounded, and so are the
 *    seconds that a block is idle; what is beyond goes back to the system at the next call.
 * 4. The lock is held for a few steps along the list, and never while the system is asked. A fork
 *    takes it, so that the child finds the list whole, and gives its idle blocks back.
 */
#ifndef FASTBN_POOL_H
#define FASTBN_POOL_H

#include <numpy/ndarraytypes.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { HUGE_PAGE = 2 << 20 };

typedef struct block {
    struct block *next; /* in the list of idle ones */
    size_t bytes;       /* of data, whole pages */
    double since;       /* when it was freed, in seconds */
} block;

static struct {
    pthread_mutex_t lock;
    block *idle;
    size_t bound, idle_bytes, hits;
    double seconds; /* a block may be idle */
} pool = {PTHREAD_MUTEX_INITIALIZER, NULL, 0, 0, 0, 0};

static size_t page_bytes(void) { return (size_t)sysconf(_SC_PAGESIZE); }
static size_t rounded_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
static block *block_of(void *data) { return (block *)((char *)data - page_bytes()); }
static void *data_of(block *b) { return (char *)b + page_bytes(); }

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void unmap(block *b) { munmap(b, page_bytes() + b->bytes); }
static void unmap_all(block *b) {
    while (b) {
        block *next = b->next;
        unmap(b);
        b = next;
    }
}

static block *map(size_t size) {
    size_t page = page_bytes(), align = size < HUGE_PAGE ? page : HUGE_PAGE;
    size_t bytes, whole;
    char *start, *first, *end;
    if (size > SIZE_MAX / 2)
        return NULL;
    bytes = rounded_up(size ? size : 1, page), whole = page + bytes + (align - page);
    start = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED)
        return NULL;
    first = (char *)rounded_up((size_t)start + page, align) - page;
    end = first + page + bytes;
    if (first > start)
        munmap(start, first - start);
    if (end < start + whole)
        munmap(end, start + whole - end);
    if (size >= HUGE_PAGE)
        madvise(first + page, bytes, MADV_HUGEPAGE);
    ((block *)first)->bytes = bytes;
    return (block *)first;
}

/* The rest with the lock, in the list of idle blocks. */

static block *unlink_block(block **link) {
    block *b = *link;
    *link = b->next;
    pool.idle_bytes -= b->bytes;
    return b;
}

static void link_block(block *b) {
    b->since = now();
    b->next = pool.idle;
    pool.idle = b;
    pool.idle_bytes += b->bytes;
}

/* The block that fits best, at most an eighth larger; of equal ones that which was freed last. */
static block *take_fitting(size_t size) {
    block **best = NULL;
    for (block **link = &pool.idle; *link; link = &(*link)->next)
        if ((*link)->bytes >= size && (*link)->bytes - size <= size / 8 &&
            (!best || (*link)->bytes < (*best)->bytes))
            best = link;
    pool.hits += best != NULL;
    return best ? unlink_block(best) : NULL;
}

/* What is beyond the bound, those that were freed last first served, or was idle too long. */
static block *take_excess(void) {
    block **link = &pool.idle, *excess = NULL;
    double oldest = now() - pool.seconds;
    size_t kept = 0;
    while (*link) {
        if ((*link)->since >= oldest && (*link)->bytes <= pool.bound - kept) {
            kept += (*link)->bytes;
            link = &(*link)->next;
        } else {
            block *b = unlink_block(link);
            b->next = excess;
            excess = b;
        }
    }
    return excess;
}

/* ---- For the module ---- */

static void clear_pool(void) {
    block *all;
    pthread_mutex_lock(&pool.lock);
    all = pool.idle;
    pool.idle = NULL;
    pool.idle_bytes = 0;
    pthread_mutex_unlock(&pool.lock);
    unmap_all(all);
}

static void read_pool(size_t *idle_bytes, size_t *hits) {
    pthread_mutex_lock(&pool.lock);
    *idle_bytes = pool.idle_bytes;
    *hits = pool.hits;
    pthread_mutex_unlock(&pool.lock);
}

static void configure_pool(size_t bound, double seconds) {
    block *excess;
    pthread_mutex_lock(&pool.lock);
    pool.bound = bound;
    pool.seconds = seconds;
    excess = take_excess();
    pthread_mutex_unlock(&pool.lock);
    unmap_all(excess);
}

/* ---- What NumPy calls. `size` may be any, and what `pool_free` is told is not what it was. ---- */

static void *pool_malloc(void *ctx, size_t size) {
    block *b, *excess;
    (void)ctx;
    pthread_mutex_lock(&pool.lock);
    b = take_fitting(size);
    excess = take_excess();
    pthread_mutex_unlock(&pool.lock);
    unmap_all(excess);
    if (!b)
        b = map(size);
    if (!b) {
        clear_pool();
        b = map(size);
    }
    return b ? data_of(b) : NULL;
}

static void *pool_calloc(void *ctx, size_t count, size_t each) {
    size_t size;
    void *data = __builtin_mul_overflow(count, each, &size) ? NULL : pool_malloc(ctx, size);
    return data ? memset(data, 0, size) : NULL;
}

static void pool_free(void *ctx, void *data, size_t size) {
    block *excess;
    (void)ctx, (void)size;
    if (!data)
        return;
    pthread_mutex_lock(&pool.lock);
    link_block(block_of(data));
    excess = take_excess();
    pthread_mutex_unlock(&pool.lock);
    unmap_all(excess);
}

static void *pool_realloc(void *ctx, void *data, size_t size) {
    size_t had = data ? block_of(data)->bytes : 0;
    void *moved;
    if (data && size <= had && size >= had / 2)
        return data;
    moved = pool_malloc(ctx, size);
    if (moved && data) {
        memcpy(moved, data, had < size ? had : size);
        pool_free(ctx, data, had);
    }
    return moved;
}

static PyDataMem_Handler pool_handler = {
    "fastbn", 1, {NULL, pool_malloc, pool_calloc, pool_realloc, pool_free}};

/* ---- Forks ---- */

static void lock_pool(void) { pthread_mutex_lock(&pool.lock); }
static void unlock_pool(void) { pthread_mutex_unlock(&pool.lock); }
static void renew_pool(void) {
    pthread_mutex_init(&pool.lock, NULL);
    clear_pool();
}
static int guard_pool(void) { return pthread_atfork(lock_pool, unlock_pool, renew_pool); }

#endif
