/* The inner loops of recording: sums over positions of outer products, straight into the columns of a row.
 *
 * products(left, pixels, kernel, stride, dilation, before, positions, groups, out, sketch, grids, threads)
 *     row[o, (c, k)] = sum_p left[p, o] * pixels[c, p * stride + k * dilation - before] of each sample, zero outside of the
 *     pixels. `out` gets the row, its sketch, or some of its elements.
 * elements(left, right, grids, out, threads)
 *     Some elements of sum_p left[p, o] * right[p, i] of each sample.
 * lines(tokens, values, columns, signs, run, out, threads)
 *     Sketch of rows that are zero outside of some lines of a table. Column and sign are looked up for these lines alone.
 * sketch(rows, columns, signs, run, out, threads)
 *     out[column of e] += signs[e] * rows[e] of each row. `columns` has the column of the first of each `run` elements.
 * channel_sums(inputs, gradient, eps, rows, bounds, threads)
 *     rows[0, i, c] = sum_p g_icp n(x)_icp and rows[1, i, c] = sum_p g_icp, with n(x) of mean 0 and variance 1 in each channel.
 *     bounds[., i] are upper bounds of the norms of the terms.
 *
 * Everything is float32. Arguments are checked here: whatever is passed from Python, nothing outside of the arrays is touched.
 * hydra_pipe/maths/row_kernels.py is what the package calls. torch does the same for where this cannot be compiled.
 *
 * One sample is the work of one thread, so results do not depend on the number of threads. A sample's values are first put in
 * lines: position after position, with zeros between the lines of a picture. Line n of the pixels that a step of the kernel sees
 * is then a shift of the same memory, and every element of the row is a product of two lines. Pixels that a stride skips go to
 * other lines. Patches are never written out. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if !defined(__GNUC__) && !defined(__clang__)
#error "only by GCC or Clang"
#endif

#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MOST_DIMENSIONS 3
/* Lines are as long as a multiple of the widest vector. */
#define LONGEST_VECTOR 16
/* Floats of lines that are multiplied before the next ones, so that they stay in the cache. */
#define CACHED 32768
/* Largest size of a kernel, stride and the like: products of three still have room. */
#define LARGEST_NUMBER (1 << 20)
/* Multiplications below which other threads are not worth their waking. */
#define FEW_PRODUCTS 500000

static Py_ssize_t smaller(Py_ssize_t a, Py_ssize_t b) { return a < b ? a : b; }

static Py_ssize_t larger(Py_ssize_t a, Py_ssize_t b) { return a > b ? a : b; }

static Py_ssize_t rounded_up(Py_ssize_t n) { return (n + LONGEST_VECTOR - 1) / LONGEST_VECTOR * LONGEST_VECTOR; }

/* Products of lines. `n` is a multiple of LONGEST_VECTOR. out[a, b] += <lefts + left_at[a], rights + right_at[b]>. A tile of
 * products has its sums in registers: vectors of GCC and Clang, for any machine. */

typedef void Dots(const float *lefts, const Py_ssize_t *left_at, Py_ssize_t n_left, const float *rights, const Py_ssize_t *right_at,
                  Py_ssize_t n_right, Py_ssize_t n, float *out, Py_ssize_t out_stride);

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

#ifdef __clang__
#define SHUFFLED(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
#define SHUFFLED(A, B, ...) __builtin_shuffle(A, B, (__attribute__((vector_size(16))) int){__VA_ARGS__})
#endif

/* Add the sum of each of four vectors to one of four neighbours. */
static inline __attribute__((always_inline)) void add_sums(const Four *a, const Four *b, const Four *c, const Four *d, float *out) {
    Four first = SHUFFLED(*a, *b, 0, 4, 1, 5) + SHUFFLED(*a, *b, 2, 6, 3, 7);
    Four second = SHUFFLED(*c, *d, 0, 4, 1, 5) + SHUFFLED(*c, *d, 2, 6, 3, 7);
    *(Four *)out += SHUFFLED(first, second, 0, 1, 4, 5) + SHUFFLED(first, second, 2, 3, 6, 7);
}

#define DEFINE_DOTS(NAME, VECTOR, TARGET)                                                                                          \
    TARGET static inline __attribute__((always_inline)) Four NAME##_in_four(const VECTOR *sum) {                                   \
        const Four *parts = (const Four *)sum;                                                                                     \
        Four total = parts[0];                                                                                                     \
        for (size_t k = 1; k < sizeof(VECTOR) / sizeof(Four); k++) total += parts[k];                                              \
        return total;                                                                                                              \
    }                                                                                                                              \
    TARGET static inline __attribute__((always_inline)) void NAME##_tile(                                                          \
        const float *lefts, const Py_ssize_t *left_at, int n_left, const float *rights, const Py_ssize_t *right_at, int n_right,   \
        Py_ssize_t n, float *out, Py_ssize_t out_stride) {                                                                         \
        enum { LANES = sizeof(VECTOR) / sizeof(float) };                                                                           \
        VECTOR sums[3][4];                                                                                                         \
        for (int a = 0; a < n_left; a++)                                                                                           \
            for (int b = 0; b < n_right; b++) sums[a][b] = (VECTOR){0};                                                            \
        for (Py_ssize_t at = 0; at < n; at += LANES) {                                                                             \
            VECTOR left[3];                                                                                                        \
            for (int a = 0; a < n_left; a++) left[a] = *(const VECTOR *)(lefts + left_at[a] + at);                                 \
            for (int b = 0; b < n_right; b++) {                                                                                    \
                VECTOR right = *(const VECTOR *)(rights + right_at[b] + at);                                                       \
                for (int a = 0; a < n_left; a++) sums[a][b] += left[a] * right;                                                    \
            }                                                                                                                      \
        }                                                                                                                          \
        for (int a = 0; a < n_left; a++) {                                                                                         \
            Four totals[4];                                                                                                        \
            for (int b = 0; b < n_right; b++) totals[b] = NAME##_in_four(&sums[a][b]);                                             \
            if (n_right == 4) add_sums(&totals[0], &totals[1], &totals[2], &totals[3], out + a * out_stride);                      \
            else out[a * out_stride] += (totals[0][0] + totals[0][1]) + (totals[0][2] + totals[0][3]);                             \
        }                                                                                                                          \
    }                                                                                                                              \
    TARGET static inline __attribute__((always_inline)) void NAME##_some(                                                          \
        const float *lefts, const Py_ssize_t *left_at, int n_left, const float *rights, const Py_ssize_t *right_at,                \
        Py_ssize_t n_right, Py_ssize_t n, float *out, Py_ssize_t out_stride) {                                                     \
        Py_ssize_t b = 0;                                                                                                          \
        for (; b + 4 <= n_right; b += 4)                                                                                           \
            NAME##_tile(lefts, left_at, n_left, rights, right_at + b, 4, n, out + b, out_stride);                                  \
        for (; b < n_right; b++) NAME##_tile(lefts, left_at, n_left, rights, right_at + b, 1, n, out + b, out_stride);             \
    }                                                                                                                              \
    TARGET static void NAME(const float *lefts, const Py_ssize_t *left_at, Py_ssize_t n_left, const float *rights,                 \
                            const Py_ssize_t *right_at, Py_ssize_t n_right, Py_ssize_t n, float *out, Py_ssize_t out_stride) {     \
        Py_ssize_t a = 0;                                                                                                          \
        for (; a + 3 <= n_left; a += 3)                                                                                            \
            NAME##_some(lefts, left_at + a, 3, rights, right_at, n_right, n, out + a * out_stride, out_stride);                    \
        if (a + 2 == n_left) NAME##_some(lefts, left_at + a, 2, rights, right_at, n_right, n, out + a * out_stride, out_stride);   \
        if (a + 1 == n_left) NAME##_some(lefts, left_at + a, 1, rights, right_at, n_right, n, out + a * out_stride, out_stride);   \
    }

DEFINE_DOTS(plain_dots, Four, )
#ifdef __x86_64__
DEFINE_DOTS(avx2_dots, Eight, __attribute__((target("avx2,fma"))))
#endif

typedef struct {
    const char *name;
    Dots *dots;
} Level;

static const Level PLAIN = {"plain", plain_dots};
/* the fastest that this processor has, unless `use` has chosen another */
static Level level;

static int find_level(const char *name, Level *found) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if ((!name || !strcmp(name, "avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        *found = (Level){"avx2", avx2_dots};
        return 0;
    }
#endif
    *found = PLAIN;
    return !name || !strcmp(name, PLAIN.name) ? 0 : -1;
}

/* The threads are those of torch's own OpenMP: other threads would run beside torch's while these wait busily. torch makes its
 * OpenMP known to the whole process. Where it is not, the calling thread does all. */

typedef void Parallel(void (*work)(void *), void *job, unsigned threads, unsigned flags);
static Parallel *parallel;

/* Memory of one thread, kept for its next call. */
static _Thread_local float *space;
static _Thread_local size_t space_bytes;

static float *space_of(size_t floats) {
    size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
    if (bytes > space_bytes) {
        free(space);
        space = aligned_alloc(64, bytes);
        space_bytes = space ? bytes : 0;
    }
    return space;
}

/* Signs and columns of the elements of a row; `columns` is NULL without a sketch. */
typedef struct {
    const int32_t *columns;
    const int8_t *signs;
    Py_ssize_t n, run, n_columns;
} Sketch;

static void add_to_sketch(const Sketch *sketch, const float *row, float *out) {
    Py_ssize_t run = sketch->run, k = sketch->n_columns;
    const int8_t *signs = sketch->signs;
    for (Py_ssize_t at = 0; at < sketch->n; at += run) {
        Py_ssize_t column = sketch->columns[at / run], together = smaller(run, k - column), i = 0;
        for (; i < together; i++) out[column + i] += signs[at + i] * row[at + i];
        for (; i < run; i++) out[(column + i) % k] += signs[at + i] * row[at + i];
    }
}

/* Adds elements [at, end) of a block, `values`, to their columns. Returns -1 if a column is beyond the sketch. */
static int add_part_to_sketch(const Sketch *sketch, Py_ssize_t at, Py_ssize_t end, const float *values, float *out) {
    Py_ssize_t run = sketch->run, k = sketch->n_columns;
    while (at < end) {
        Py_ssize_t place = at % run, n = smaller(run - place, end - at), first = sketch->columns[at / run], i = 0;
        if (first < 0 || first >= k) return -1;
        Py_ssize_t column = (first + place) % k, together = smaller(n, k - column);
        const int8_t *signs = sketch->signs + at;
        for (; i < together; i++) out[column + i] += signs[i] * values[i];
        for (; i < n; i++) out[(column + i) % k] += signs[i] * values[i];
        values += n;
        at += n;
    }
    return 0;
}

/* Numbers of the outputs and inputs of grids of elements; `outputs` is NULL without grids. */
typedef struct {
    const int64_t *outputs, *inputs;
    Py_ssize_t n, n_out, n_in;
    float scale;
} Grids;

typedef struct {
    /* left: data, and strides in bytes of sample, position, output */
    const char *left;
    Py_ssize_t left_strides[3];
    const char *pixels;
    Py_ssize_t pixel_strides[2 + MOST_DIMENSIONS]; /* of sample, channel, and the dimensions */
    Py_ssize_t batch, outputs, channels, groups;
    /* by dimension, the last one is along a line; unused ones come first and have one of everything */
    Py_ssize_t sizes[MOST_DIMENSIONS], kernel[MOST_DIMENSIONS], stride[MOST_DIMENSIONS], dilation[MOST_DIMENSIONS],
        before[MOST_DIMENSIONS], positions[MOST_DIMENSIONS];
    Py_ssize_t pitch[MOST_DIMENSIONS]; /* positions, and those that only shifts see */
    Py_ssize_t n_kernel;
    Py_ssize_t left_line, right_line; /* floats of a line of one output, and of one phase of one channel */
    Py_ssize_t n_phases;
    Py_ssize_t *phases; /* three numbers each: the place of the pixels modulo the strides */
    Py_ssize_t *left_at, *right_at; /* place of the line of each output, and of each input of a group */
    Py_ssize_t *left_of_grids, *right_of_grids; /* the same for each output and input of the grids */
    char *out;
    Py_ssize_t out_stride;
    Sketch sketch;
    Grids grids;
    Py_ssize_t floats; /* of a thread's memory */
    Dots *dots;
    Py_ssize_t next;
    int failed;
} Products;

static Py_ssize_t ceil_divided(Py_ssize_t a, Py_ssize_t b) { return a <= 0 ? 0 : (a + b - 1) / b; }

/* Every `step` bytes of the source; a step that the compiler knows is three times as fast. */
static inline void put_in_line(float *line, const char *source, Py_ssize_t step, Py_ssize_t n) {
    if (step == sizeof(float)) memcpy(line, source, n * sizeof(float));
    else if (step == 2 * sizeof(float))
        for (Py_ssize_t p = 0; p < n; p++) line[p] = ((const float *)source)[2 * p];
    else
        for (Py_ssize_t p = 0; p < n; p++) line[p] = *(const float *)(source + p * step);
}

/* One line of a picture after the other, of all channels: where channels are neighbours, it is read once. */
static void put_left_in_lines(const Products *job, Py_ssize_t sample, float *lines) {
    const char *source = job->left + sample * job->left_strides[0];
    Py_ssize_t step = job->left_strides[1], n = job->positions[2];
    for (Py_ssize_t i = 0; i < job->positions[0]; i++)
        for (Py_ssize_t j = 0; j < job->positions[1]; j++, source += n * step) {
            float *line = lines + (i * job->pitch[1] + j) * job->pitch[2];
            for (Py_ssize_t o = 0; o < job->outputs; o++)
                put_in_line(line + o * job->left_line, source + o * job->left_strides[2], step, n);
        }
}

static void put_pixels_in_lines(const Products *job, Py_ssize_t sample, float *lines) {
    const Py_ssize_t *stride = job->stride, *of = job->pixel_strides + 2, *pitch = job->pitch;
    const char *pixels = job->pixels + sample * job->pixel_strides[0];
    for (Py_ssize_t k = 0; k < job->n_phases; k++) {
        /* pixel of the first place of the phase, by dimension; outside of the pixels it stays zero */
        Py_ssize_t first[MOST_DIMENSIONS], low[MOST_DIMENSIONS], high[MOST_DIMENSIONS];
        for (int d = 0; d < MOST_DIMENSIONS; d++) {
            first[d] = job->phases[k * MOST_DIMENSIONS + d] - job->before[d];
            low[d] = ceil_divided(-first[d], stride[d]);
            high[d] = smaller(pitch[d], ceil_divided(job->sizes[d] - first[d], stride[d]));
        }
        if (low[2] >= high[2]) continue;
        for (Py_ssize_t i = low[0]; i < high[0]; i++)
            for (Py_ssize_t j = low[1]; j < high[1]; j++) {
                float *line = lines + k * job->right_line + (i * pitch[1] + j) * pitch[2] + low[2];
                const char *source = pixels + (first[0] + i * stride[0]) * of[0] + (first[1] + j * stride[1]) * of[1] +
                                     (first[2] + low[2] * stride[2]) * of[2];
                for (Py_ssize_t c = 0; c < job->channels; c++)
                    put_in_line(line + c * job->n_phases * job->right_line, source + c * job->pixel_strides[1], stride[2] * of[2],
                                high[2] - low[2]);
            }
    }
}

static void multiply_sample(const Products *job, Py_ssize_t sample, float *memory) {
    float *lefts = memory, *rights = lefts + job->outputs * job->left_line;
    float *row = rights + rounded_up(job->channels * job->n_phases * job->right_line) + LONGEST_VECTOR;
    float *out = (float *)(job->out + sample * job->out_stride);
    Py_ssize_t per_group = job->outputs / job->groups, inputs = job->channels / job->groups * job->n_kernel, n = job->left_line;
    Py_ssize_t at_once = rounded_up(larger(512, CACHED / larger(per_group, job->channels / job->groups)));
    put_left_in_lines(job, sample, lefts);
    put_pixels_in_lines(job, sample, rights);
    if (job->grids.outputs) {
        const Grids *grids = &job->grids;
        Py_ssize_t of_grid = grids->n_out * grids->n_in;
        memset(out, 0, grids->n * of_grid * sizeof(float));
        for (Py_ssize_t k = 0; k < grids->n; k++)
            job->dots(lefts, job->left_of_grids + k * grids->n_out, grids->n_out, rights, job->right_of_grids + k * grids->n_in,
                      grids->n_in, n, out + k * of_grid, grids->n_in);
        for (Py_ssize_t k = 0; k < grids->n * of_grid; k++) out[k] *= grids->scale;
        return;
    }
    if (!job->sketch.columns) row = out;
    memset(row, 0, job->outputs * inputs * sizeof(float));
    for (Py_ssize_t group = 0; group < job->groups; group++)
        for (Py_ssize_t low = 0; low < n; low += at_once)
            job->dots(lefts + group * per_group * n + low, job->left_at, per_group,
                      rights + group * (job->channels / job->groups) * job->n_phases * job->right_line + low, job->right_at, inputs,
                      smaller(at_once, n - low), row + group * per_group * inputs, inputs);
    if (job->sketch.columns) {
        memset(out, 0, job->sketch.n_columns * sizeof(float));
        add_to_sketch(&job->sketch, row, out);
    }
}

static void multiply_samples(void *given) {
    Products *job = given;
    float *memory = NULL;
    Py_ssize_t sample;
    while ((sample = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->batch) {
        if (!memory) {
            memory = space_of(job->floats);
            if (!memory) {
                __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
                return;
            }
            memset(memory, 0, job->floats * sizeof(float)); /* between the lines it stays zero */
        }
        multiply_sample(job, sample, memory);
    }
}

typedef struct {
    Sketch sketch;
    const char *rows;
    char *out;
    Py_ssize_t batch, row_stride, out_stride, next;
} Sketches;

static void sketch_rows(void *given) {
    Sketches *job = given;
    Py_ssize_t row;
    while ((row = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->batch) {
        float *out = (float *)(job->out + row * job->out_stride);
        memset(out, 0, job->sketch.n_columns * sizeof(float));
        add_to_sketch(&job->sketch, (const float *)(job->rows + row * job->row_stride), out);
    }
}

/* Values of some lines of a block, whose numbers are tokens. */
typedef struct {
    Sketch sketch;
    const char *tokens, *values;
    Py_ssize_t token_strides[2], value_strides[2]; /* in bytes, of sample, position */
    char *out;
    Py_ssize_t batch, positions, width, out_stride, next;
    int failed;
} Lines;

static void sketch_lines(void *given) {
    Lines *job = given;
    Py_ssize_t sample, n_lines = job->sketch.n / job->width;
    while ((sample = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->batch) {
        float *out = (float *)(job->out + sample * job->out_stride);
        const char *tokens = job->tokens + sample * job->token_strides[0], *values = job->values + sample * job->value_strides[0];
        memset(out, 0, job->sketch.n_columns * sizeof(float));
        for (Py_ssize_t p = 0; p < job->positions; p++) {
            int64_t line = *(const int64_t *)(tokens + p * job->token_strides[1]);
            const float *own = (const float *)(values + p * job->value_strides[1]);
            if (line < 0 || line >= n_lines || add_part_to_sketch(&job->sketch, line * job->width, (line + 1) * job->width, own, out)) {
                __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
                return;
            }
        }
    }
}

typedef struct {
    const char *left, *right;
    Py_ssize_t left_strides[3], right_strides[3]; /* in bytes, of sample, position, feature */
    Grids grids;
    Py_ssize_t batch, positions;
    char *out;
    Py_ssize_t out_stride, next;
} Elements;

/* The features of a position are read where they are: each is in several grids. The sums stay in the cache. */
static inline __attribute__((always_inline)) void add_position(const Grids *grids, const char *left, Py_ssize_t left_step,
                                                               const char *right, Py_ssize_t right_step, float *sums,
                                                               Py_ssize_t n_out, Py_ssize_t n_in) {
    for (Py_ssize_t k = 0; k < grids->n; k++) {
        const int64_t *outputs = grids->outputs + k * n_out, *inputs = grids->inputs + k * n_in;
        float *sum = sums + k * n_out * n_in;
        for (Py_ssize_t a = 0; a < n_out; a++) {
            float value = *(const float *)(left + outputs[a] * left_step);
            for (Py_ssize_t b = 0; b < n_in; b++) sum[a * n_in + b] += value * *(const float *)(right + inputs[b] * right_step);
        }
    }
}

/* The same for grids of 4 outputs and 4 inputs, the usual ones, of features that are neighbours. */
static void add_position_of_fours(const Grids *grids, const float *left, const float *right, float *sums) {
    for (Py_ssize_t k = 0; k < grids->n; k++) {
        const int64_t *outputs = grids->outputs + 4 * k, *inputs = grids->inputs + 4 * k;
        Four *sum = (Four *)(sums + 16 * k);
        Four values = {right[inputs[0]], right[inputs[1]], right[inputs[2]], right[inputs[3]]};
        for (int a = 0; a < 4; a++) sum[a] += left[outputs[a]] * values;
    }
}

static void take_elements(void *given) {
    Elements *job = given;
    const Grids *grids = &job->grids;
    Py_ssize_t sample, n_columns = grids->n * grids->n_out * grids->n_in;
    Py_ssize_t left_step = job->left_strides[2], right_step = job->right_strides[2];
    int fours = grids->n_out == 4 && grids->n_in == 4 && left_step == sizeof(float) && right_step == sizeof(float);
    while ((sample = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->batch) {
        float *out = (float *)(job->out + sample * job->out_stride);
        memset(out, 0, n_columns * sizeof(float));
        for (Py_ssize_t p = 0; p < job->positions; p++) {
            const char *left = job->left + sample * job->left_strides[0] + p * job->left_strides[1];
            const char *right = job->right + sample * job->right_strides[0] + p * job->right_strides[1];
            if (fours) add_position_of_fours(grids, (const float *)left, (const float *)right, out);
            else add_position(grids, left, left_step, right, right_step, out, grids->n_out, grids->n_in);
        }
        for (Py_ssize_t k = 0; k < n_columns; k++) out[k] *= grids->scale;
    }
}

typedef struct {
    const char *inputs, *gradient;
    Py_ssize_t input_strides[3], gradient_strides[3]; /* in bytes, of sample, channel and position */
    Py_ssize_t batch, channels, positions;
    double eps;
    char *rows;
    Py_ssize_t row_strides[3];
    float *squares; /* of the terms, 2 x batch x channels */
    Py_ssize_t next;
} Channels;

static float total_of(Four a, Four b) {
    a += b;
    return (a[0] + a[1]) + (a[2] + a[3]);
}

/* Sums of x - shift and of their squares. */
static void add_moments(const float *x, Py_ssize_t n, float shift, double *sum, double *squares) {
    Four sums[2] = {{0}, {0}}, of_squares[2] = {{0}, {0}};
    float rest = 0, rest_squares = 0;
    Py_ssize_t p = 0;
    for (; p + 8 <= n; p += 8)
        for (int k = 0; k < 2; k++) {
            Four value = *(const Four *)(x + p + 4 * k) - shift;
            sums[k] += value;
            of_squares[k] += value * value;
        }
    for (; p < n; p++) {
        rest += x[p] - shift;
        rest_squares += (x[p] - shift) * (x[p] - shift);
    }
    *sum += (double)total_of(sums[0], sums[1]) + rest;
    *squares += (double)total_of(of_squares[0], of_squares[1]) + rest_squares;
}

/* found: sums of g (x - mean) and of g, then the sums of their squares */
static void sum_terms(const float *x, const float *g, Py_ssize_t n, float mean, float *found) {
    Four sums[4][2] = {{{0}}};
    float rest[4] = {0};
    Py_ssize_t p = 0;
    for (; p + 8 <= n; p += 8)
        for (int k = 0; k < 2; k++) {
            Four gradient = *(const Four *)(g + p + 4 * k), term = gradient * (*(const Four *)(x + p + 4 * k) - mean);
            sums[0][k] += term;
            sums[1][k] += gradient;
            sums[2][k] += term * term;
            sums[3][k] += gradient * gradient;
        }
    for (; p < n; p++) {
        float term = g[p] * (x[p] - mean);
        rest[0] += term;
        rest[1] += g[p];
        rest[2] += term * term;
        rest[3] += g[p] * g[p];
    }
    for (int k = 0; k < 4; k++) found[k] = total_of(sums[k][0], sums[k][1]) + rest[k];
}

static void put_sums(const Channels *job, Py_ssize_t i, Py_ssize_t c, float scale, const float *found, Py_ssize_t step) {
    char *row = job->rows + i * job->row_strides[1] + c * job->row_strides[2];
    float *squares = job->squares + i * job->channels + c;
    *(float *)row = scale * found[0];
    *(float *)(row + job->row_strides[0]) = found[step];
    squares[0] = scale * scale * found[2 * step];
    squares[job->batch * job->channels] = found[3 * step];
}

/* One channel at a time, which stays in the cache between its mean, its variance and its terms. */
static void sum_channels(void *given) {
    Channels *job = given;
    Py_ssize_t c;
    while ((c = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->channels) {
        const char *inputs = job->inputs + c * job->input_strides[1], *gradient = job->gradient + c * job->gradient_strides[1];
        double number = (double)job->batch * job->positions, sum = 0, squares = 0, unused = 0;
        for (Py_ssize_t i = 0; i < job->batch; i++)
            add_moments((const float *)(inputs + i * job->input_strides[0]), job->positions, 0, &sum, &unused);
        float mean = (float)(sum / number);
        for (Py_ssize_t i = 0; i < job->batch; i++)
            add_moments((const float *)(inputs + i * job->input_strides[0]), job->positions, mean, &unused, &squares);
        float scale = (float)(1 / sqrt(squares / number + job->eps));
        for (Py_ssize_t i = 0; i < job->batch; i++) {
            float found[4];
            sum_terms((const float *)(inputs + i * job->input_strides[0]), (const float *)(gradient + i * job->gradient_strides[0]),
                      job->positions, mean, found);
            put_sums(job, i, c, scale, found, 1);
        }
    }
}

/* Channels that are neighbours, at most as many as this side by side. */
#define BESIDE 8

static inline __attribute__((always_inline)) void sum_neighbours(const Channels *job, Py_ssize_t c, int n) {
    const char *inputs = job->inputs + c * sizeof(float), *gradient = job->gradient + c * sizeof(float);
    double number = (double)job->batch * job->positions, sum[BESIDE] = {0}, squares[BESIDE] = {0};
    float mean[BESIDE], scale[BESIDE];
    for (Py_ssize_t i = 0; i < job->batch; i++) {
        float of_sample[BESIDE] = {0};
        for (Py_ssize_t p = 0; p < job->positions; p++) {
            const float *x = (const float *)(inputs + i * job->input_strides[0] + p * job->input_strides[2]);
            for (int k = 0; k < n; k++) of_sample[k] += x[k];
        }
        for (int k = 0; k < n; k++) sum[k] += of_sample[k];
    }
    for (int k = 0; k < n; k++) mean[k] = (float)(sum[k] / number);
    for (Py_ssize_t i = 0; i < job->batch; i++) {
        float of_sample[BESIDE] = {0};
        for (Py_ssize_t p = 0; p < job->positions; p++) {
            const float *x = (const float *)(inputs + i * job->input_strides[0] + p * job->input_strides[2]);
            for (int k = 0; k < n; k++) of_sample[k] += (x[k] - mean[k]) * (x[k] - mean[k]);
        }
        for (int k = 0; k < n; k++) squares[k] += of_sample[k];
    }
    for (int k = 0; k < n; k++) scale[k] = (float)(1 / sqrt(squares[k] / number + job->eps));
    for (Py_ssize_t i = 0; i < job->batch; i++) {
        float found[4][BESIDE] = {{0}};
        for (Py_ssize_t p = 0; p < job->positions; p++) {
            const float *x = (const float *)(inputs + i * job->input_strides[0] + p * job->input_strides[2]);
            const float *g = (const float *)(gradient + i * job->gradient_strides[0] + p * job->gradient_strides[2]);
            for (int k = 0; k < n; k++) {
                float term = g[k] * (x[k] - mean[k]);
                found[0][k] += term;
                found[1][k] += g[k];
                found[2][k] += term * term;
                found[3][k] += g[k] * g[k];
            }
        }
        for (int k = 0; k < n; k++) put_sums(job, i, c + k, scale[k], &found[0][k], BESIDE);
    }
}

static void sum_channels_beside(void *given) {
    Channels *job = given;
    Py_ssize_t c;
    while ((c = __atomic_fetch_add(&job->next, BESIDE, __ATOMIC_RELAXED)) < job->channels) {
        if (c + BESIDE <= job->channels) sum_neighbours(job, c, BESIDE);
        else sum_neighbours(job, c, (int)(job->channels - c));
    }
}

static void in_threads(void (*work)(void *), void *job, double products, Py_ssize_t batch, Py_ssize_t threads) {
    if (threads > batch) threads = batch;
    if (parallel && threads > 1 && products > FEW_PRODUCTS) parallel(work, job, (unsigned)threads, 0);
    else work(job);
}

/* What follows takes arguments apart. Buffers that were taken are released at the end, also after an error. */

#define MOST_BUFFERS 8
typedef struct {
    Py_buffer taken[MOST_BUFFERS];
    int n;
} Buffers;

static PyObject *done(Buffers *buffers, int failed) {
    while (buffers->n) PyBuffer_Release(&buffers->taken[--buffers->n]);
    if (failed) return NULL;
    Py_RETURN_NONE;
}

/* A buffer of elements of one kind, all of the machine's own form, with at least `least` and at most `most` dimensions. */
static Py_buffer *take(Buffers *buffers, PyObject *object, const char *what, const char *kinds, Py_ssize_t item, int least, int most,
                       int writable) {
    Py_buffer *view = &buffers->taken[buffers->n];
    if (PyObject_GetBuffer(object, view, PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0))) return NULL;
    buffers->n++;
    const char *format = view->format ? view->format : "B";
    if (*format == '@' || *format == '=') format++;
    if (view->ndim < least || view->ndim > most) {
        PyErr_Format(PyExc_ValueError, "%s has %d dimensions, not %d to %d", what, view->ndim, least, most);
        return NULL;
    }
    if (!format[0] || format[1] || !strchr(kinds, format[0]) || view->itemsize != item) {
        PyErr_Format(PyExc_TypeError, "%s has elements of kind %s", what, format);
        return NULL;
    }
    return view;
}

static Py_buffer *take_floats(Buffers *buffers, PyObject *object, const char *what, int least, int most) {
    return take(buffers, object, what, "f", sizeof(float), least, most, 0);
}

/* A vector whose elements are neighbours. */
static Py_buffer *take_vector(Buffers *buffers, PyObject *object, const char *what, const char *kinds, Py_ssize_t item) {
    Py_buffer *view = take(buffers, object, what, kinds, item, 1, 1, 0);
    if (view && view->shape[0] > 1 && view->strides[0] != item) {
        PyErr_Format(PyExc_ValueError, "the elements of %s are not neighbours", what);
        return NULL;
    }
    return view;
}

/* A matrix of `rows` rows, each contiguous. */
static Py_buffer *take_rows(Buffers *buffers, PyObject *object, const char *what, Py_ssize_t rows, int writable) {
    Py_buffer *view = take(buffers, object, what, "f", sizeof(float), 2, 2, writable);
    if (!view) return NULL;
    if ((rows >= 0 && view->shape[0] != rows) || (view->shape[1] > 1 && view->strides[1] != sizeof(float))) {
        PyErr_Format(PyExc_ValueError, "%s has %zd rows, not %zd, or its rows are not contiguous", what, view->shape[0], rows);
        return NULL;
    }
    return view;
}

/* Columns and signs of n elements. Not all columns are looked at: each has to be held against `n_columns` where it is used. */
static int take_columns(Buffers *buffers, PyObject *columns_object, PyObject *signs_object, Py_ssize_t run, Py_ssize_t n,
                        Py_ssize_t n_columns, Sketch *out) {
    Py_buffer *columns = take_vector(buffers, columns_object, "columns", "il", 4), *signs;
    if (!columns) return -1;
    signs = take_vector(buffers, signs_object, "signs", "b", 1);
    if (!signs) return -1;
    if (n < 0) n = signs->shape[0];
    if (run < 1 || n_columns < 1 || signs->shape[0] != n || columns->shape[0] * run != n) {
        PyErr_Format(PyExc_ValueError, "%zd columns of runs of %zd and %zd signs for %zd elements", columns->shape[0], run,
                     signs->shape[0], n);
        return -1;
    }
    *out = (Sketch){columns->buf, signs->buf, n, run, n_columns};
    return 0;
}

static int take_sketch(Buffers *buffers, PyObject *columns_object, PyObject *signs_object, Py_ssize_t run, Py_ssize_t n,
                       Py_ssize_t n_columns, Sketch *out) {
    if (take_columns(buffers, columns_object, signs_object, run, n, n_columns, out)) return -1;
    for (Py_ssize_t k = 0; k < n / run; k++)
        if (out->columns[k] < 0 || out->columns[k] >= n_columns) {
            PyErr_SetString(PyExc_IndexError, "a column is beyond the sketch");
            return -1;
        }
    return 0;
}

/* Numbers below `most`, n for each grid. */
static const int64_t *take_lines(Buffers *buffers, PyObject *object, const char *what, Py_ssize_t n, Py_ssize_t most) {
    Py_buffer *view = take_vector(buffers, object, what, "lq", 8);
    if (!view) return NULL;
    const int64_t *numbers = view->buf;
    if (view->shape[0] != n) {
        PyErr_Format(PyExc_ValueError, "%zd %s of grids that have %zd", view->shape[0], what, n);
        return NULL;
    }
    for (Py_ssize_t k = 0; k < n; k++)
        if (numbers[k] < 0 || numbers[k] >= most) {
            PyErr_Format(PyExc_IndexError, "an element of a grid is beyond the %s", what);
            return NULL;
        }
    return numbers;
}

static int take_grids(Buffers *buffers, PyObject *object, Py_ssize_t n_outputs, Py_ssize_t n_inputs, Py_ssize_t n_columns, Grids *out) {
    PyObject *outputs, *inputs;
    double scale;
    if (!PyArg_ParseTuple(object, "OOnnd:grids", &outputs, &inputs, &out->n_out, &out->n_in, &scale)) return -1;
    if (out->n_out < 1 || out->n_in < 1 || out->n_out > INT32_MAX || out->n_in > INT32_MAX || n_columns % (out->n_out * out->n_in)) {
        PyErr_Format(PyExc_ValueError, "%zd columns are no number of grids of %zd outputs and %zd inputs", n_columns, out->n_out,
                     out->n_in);
        return -1;
    }
    out->scale = (float)scale;
    out->n = n_columns / (out->n_out * out->n_in);
    out->outputs = take_lines(buffers, outputs, "outputs", out->n * out->n_out, n_outputs);
    if (!out->outputs) return -1;
    out->inputs = take_lines(buffers, inputs, "inputs", out->n * out->n_in, n_inputs);
    return out->inputs ? 0 : -1;
}

/* The places of numbered lines. */
static Py_ssize_t *places_of(const int64_t *numbers, Py_ssize_t n, const Py_ssize_t *lines) {
    Py_ssize_t *places = PyMem_Malloc(larger(1, n) * sizeof(Py_ssize_t));
    for (Py_ssize_t k = 0; places && k < n; k++) places[k] = lines[numbers[k]];
    return places;
}

/* One number for each dimension, the last ones of `out`; the dimensions before have `otherwise`. */
static int take_numbers(PyObject *object, const char *what, int dimensions, Py_ssize_t least, Py_ssize_t otherwise, Py_ssize_t *out) {
    if (!PyTuple_Check(object) || PyTuple_Size(object) != dimensions) {
        PyErr_Format(PyExc_ValueError, "%s is not a tuple of %d numbers", what, dimensions);
        return -1;
    }
    for (int d = 0; d < MOST_DIMENSIONS; d++) out[d] = otherwise;
    for (int d = 0; d < dimensions; d++) {
        Py_ssize_t number = PyLong_AsSsize_t(PyTuple_GetItem(object, d));
        if (number == -1 && PyErr_Occurred()) return -1;
        if (number < least || number > LARGEST_NUMBER) {
            PyErr_Format(PyExc_ValueError, "%s has the number %zd", what, number);
            return -1;
        }
        out[MOST_DIMENSIONS - dimensions + d] = number;
    }
    return 0;
}

/* Where the lines of a sample lie, after everything else of the job is known. */
static int plan_lines(Products *job) {
    Py_ssize_t of_dimension[MOST_DIMENSIONS], n_positions = 1, length = 0;
    double floats = 1;
    job->n_phases = job->n_kernel = 1;
    for (int d = 0; d < MOST_DIMENSIONS; d++) {
        job->pitch[d] = job->positions[d] + (job->kernel[d] - 1) * job->dilation[d] / job->stride[d];
        /* steps of the kernel see the same phases again after so many */
        of_dimension[d] = smaller(job->kernel[d], job->stride[d]);
        job->n_phases *= of_dimension[d];
        job->n_kernel *= job->kernel[d];
        floats *= (double)job->pitch[d] * of_dimension[d];
        n_positions *= job->positions[d];
    }
    floats *= job->channels;
    floats += (double)job->n_kernel * job->channels * job->outputs;
    floats += (double)job->pitch[0] * job->pitch[1] * job->pitch[2] * job->outputs;
    if (floats > INT32_MAX) {
        PyErr_SetString(PyExc_OverflowError, "a sample is too large");
        return -1;
    }
    if (n_positions) length = ((job->positions[0] - 1) * job->pitch[1] + job->positions[1] - 1) * job->pitch[2] + job->positions[2];
    job->left_line = rounded_up(length);
    job->right_line = job->pitch[0] * job->pitch[1] * job->pitch[2];
    Py_ssize_t per_group = job->channels / job->groups, inputs = per_group * job->n_kernel;
    job->floats = job->outputs * job->left_line + rounded_up(job->channels * job->n_phases * job->right_line) + LONGEST_VECTOR;
    job->phases = PyMem_Malloc(job->n_phases * MOST_DIMENSIONS * sizeof(Py_ssize_t));
    job->left_at = PyMem_Malloc(larger(1, job->outputs) * sizeof(Py_ssize_t));
    job->right_at = PyMem_Malloc(larger(1, inputs) * sizeof(Py_ssize_t));
    if (!job->phases || !job->left_at || !job->right_at) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t o = 0; o < job->outputs; o++) job->left_at[o] = o * job->left_line;
    for (Py_ssize_t k = 0; k < job->n_phases; k++) {
        Py_ssize_t rest = k;
        for (int d = MOST_DIMENSIONS - 1; d >= 0; d--) {
            Py_ssize_t step = rest % of_dimension[d];
            job->phases[k * MOST_DIMENSIONS + d] = step * job->dilation[d] % job->stride[d];
            rest /= of_dimension[d];
        }
    }
    for (Py_ssize_t k = 0; k < job->n_kernel; k++) {
        Py_ssize_t steps[MOST_DIMENSIONS], rest = k, phase = 0, shift = 0;
        for (int d = MOST_DIMENSIONS - 1; d >= 0; d--) {
            steps[d] = rest % job->kernel[d];
            rest /= job->kernel[d];
        }
        for (int d = 0; d < MOST_DIMENSIONS; d++) {
            phase = phase * of_dimension[d] + steps[d] % of_dimension[d];
            shift = shift * job->pitch[d] + steps[d] * job->dilation[d] / job->stride[d];
        }
        for (Py_ssize_t c = 0; c < per_group; c++)
            job->right_at[c * job->n_kernel + k] = (c * job->n_phases + phase) * job->right_line + shift;
    }
    return 0;
}

static int take_products(Buffers *buffers, PyObject *arguments, Products *job, Py_ssize_t *threads) {
    PyObject *left_object, *pixels_object, *kernel, *stride, *dilation, *before, *positions, *out_object, *sketch, *grids;
    if (!PyArg_ParseTuple(arguments, "OOOOOOOnOOOn:products", &left_object, &pixels_object, &kernel, &stride, &dilation, &before,
                          &positions, &job->groups, &out_object, &sketch, &grids, threads))
        return -1;
    Py_buffer *left = take_floats(buffers, left_object, "left", 3, 3), *pixels, *out;
    if (!left) return -1;
    pixels = take_floats(buffers, pixels_object, "pixels", 3, 2 + MOST_DIMENSIONS);
    if (!pixels) return -1;
    out = take_rows(buffers, out_object, "out", left->shape[0], 1);
    if (!out) return -1;
    int dimensions = pixels->ndim - 2, unused = MOST_DIMENSIONS - dimensions;
    if (take_numbers(kernel, "kernel", dimensions, 1, 1, job->kernel) || take_numbers(stride, "stride", dimensions, 1, 1, job->stride) ||
        take_numbers(dilation, "dilation", dimensions, 1, 1, job->dilation) ||
        take_numbers(before, "before", dimensions, 0, 0, job->before) ||
        take_numbers(positions, "positions", dimensions, 0, 1, job->positions))
        return -1;
    job->batch = left->shape[0];
    job->outputs = left->shape[2];
    job->channels = pixels->shape[1];
    if (pixels->shape[0] != job->batch || left->shape[1] != job->positions[0] * job->positions[1] * job->positions[2]) {
        PyErr_Format(PyExc_ValueError, "left has %zd samples of %zd positions, and pixels %zd samples", job->batch, left->shape[1],
                     pixels->shape[0]);
        return -1;
    }
    if (job->groups < 1 || job->outputs % job->groups || job->channels % job->groups) {
        PyErr_Format(PyExc_ValueError, "%zd outputs and %zd channels in %zd groups", job->outputs, job->channels, job->groups);
        return -1;
    }
    job->left = left->buf;
    memcpy(job->left_strides, left->strides, sizeof(job->left_strides));
    job->pixels = pixels->buf;
    job->pixel_strides[0] = pixels->strides[0];
    job->pixel_strides[1] = pixels->strides[1];
    for (int d = 0; d < MOST_DIMENSIONS; d++) {
        job->sizes[d] = d < unused ? 1 : pixels->shape[2 + d - unused];
        job->pixel_strides[2 + d] = d < unused ? 0 : pixels->strides[2 + d - unused];
    }
    job->out = out->buf;
    job->out_stride = out->strides[0];
    if (plan_lines(job)) return -1;
    Py_ssize_t n = job->outputs * (job->channels / job->groups) * job->n_kernel;
    if (sketch != Py_None) {
        PyObject *columns, *signs;
        Py_ssize_t run;
        if (!PyArg_ParseTuple(sketch, "OOn:sketch", &columns, &signs, &run) ||
            take_sketch(buffers, columns, signs, run, n, out->shape[1], &job->sketch))
            return -1;
        job->floats += n; /* for the row */
    }
    if (grids != Py_None) {
        Grids *found = &job->grids;
        if (job->groups != 1) {
            PyErr_SetString(PyExc_ValueError, "grids of a convolution with groups");
            return -1;
        }
        if (take_grids(buffers, grids, job->outputs, job->channels * job->n_kernel, out->shape[1], found)) return -1;
        job->left_of_grids = places_of(found->outputs, found->n * found->n_out, job->left_at);
        job->right_of_grids = places_of(found->inputs, found->n * found->n_in, job->right_at);
        if (job->left_of_grids && job->right_of_grids) return 0;
        PyErr_NoMemory();
        return -1;
    }
    if (sketch == Py_None && out->shape[1] != n) {
        PyErr_Format(PyExc_ValueError, "out has %zd columns for %zd elements", out->shape[1], n);
        return -1;
    }
    return 0;
}

static PyObject *products(PyObject *module, PyObject *arguments) {
    Buffers buffers = {.n = 0};
    Products job = {.dots = level.dots};
    Py_ssize_t threads = 1;
    int failed = take_products(&buffers, arguments, &job, &threads);
    if (!failed) {
        double number = (double)job.batch * job.outputs * job.left_line * (job.channels / job.groups) * job.n_kernel;
        Py_BEGIN_ALLOW_THREADS
        in_threads(multiply_samples, &job, number, job.batch, threads);
        Py_END_ALLOW_THREADS
        if (job.failed) {
            PyErr_NoMemory();
            failed = -1;
        }
    }
    PyMem_Free(job.phases);
    PyMem_Free(job.left_at);
    PyMem_Free(job.right_at);
    PyMem_Free(job.left_of_grids);
    PyMem_Free(job.right_of_grids);
    return done(&buffers, failed);
}

static PyObject *sketch(PyObject *module, PyObject *arguments) {
    PyObject *rows_object, *columns_object, *signs_object, *out_object;
    Py_ssize_t run, threads;
    Buffers buffers = {.n = 0};
    Sketches job = {.next = 0};
    if (!PyArg_ParseTuple(arguments, "OOOnOn:sketch", &rows_object, &columns_object, &signs_object, &run, &out_object, &threads))
        return NULL;
    Py_buffer *rows = take_rows(&buffers, rows_object, "rows", -1, 0);
    if (!rows) return done(&buffers, 1);
    Py_buffer *out = take_rows(&buffers, out_object, "out", rows->shape[0], 1);
    if (!out || take_sketch(&buffers, columns_object, signs_object, run, rows->shape[1], out->shape[1], &job.sketch))
        return done(&buffers, 1);
    job.rows = rows->buf;
    job.out = out->buf;
    job.batch = rows->shape[0];
    job.row_stride = rows->strides[0];
    job.out_stride = out->strides[0];
    Py_BEGIN_ALLOW_THREADS
    in_threads(sketch_rows, &job, (double)job.batch * job.sketch.n, job.batch, threads);
    Py_END_ALLOW_THREADS
    return done(&buffers, 0);
}

static PyObject *lines(PyObject *module, PyObject *arguments) {
    PyObject *tokens_object, *values_object, *columns_object, *signs_object, *out_object;
    Py_ssize_t run, threads;
    Buffers buffers = {.n = 0};
    Lines job = {.next = 0};
    if (!PyArg_ParseTuple(arguments, "OOOOnOn:lines", &tokens_object, &values_object, &columns_object, &signs_object, &run, &out_object,
                          &threads))
        return NULL;
    Py_buffer *tokens = take(&buffers, tokens_object, "tokens", "lq", 8, 2, 2, 0), *values, *out;
    if (!tokens) return done(&buffers, 1);
    values = take_floats(&buffers, values_object, "values", 3, 3);
    if (!values) return done(&buffers, 1);
    out = take_rows(&buffers, out_object, "out", tokens->shape[0], 1);
    if (!out || take_columns(&buffers, columns_object, signs_object, run, -1, out->shape[1], &job.sketch)) return done(&buffers, 1);
    job.width = values->shape[2];
    if (values->shape[0] != tokens->shape[0] || values->shape[1] != tokens->shape[1] || job.width < 1 || job.sketch.n % job.width ||
        (job.width > 1 && values->strides[2] != sizeof(float))) {
        PyErr_SetString(PyExc_ValueError, "tokens, values and signs do not fit, or the values of a line are not neighbours");
        return done(&buffers, 1);
    }
    job.tokens = tokens->buf;
    job.values = values->buf;
    memcpy(job.token_strides, tokens->strides, sizeof(job.token_strides));
    memcpy(job.value_strides, values->strides, sizeof(job.value_strides));
    job.batch = tokens->shape[0];
    job.positions = tokens->shape[1];
    job.out = out->buf;
    job.out_stride = out->strides[0];
    Py_BEGIN_ALLOW_THREADS
    in_threads(sketch_lines, &job, (double)job.batch * job.positions * job.width, job.batch, threads);
    Py_END_ALLOW_THREADS
    if (job.failed) {
        PyErr_SetString(PyExc_IndexError, "a token is beyond the lines, or a column beyond the sketch");
        return done(&buffers, 1);
    }
    return done(&buffers, 0);
}

static PyObject *elements(PyObject *module, PyObject *arguments) {
    PyObject *left_object, *right_object, *grids, *out_object;
    Py_ssize_t threads;
    Buffers buffers = {.n = 0};
    Elements job = {.next = 0};
    if (!PyArg_ParseTuple(arguments, "OOOOn:elements", &left_object, &right_object, &grids, &out_object, &threads)) return NULL;
    Py_buffer *left = take_floats(&buffers, left_object, "left", 3, 3), *right, *out;
    if (!left) return done(&buffers, 1);
    right = take_floats(&buffers, right_object, "right", 3, 3);
    if (!right) return done(&buffers, 1);
    out = take_rows(&buffers, out_object, "out", left->shape[0], 1);
    if (!out) return done(&buffers, 1);
    if (right->shape[0] != left->shape[0] || right->shape[1] != left->shape[1]) {
        PyErr_SetString(PyExc_ValueError, "left and right have other samples or positions");
        return done(&buffers, 1);
    }
    if (take_grids(&buffers, grids, left->shape[2], right->shape[2], out->shape[1], &job.grids)) return done(&buffers, 1);
    job.left = left->buf;
    job.right = right->buf;
    memcpy(job.left_strides, left->strides, sizeof(job.left_strides));
    memcpy(job.right_strides, right->strides, sizeof(job.right_strides));
    job.batch = left->shape[0];
    job.positions = left->shape[1];
    job.out = out->buf;
    job.out_stride = out->strides[0];
    Py_BEGIN_ALLOW_THREADS
    in_threads(take_elements, &job, (double)job.batch * job.positions * out->shape[1], job.batch, threads);
    Py_END_ALLOW_THREADS
    return done(&buffers, 0);
}

static PyObject *channel_sums(PyObject *module, PyObject *arguments) {
    PyObject *inputs_object, *gradient_object, *rows_object, *bounds_object;
    Py_ssize_t threads;
    Buffers buffers = {.n = 0};
    Channels job = {.next = 0};
    if (!PyArg_ParseTuple(arguments, "OOdOOn:channel_sums", &inputs_object, &gradient_object, &job.eps, &rows_object, &bounds_object,
                          &threads))
        return NULL;
    Py_buffer *inputs = take_floats(&buffers, inputs_object, "inputs", 3, 3), *gradient, *rows, *bounds;
    if (!inputs) return done(&buffers, 1);
    gradient = take_floats(&buffers, gradient_object, "gradient", 3, 3);
    if (!gradient) return done(&buffers, 1);
    rows = take(&buffers, rows_object, "rows", "f", sizeof(float), 3, 3, 1);
    if (!rows) return done(&buffers, 1);
    bounds = take_rows(&buffers, bounds_object, "bounds", 2, 1);
    if (!bounds) return done(&buffers, 1);
    int fits = rows->shape[0] == 2 && rows->shape[1] == inputs->shape[0] && rows->shape[2] == inputs->shape[1] &&
               bounds->shape[1] == inputs->shape[0];
    for (int d = 0; d < 3; d++) fits = fits && gradient->shape[d] == inputs->shape[d];
    int in_lines = inputs->strides[2] == sizeof(float) && gradient->strides[2] == sizeof(float);
    fits = fits && (in_lines || (inputs->strides[1] == sizeof(float) && gradient->strides[1] == sizeof(float)));
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "inputs, gradient, rows and bounds do not fit, or have no neighbours");
        return done(&buffers, 1);
    }
    job.inputs = inputs->buf;
    job.gradient = gradient->buf;
    job.rows = rows->buf;
    memcpy(job.input_strides, inputs->strides, sizeof(job.input_strides));
    memcpy(job.gradient_strides, gradient->strides, sizeof(job.gradient_strides));
    memcpy(job.row_strides, rows->strides, sizeof(job.row_strides));
    job.batch = inputs->shape[0];
    job.channels = inputs->shape[1];
    job.positions = inputs->shape[2];
    job.squares = PyMem_Malloc(larger(1, 2 * job.batch * job.channels) * sizeof(float));
    if (!job.squares) {
        PyErr_NoMemory();
        return done(&buffers, 1);
    }
    Py_BEGIN_ALLOW_THREADS
    in_threads(in_lines ? sum_channels : sum_channels_beside, &job, 4.0 * job.batch * job.channels * job.positions, job.channels, threads);
    for (Py_ssize_t k = 0; k < 2; k++)
        for (Py_ssize_t i = 0; i < job.batch; i++) {
            double squares = 0;
            for (Py_ssize_t c = 0; c < job.channels; c++) squares += job.squares[(k * job.batch + i) * job.channels + c];
            ((float *)((char *)bounds->buf + k * bounds->strides[0]))[i] = (float)sqrt(squares * job.positions);
        }
    Py_END_ALLOW_THREADS
    PyMem_Free(job.squares);
    return done(&buffers, 0);
}

static PyObject *use(PyObject *module, PyObject *argument) {
    const char *name = PyUnicode_Check(argument) ? PyUnicode_AsUTF8AndSize(argument, NULL) : "";
    if (!name) return NULL;
    Level found;
    if (find_level(name, &found)) {
        PyErr_Format(PyExc_ValueError, "this processor has no loops called %s", name);
        return NULL;
    }
    PyObject *before = PyUnicode_FromString(level.name);
    level = found;
    return before;
}

static PyMethodDef methods[] = {
    {"products", products, METH_VARARGS,
     "products(left, pixels, kernel, stride, dilation, before, positions, groups, out, sketch, grids, threads): sums of products"},
    {"channel_sums", channel_sums, METH_VARARGS, "channel_sums(inputs, gradient, eps, rows, bounds, threads): sums by channel"},
    {"elements", elements, METH_VARARGS, "elements(left, right, grids, out, threads): elements of sums of outer products"},
    {"sketch", sketch, METH_VARARGS, "sketch(rows, columns, signs, run, out, threads): out[column of e] += signs[e] * rows[e]"},
    {"lines", lines, METH_VARARGS,
     "lines(tokens, values, columns, signs, run, out, threads): out[i, column of e] += signs[e] * values[i, p, e of line tokens[i, p]]"},
    {"use", use, METH_O, "use(level): use the loops for avx2 or plain; return the level before"},
    {NULL, NULL, 0, NULL},
};

static int loaded(PyObject *module) {
    parallel = (Parallel *)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    return find_level(NULL, &level);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, loaded}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_rows", .m_doc = "The inner loops of recording.", .m_methods = methods, .m_slots = slots};

PyMODINIT_FUNC PyInit__rows(void) { return PyModuleDef_Init(&definition); }
