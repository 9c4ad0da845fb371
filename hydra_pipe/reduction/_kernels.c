/* The inner loops of a reduction: each stored value is read once, and converted, weighted and used while it is in a register.
 *
 * decode(stored, weight, out)          out[k] = weight[k] * stored[k]
 * dots(stored, weight, tests, out)     out[k, j] += weight[k] * <stored[k], tests[j]>
 * fold(stored, weight, samples, sums)  sums[samples[k]] += weight[k] * stored[k]
 *
 * Stored values are float16, int8 or float32; everything else is float32. Arguments are checked here: whatever is passed from
 * Python, nothing outside of the arrays is touched. hydra_pipe/reduction/kernels.py is what the package calls, and has the same in
 * NumPy for where this cannot be compiled or loaded: it is for x86-64 with AVX2.
 *
 * A sum goes over the columns in the same order for every row and test sample, wherever they stand in their arrays: results do
 * not depend on how rows are grouped. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if !defined(__x86_64__) || !(defined(__GNUC__) || defined(__clang__))
#error "only for x86-64, by GCC or Clang"
#endif

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define INLINE AVX2 static inline __attribute__((always_inline))

/* `kind` below is one of these, and a constant wherever a loop is expanded. */
enum { HALF, BYTE, SINGLE };

/* A matrix whose rows are contiguous. */
typedef struct {
    char *data;
    Py_ssize_t rows, columns, stride; /* stride: bytes from row to row */
    int kind;
} Matrix;

/* One element a row; data is NULL where every weight is 1. */
typedef struct {
    char *data;
    Py_ssize_t stride;
} Vector;

static inline char *row_of(const Matrix *m, Py_ssize_t k) { return m->data + k * m->stride; }

static inline float weight_of(const Vector *w, Py_ssize_t k) { return w->data ? *(const float *)(w->data + k * w->stride) : 1.0f; }

static inline int64_t sample_of(const Vector *samples, Py_ssize_t k) { return *(const int64_t *)(samples->data + k * samples->stride); }

INLINE __m256 load8(const char *row, Py_ssize_t i, int kind) {
    if (kind == HALF) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(row + 2 * i)));
    if (kind == BYTE) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(row + i))));
    return _mm256_loadu_ps((const float *)row + i);
}

INLINE float load1(const char *row, Py_ssize_t i, int kind) {
    if (kind == HALF) return _cvtsh_ss(((const uint16_t *)row)[i]);
    if (kind == BYTE) return (float)((const int8_t *)row)[i];
    return ((const float *)row)[i];
}

INLINE void decode_kind(const Matrix *stored, const Vector *w, const Matrix *out, int kind) {
    for (Py_ssize_t k = 0; k < stored->rows; k++) {
        const char *row = row_of(stored, k);
        float weight = weight_of(w, k), *target = (float *)row_of(out, k);
        Py_ssize_t i = 0, n = stored->columns;
        for (; i + 8 <= n; i += 8) _mm256_storeu_ps(target + i, _mm256_mul_ps(_mm256_set1_ps(weight), load8(row, i, kind)));
        for (; i < n; i++) target[i] = weight * load1(row, i, kind);
    }
}

INLINE void fold_kind(const Matrix *stored, const Vector *w, const Vector *samples, const Matrix *sums, int kind) {
    for (Py_ssize_t k = 0; k < stored->rows; k++) {
        if (sample_of(samples, k) < 0) continue;
        const char *row = row_of(stored, k);
        float weight = weight_of(w, k), *sum = (float *)row_of(sums, (Py_ssize_t)sample_of(samples, k));
        Py_ssize_t i = 0, n = stored->columns;
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(sum + i, _mm256_fmadd_ps(_mm256_set1_ps(weight), load8(row, i, kind), _mm256_loadu_ps(sum + i)));
        for (; i < n; i++) sum[i] = _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(weight), _mm_set_ss(load1(row, i, kind)), _mm_set_ss(sum[i])));
    }
}

INLINE float total(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* Some rows with some test samples: enough of both that eight sums are under way. */
INLINE void dots_block(const Matrix *stored, const Vector *w, const Matrix *tests, const Matrix *out, Py_ssize_t k,
                            Py_ssize_t j, int n_rows, int n_tests, int kind) {
    __m256 sums[4][2];
    const char *rows[4];
    const float *columns[2];
    Py_ssize_t n = stored->columns, i = 0;
    for (int a = 0; a < n_rows; a++) rows[a] = row_of(stored, k + a);
    for (int b = 0; b < n_tests; b++) columns[b] = (const float *)row_of(tests, j + b);
    for (int a = 0; a < n_rows; a++)
        for (int b = 0; b < n_tests; b++) sums[a][b] = _mm256_setzero_ps();
    for (; i + 8 <= n; i += 8) {
        __m256 test[2];
        for (int b = 0; b < n_tests; b++) test[b] = _mm256_loadu_ps(columns[b] + i);
        for (int a = 0; a < n_rows; a++) {
            __m256 values = load8(rows[a], i, kind);
            for (int b = 0; b < n_tests; b++) sums[a][b] = _mm256_fmadd_ps(values, test[b], sums[a][b]);
        }
    }
    for (int a = 0; a < n_rows; a++) {
        float *scores = (float *)row_of(out, k + a), weight = weight_of(w, k + a);
        for (int b = 0; b < n_tests; b++) {
            float sum = total(sums[a][b]);
            for (Py_ssize_t rest = i; rest < n; rest++) sum += load1(rows[a], rest, kind) * columns[b][rest];
            scores[j + b] += weight * sum;
        }
    }
}

INLINE void dots_kind(const Matrix *stored, const Vector *w, const Matrix *tests, const Matrix *out, int kind) {
    Py_ssize_t k = 0;
    for (; k + 4 <= stored->rows; k += 4) {
        Py_ssize_t j = 0;
        for (; j + 2 <= tests->rows; j += 2) dots_block(stored, w, tests, out, k, j, 4, 2, kind);
        for (; j < tests->rows; j++) dots_block(stored, w, tests, out, k, j, 4, 1, kind);
    }
    for (; k < stored->rows; k++)
        for (Py_ssize_t j = 0; j < tests->rows; j++) dots_block(stored, w, tests, out, k, j, 1, 1, kind);
}
#define BY_KIND(LOOP, KIND, ...)                                                                                                   \
    switch (KIND) {                                                                                                                \
    case HALF: LOOP(__VA_ARGS__, HALF); break;                                                                                     \
    case BYTE: LOOP(__VA_ARGS__, BYTE); break;                                                                                     \
    default: LOOP(__VA_ARGS__, SINGLE);                                                                                            \
    }

AVX2 static void decode_all(const Matrix *stored, const Vector *w, const Matrix *out) {
    BY_KIND(decode_kind, stored->kind, stored, w, out)
}

AVX2 static void dots_all(const Matrix *stored, const Vector *w, const Matrix *tests, const Matrix *out) {
    BY_KIND(dots_kind, stored->kind, stored, w, tests, out)
}

AVX2 static void fold_all(const Matrix *stored, const Vector *w, const Vector *samples, const Matrix *sums) {
    BY_KIND(fold_kind, stored->kind, stored, w, samples, sums)
}

/* What follows takes arguments apart. Buffers that were taken are released at the end, also after an error. */

#define MOST_BUFFERS 4
typedef struct {
    Py_buffer taken[MOST_BUFFERS];
    int n;
} Buffers;

static void release(Buffers *buffers) {
    while (buffers->n) PyBuffer_Release(&buffers->taken[--buffers->n]);
}

static Py_buffer *take(Buffers *buffers, PyObject *object, const char *what, int dimensions, int writable) {
    Py_buffer *view = &buffers->taken[buffers->n];
    if (PyObject_GetBuffer(object, view, PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0))) return NULL;
    buffers->n++;
    if (view->ndim != dimensions || !view->format) {
        PyErr_Format(PyExc_ValueError, "%s has %d dimensions, not %d", what, view->ndim, dimensions);
        return NULL;
    }
    return view;
}

/* "=e" and "<e" are "e" on the machines that this is compiled for. */
static char format_of(const Py_buffer *view) {
    const char *format = view->format;
    if (*format == '@' || *format == '=' || *format == '<') format++;
    return format[0] && !format[1] ? format[0] : '?';
}

static int take_matrix(Buffers *buffers, PyObject *object, const char *what, int writable, int any_kind, Matrix *out) {
    Py_buffer *view = take(buffers, object, what, 2, writable);
    if (!view) return -1;
    char format = format_of(view);
    out->kind = format == 'f' ? SINGLE : format == 'e' ? HALF : format == 'b' ? BYTE : -1;
    if (out->kind < 0 || (!any_kind && out->kind != SINGLE)) {
        PyErr_Format(PyExc_TypeError, "%s has elements of kind %s", what, view->format);
        return -1;
    }
    if (view->shape[1] > 1 && view->strides[1] != view->itemsize) {
        PyErr_Format(PyExc_ValueError, "the rows of %s are not contiguous", what);
        return -1;
    }
    *out = (Matrix){view->buf, view->shape[0], view->shape[1], view->strides[0], out->kind};
    return 0;
}

static int take_vector(Buffers *buffers, PyObject *object, const char *what, const char *kinds, Py_ssize_t n, Vector *out) {
    Py_buffer *view = take(buffers, object, what, 1, 0);
    if (!view) return -1;
    if (!strchr(kinds, format_of(view)) || view->itemsize != (*kinds == 'f' ? 4 : 8)) {
        PyErr_Format(PyExc_TypeError, "%s has elements of kind %s", what, view->format);
        return -1;
    }
    if (view->shape[0] != n) {
        PyErr_Format(PyExc_ValueError, "%s has %zd elements for %zd rows", what, view->shape[0], n);
        return -1;
    }
    *out = (Vector){view->buf, view->strides[0]};
    return 0;
}

static int take_weights(Buffers *buffers, PyObject *object, Py_ssize_t n, Vector *out) {
    *out = (Vector){NULL, 0};
    return object == Py_None ? 0 : take_vector(buffers, object, "weight", "f", n, out);
}

static int same_shape(const Matrix *m, const char *what, Py_ssize_t rows, Py_ssize_t columns) {
    if (m->rows == rows && m->columns == columns) return 0;
    PyErr_Format(PyExc_ValueError, "%s has shape (%zd, %zd), not (%zd, %zd)", what, m->rows, m->columns, rows, columns);
    return -1;
}

static PyObject *done(Buffers *buffers, int failed) {
    release(buffers);
    if (failed) return NULL;
    Py_RETURN_NONE;
}

static PyObject *decode(PyObject *module, PyObject *arguments) {
    PyObject *stored_object, *weight_object, *out_object;
    Buffers buffers = {.n = 0};
    Matrix stored, out;
    Vector weights;
    if (!PyArg_ParseTuple(arguments, "OOO:decode", &stored_object, &weight_object, &out_object)) return NULL;
    if (take_matrix(&buffers, stored_object, "stored", 0, 1, &stored) || take_matrix(&buffers, out_object, "out", 1, 0, &out) ||
        take_weights(&buffers, weight_object, stored.rows, &weights) || same_shape(&out, "out", stored.rows, stored.columns))
        return done(&buffers, 1);
    Py_BEGIN_ALLOW_THREADS
    decode_all(&stored, &weights, &out);
    Py_END_ALLOW_THREADS
    return done(&buffers, 0);
}

static PyObject *dots(PyObject *module, PyObject *arguments) {
    PyObject *stored_object, *weight_object, *tests_object, *out_object;
    Buffers buffers = {.n = 0};
    Matrix stored, tests, out;
    Vector weights;
    if (!PyArg_ParseTuple(arguments, "OOOO:dots", &stored_object, &weight_object, &tests_object, &out_object)) return NULL;
    if (take_matrix(&buffers, stored_object, "stored", 0, 1, &stored) || take_matrix(&buffers, tests_object, "tests", 0, 0, &tests) ||
        take_matrix(&buffers, out_object, "out", 1, 0, &out) || take_weights(&buffers, weight_object, stored.rows, &weights) ||
        same_shape(&tests, "tests", tests.rows, stored.columns) || same_shape(&out, "out", stored.rows, tests.rows))
        return done(&buffers, 1);
    Py_BEGIN_ALLOW_THREADS
    dots_all(&stored, &weights, &tests, &out);
    Py_END_ALLOW_THREADS
    return done(&buffers, 0);
}

static PyObject *fold(PyObject *module, PyObject *arguments) {
    PyObject *stored_object, *weight_object, *samples_object, *sums_object;
    Buffers buffers = {.n = 0};
    Matrix stored, sums;
    Vector weights, samples;
    if (!PyArg_ParseTuple(arguments, "OOOO:fold", &stored_object, &weight_object, &samples_object, &sums_object)) return NULL;
    if (take_matrix(&buffers, stored_object, "stored", 0, 1, &stored) || take_matrix(&buffers, sums_object, "sums", 1, 0, &sums) ||
        take_weights(&buffers, weight_object, stored.rows, &weights) ||
        take_vector(&buffers, samples_object, "samples", "lq", stored.rows, &samples) ||
        same_shape(&sums, "sums", sums.rows, stored.columns))
        return done(&buffers, 1);
    for (Py_ssize_t k = 0; k < stored.rows; k++)
        if (sample_of(&samples, k) >= sums.rows) {
            PyErr_SetString(PyExc_IndexError, "a sample is beyond the sums");
            return done(&buffers, 1);
        }
    Py_BEGIN_ALLOW_THREADS
    fold_all(&stored, &weights, &samples, &sums);
    Py_END_ALLOW_THREADS
    return done(&buffers, 0);
}

static PyMethodDef methods[] = {
    {"decode", decode, METH_VARARGS, "decode(stored, weight, out): out[k] = weight[k] * stored[k]"},
    {"dots", dots, METH_VARARGS, "dots(stored, weight, tests, out): out[k, j] += weight[k] * <stored[k], tests[j]>"},
    {"fold", fold, METH_VARARGS, "fold(stored, weight, samples, sums): sums[samples[k]] += weight[k] * stored[k], of samples >= 0"},
    {NULL, NULL, 0, NULL},
};

static int loaded(PyObject *module) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 0;
    PyErr_SetString(PyExc_ImportError, "this processor has no AVX2, FMA and F16C");
    return -1;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, loaded}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_kernels", .m_doc = "The inner loops of a reduction.", .m_methods = methods, .m_slots = slots};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModuleDef_Init(&definition); }
