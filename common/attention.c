// Attention in fp32 and its gradient: softmax(query key^T scale) value for each head of each text.
//
// The same in PyTorch is `reference` in attention.py: read that first; this file is compared with it when it
// is compiled. As in FlashAttention (Dao et al. 2022), the probabilities of all pairs of tokens are never
// kept: the forward pass keeps the logarithm of each row's sum, with which the backward pass computes them
// again, in squares of TILE queries and keys that stay in the cache. What makes it fast is `multiply`, whose
// sums stay in registers; a head's numbers are first laid out so that it reads them in order.
//
// Shapes: B texts, H heads, T tokens, D numbers of a head: 32, as in MiniLM, a constant that lets the
// compiler unroll its loops. With heads of 64 it gained nothing.

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && !defined(PORTABLE)
#define LANES 16  // numbers in a vector register
enum { ROWS = 8, TILE = 64 };
#elif defined(__AVX2__) && defined(__FMA__) && !defined(PORTABLE)
#define LANES 8
enum { ROWS = 6, TILE = 48 };
#else
#define LANES 4
enum { ROWS = 6, TILE = 48 };
#endif
#include "vectors.h"

enum { SIZE = 32 };                             // D
enum { WIDE = 2 * LANES, QUERIES = 2 * ROWS };  // columns of `multiply`, and queries of `forward` at a time
static const float NOTHING = -1e30f;            // added to the score of a key that only fills a vector

// What attention.py describes with ctypes, field by field. Query, key and value are (B, H, T, D) with these
// strides in numbers, and D numbers together; all others are contiguous.
typedef struct {
    int32_t texts, heads, length;  // B, H, T
    int64_t text_stride, head_stride, row_stride;
    float scale;
    const float *query, *key, *value;
    const float *bias;         // (B, T), added to the scores of each key; NULL: nothing
    float *output, *log_sums;  // (B, T, H, D) and (B, T, H)
    const float *output_grad;  // (B, T, H, D), as all gradients
    float *query_grad, *key_grad, *value_grad;
    _Atomic int32_t next;  // the head that the next free thread takes
} Attention;

// --- A product of matrices

// Write, or add, the product of a (ROWS, depth) and b (depth, WIDE) to c (ROWS, WIDE). The numbers of a row
// of `a` lie `a_step` apart.
INLINE void multiply(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_row, int depth,
                     float *c, int64_t c_row, int adds) {
    Floats sums[ROWS][2];
    for (int row = 0; row < ROWS; row++)
        for (int part = 0; part < 2; part++)
            sums[row][part] = adds ? load(c + row * c_row + part * LANES) : (Floats){0};
    for (int step = 0; step < depth; step++) {
        Floats left = load(b + step * b_row), right = load(b + step * b_row + LANES);
        for (int row = 0; row < ROWS; row++) {
            Floats number = splat(a[row * a_row + step * a_step]);
            sums[row][0] += number * left;
            sums[row][1] += number * right;
        }
    }
    for (int row = 0; row < ROWS; row++)
        for (int part = 0; part < 2; part++) store(c + row * c_row + part * LANES, sums[row][part]);
}

// --- How a head's numbers are laid out

static int round_up(int number, int multiple) { return (number + multiple - 1) / multiple * multiple; }
static int smaller(int one, int other) { return one < other ? one : other; }

// Copy `count` rows of D numbers, times a factor, and write zeros for those up to `padded`.
static void copy_rows(const float *from, int64_t stride, int count, int padded, int size, float factor,
                      float *to) {
    for (int row = 0; row < padded; row++)
        for (int i = 0; i < size; i += LANES)
            store(to + row * size + i, row < count ? load(from + row * stride + i) * factor : (Floats){0});
}

// Copy rows as columns, WIDE of them beside each other: (padded / WIDE, D, WIDE).
static void copy_columns(const float *from, int64_t stride, int count, int padded, int size, float *to) {
    for (int row = 0; row < padded; row++)
        for (int i = 0; i < size; i++)
            to[(row / WIDE * size + i) * WIDE + row % WIDE] = row < count ? from[row * stride + i] : 0;
}

// What is added to the score of each key.
static void copy_bias(const Attention *job, int text, int padded, float *to) {
    for (int key = 0; key < padded; key++) to[key] = key < job->length ? 0 : NOTHING;
    if (job->bias) memcpy(to, job->bias + (int64_t)text * job->length, job->length * sizeof(float));
}

// --- The two passes, for one head of one text

// exp(x) for x up to 0, and 0 below -87
INLINE Floats probability_of(Floats x) { return choose(x < -87.0f, (Floats){0}, exponential(x)); }

INLINE Floats larger(Floats one, Floats other) { return choose(one > other, one, other); }

// Make probabilities, not yet divided by their sum, of a query's scores (keys); return the sum, and write
// its logarithm. The two vectors of a step need not wait for each other.
static float soften(float *scores, const float *bias, int keys, float *log_sum) {
    Floats highest[2] = {splat(-INFINITY), splat(-INFINITY)}, sums[2] = {{0}, {0}};
    for (int key = 0; key < keys; key += WIDE)
        for (int part = 0; part < 2; part++) {
            float *place = scores + key + part * LANES;
            Floats score = load(place) + load(bias + key + part * LANES);
            store(place, score);
            highest[part] = larger(score, highest[part]);
        }
    Floats both = larger(highest[0], highest[1]);
    float largest = both[0];
    for (int lane = 1; lane < LANES; lane++) largest = both[lane] > largest ? both[lane] : largest;
    for (int key = 0; key < keys; key += WIDE)
        for (int part = 0; part < 2; part++) {
            float *place = scores + key + part * LANES;
            Floats probability = probability_of(load(place) - largest);
            store(place, probability);
            sums[part] += probability;
        }
    float sum = sum_of(sums[0] + sums[1]);
    *log_sum = largest + logf(sum);
    return sum;
}

static void forward(const Attention *job, int text, int head, float *memory) {
    const int size = SIZE;
    int length = job->length, keys = round_up(length, WIDE);
    int64_t begin = text * job->text_stride + head * job->head_stride, stride = job->row_stride;
    float *columns = memory, *values = columns + keys * size, *bias = values + keys * size;
    float *queries = bias + keys, *scores = queries + QUERIES * size, *results = scores + QUERIES * keys;
    copy_columns(job->key + begin, stride, length, keys, size, columns);
    copy_rows(job->value + begin, stride, length, keys, size, 1, values);
    copy_bias(job, text, keys, bias);
    for (int first = 0; first < length; first += QUERIES) {
        int count = smaller(QUERIES, length - first);
        copy_rows(job->query + begin + first * stride, stride, count, QUERIES, size, job->scale, queries);
        for (int row = 0; row < count; row += ROWS)
            for (int key = 0; key < keys; key += WIDE)
                multiply(queries + row * size, size, 1, columns + key * size, WIDE, size,
                         scores + row * keys + key, keys, 0);
        float sums[QUERIES];
        for (int row = 0; row < count; row++) {
            int64_t place = ((int64_t)text * length + first + row) * job->heads + head;
            sums[row] = soften(scores + row * keys, bias, keys, job->log_sums + place);
        }
        for (int row = 0; row < count; row += ROWS)
            for (int i = 0; i < size; i += WIDE)
                multiply(scores + row * keys, keys, 1, values + i, size, keys, results + row * size + i, size,
                         0);
        for (int row = 0; row < count; row++) {
            float *to = job->output + (((int64_t)text * length + first + row) * job->heads + head) * size;
            for (int i = 0; i < size; i += LANES) store(to + i, load(results + row * size + i) / sums[row]);
        }
    }
}

// With P the probabilities, dP = dO V^T and dS = P (dP - sum of dO O): dV = P^T dO, dK = dS^T Q, dQ = dS K.
static void backward(const Attention *job, int text, int head, float *memory) {
    const int size = SIZE;
    int length = job->length, keys = round_up(length, WIDE), rows = round_up(length, ROWS);
    int64_t begin = text * job->text_stride + head * job->head_stride, stride = job->row_stride;
    int64_t own = ((int64_t)text * length * job->heads + head) * size, step = (int64_t)job->heads * size;
    float *key_rows = memory, *key_columns = key_rows + keys * size,
          *value_columns = key_columns + keys * size;
    float *queries = value_columns + keys * size, *grads = queries + rows * size;
    float *query_grads = grads + rows * size, *key_grads = query_grads + rows * size;
    float *value_grads = key_grads + TILE * size, *bias = value_grads + TILE * size;
    float *log_sums = bias + keys, *products = log_sums + rows;  // of dO and O
    float *p = products + rows, *ds = p + TILE * TILE;
    copy_rows(job->key + begin, stride, length, keys, size, 1, key_rows);
    copy_columns(job->key + begin, stride, length, keys, size, key_columns);
    copy_columns(job->value + begin, stride, length, keys, size, value_columns);
    copy_rows(job->query + begin, stride, length, rows, size, job->scale, queries);
    copy_rows(job->output_grad + own, step, length, rows, size, 1, grads);
    copy_bias(job, text, keys, bias);
    memset(query_grads, 0, (size_t)rows * size * sizeof(float));
    // of rows that only fill the last block all numbers are 0: they add nothing to any gradient
    for (int row = 0; row < rows; row++) {
        Floats sums = {0};
        if (row < length) {
            log_sums[row] = job->log_sums[((int64_t)text * length + row) * job->heads + head];
            for (int i = 0; i < size; i += LANES)
                sums += load(grads + row * size + i) * load(job->output + own + row * step + i);
        }
        products[row] = sum_of(sums);
    }
    for (int key = 0; key < keys; key += TILE) {
        int num_keys = smaller(TILE, keys - key);
        memset(key_grads, 0, 2 * TILE * size * sizeof(float));  // and value_grads
        for (int row = 0; row < rows; row += TILE) {
            int num_rows = smaller(TILE, rows - row);
            for (int i = 0; i < num_rows; i += ROWS)
                for (int j = 0; j < num_keys; j += WIDE) {
                    multiply(queries + (row + i) * size, size, 1, key_columns + (key + j) * size, WIDE, size,
                             p + i * TILE + j, TILE, 0);
                    multiply(grads + (row + i) * size, size, 1, value_columns + (key + j) * size, WIDE, size,
                             ds + i * TILE + j, TILE, 0);
                }
            for (int i = 0; i < num_rows; i++)
                for (int j = 0; j < num_keys; j += LANES) {
                    Floats score = load(p + i * TILE + j) + load(bias + key + j);
                    Floats probability = probability_of(score - log_sums[row + i]);
                    store(p + i * TILE + j, probability);
                    store(ds + i * TILE + j, probability * (load(ds + i * TILE + j) - products[row + i]));
                }
            for (int part = 0; part < size; part += WIDE) {
                for (int j = 0; j < num_keys; j += ROWS) {
                    multiply(p + j, 1, TILE, grads + row * size + part, size, num_rows,
                             value_grads + j * size + part, size, 1);
                    multiply(ds + j, 1, TILE, queries + row * size + part, size, num_rows,
                             key_grads + j * size + part, size, 1);
                }
                for (int i = 0; i < num_rows; i += ROWS)
                    multiply(ds + i * TILE, TILE, 1, key_rows + key * size + part, size, num_keys,
                             query_grads + (row + i) * size + part, size, 1);
            }
        }
        int num_real = smaller(num_keys, length - key);
        for (int j = 0; j < num_real; j++) {
            memcpy(job->key_grad + own + (key + j) * step, key_grads + j * size, size * sizeof(float));
            memcpy(job->value_grad + own + (key + j) * step, value_grads + j * size, size * sizeof(float));
        }
    }
    for (int row = 0; row < length; row++)
        for (int i = 0; i < size; i += LANES)
            store(job->query_grad + own + row * step + i, load(query_grads + row * size + i) * job->scale);
}

// --- What attention.py calls, once in each thread

// Compute the heads that no other thread has taken. Return 1 if there is too little memory, else 0.
int attend(Attention *job, int is_backward) {
    size_t size = SIZE, longest = round_up(round_up(job->length, WIDE), ROWS);
    size_t numbers = is_backward ? longest * (6 * size + 3) + (size_t)TILE * (2 * size + 2 * TILE)
                                 : longest * (2 * size + 1 + QUERIES) + 2 * QUERIES * size;
    float *memory = calloc(numbers, sizeof(float));
    if (!memory) return 1;
    for (int task; (task = atomic_fetch_add(&job->next, 1)) < job->texts * job->heads;) {
        int text = task / job->heads, head = task % job->heads;
        if (is_backward)
            backward(job, text, head, memory);
        else
            forward(job, text, head, memory);
    }
    free(memory);
    return 0;
}
