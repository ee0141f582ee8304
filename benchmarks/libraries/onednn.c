/* oneDNN's batch normalization behind four plain functions, for ctypes.

   A `work` holds one primitive, its memory objects and a stream; its arrays are the caller's.
   Functions that make something return NULL where oneDNN refuses; `problem` then says why. */

#include <stdlib.h>

#include "dnnl.h"

enum { FORWARD, INFERENCE, BACKWARD, FROZEN };
enum { ARGUMENTS = 10 };

struct work {
    dnnl_stream_t stream;
    dnnl_primitive_desc_t forward, desc;
    dnnl_primitive_t primitive;
    int count;
    dnnl_exec_arg_t arguments[ARGUMENTS];
    dnnl_memory_t output;
};

/* The arrays in the order of `struct arrays` in of_onednn.py; those a kind has no use for are NULL. */
struct arrays {
    void *x, *dy, *out, *mean, *var, *gamma, *beta, *dgamma, *dbeta;
};

static dnnl_engine_t engine;
static const char *reason = "";

#define TRY(what, call)              \
    do {                             \
        if ((call) != dnnl_success) { \
            reason = what;           \
            return 0;                \
        }                            \
    } while (0)

const char *problem(void) { return reason; }

int version(void)
{
    const dnnl_version_t *v = dnnl_version();
    return v->major * 10000 + v->minor * 100 + v->patch;
}

static int bind(struct work *w, int name, const_dnnl_memory_desc_t md, void *array)
{
    dnnl_exec_arg_t *argument = &w->arguments[w->count];
    argument->arg = name;
    TRY("memory", dnnl_memory_create(&argument->memory, md, engine, array));
    w->count++;
    return 1;
}

static int describe(struct work *w, int kind, const_dnnl_memory_desc_t md, float eps)
{
    int given = kind == INFERENCE || kind == FROZEN;
    unsigned flags = dnnl_use_scale | dnnl_use_shift | (given ? dnnl_use_global_stats : 0);
    dnnl_prop_kind_t prop = kind == INFERENCE ? dnnl_forward_inference : dnnl_forward_training;
    TRY("forward", dnnl_batch_normalization_forward_primitive_desc_create(
                       &w->forward, engine, prop, md, md, eps, flags, NULL));
    if (kind == FORWARD || kind == INFERENCE)
        return 1;
    prop = kind == FROZEN ? dnnl_backward_data : dnnl_backward;
    TRY("backward", dnnl_batch_normalization_backward_primitive_desc_create(
                        &w->desc, engine, prop, md, md, md, eps, flags, w->forward, NULL));
    return 1;
}

static int bind_all(struct work *w, int kind, const_dnnl_memory_desc_t md, dnnl_dim_t channels,
                    const struct arrays *a)
{
    dnnl_memory_desc_t vector;
    TRY("vector", dnnl_memory_desc_create_with_tag(&vector, 1, &channels, dnnl_f32, dnnl_a));
    int forward = kind == FORWARD || kind == INFERENCE;
    int right = bind(w, forward ? DNNL_ARG_DST : DNNL_ARG_DIFF_SRC, md, a->out);
    w->output = w->arguments[0].memory;
    right = right && bind(w, DNNL_ARG_SRC, md, a->x) && bind(w, DNNL_ARG_MEAN, vector, a->mean)
            && bind(w, DNNL_ARG_VARIANCE, vector, a->var)
            && bind(w, DNNL_ARG_SCALE, vector, a->gamma);
    if (forward)
        right = right && bind(w, DNNL_ARG_SHIFT, vector, a->beta);
    else /* FROZEN must bind the last two as well, though they are not written */
        right = right && bind(w, DNNL_ARG_DIFF_DST, md, a->dy)
                && bind(w, DNNL_ARG_DIFF_SCALE, vector, a->dgamma)
                && bind(w, DNNL_ARG_DIFF_SHIFT, vector, a->dbeta);
    dnnl_memory_desc_destroy(vector);
    return right;
}

static int fill(struct work *w, int kind, int tag, int ndims, const dnnl_dim_t *dims, float eps,
                const struct arrays *a)
{
    if (!engine)
        TRY("engine", dnnl_engine_create(&engine, dnnl_cpu, 0));
    TRY("stream", dnnl_stream_create(&w->stream, engine, dnnl_stream_default_flags));
    dnnl_memory_desc_t md;
    TRY("layout", dnnl_memory_desc_create_with_tag(&md, ndims, dims, dnnl_f32, tag));
    int right = describe(w, kind, md, eps) && bind_all(w, kind, md, dims[1], a);
    dnnl_memory_desc_destroy(md);
    if (!right)
        return 0;
    TRY("primitive", dnnl_primitive_create(&w->primitive, w->desc ? w->desc : w->forward));
    return 1;
}

void drop(struct work *w)
{
    for (int i = 0; i < w->count; i++)
        dnnl_memory_destroy(w->arguments[i].memory);
    if (w->primitive)
        dnnl_primitive_destroy(w->primitive);
    if (w->desc)
        dnnl_primitive_desc_destroy(w->desc);
    if (w->forward)
        dnnl_primitive_desc_destroy(w->forward);
    if (w->stream)
        dnnl_stream_destroy(w->stream);
    free(w);
}

int tag_nc(void) { return dnnl_nc; }
int tag_nchw(void) { return dnnl_nchw; }
int tag_nhwc(void) { return dnnl_nhwc; }
/* Blocks of as many channels as its widest vector has floats. */
int block(void)
{
    int avx512 = dnnl_cpu_isa_avx512_core;
    return (dnnl_get_effective_cpu_isa() & avx512) == avx512 ? 16 : 8;
}
int tag_blocked(void) { return block() == 16 ? dnnl_nChw16c : dnnl_nChw8c; }

struct work *make(int kind, int tag, int ndims, const dnnl_dim_t *dims, float eps,
                  const struct arrays *a)
{
    struct work *w = calloc(1, sizeof *w);
    if (w && !fill(w, kind, tag, ndims, dims, eps, a)) {
        drop(w);
        return NULL;
    }
    return w;
}

/* The name of the implementation that oneDNN chose. */
const char *implementation(struct work *w)
{
    const char *name = "";
    dnnl_primitive_desc_query(w->desc ? w->desc : w->forward, dnnl_query_impl_info_str, 0, &name);
    return name;
}

void redirect(struct work *w, void *out) { dnnl_memory_set_data_handle(w->output, out); }

int run(struct work *w)
{
    return dnnl_primitive_execute(w->primitive, w->stream, w->count, w->arguments)
           || dnnl_stream_wait(w->stream);
}
