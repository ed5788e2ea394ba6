// One decoding step of a Llama-like transformer, for up to 128 rows (tokens) at once.
//
// The same step in PyTorch is `reference_step` in llama.py: read that first; this file is compared with
// it at each start. It is compiled at first use by fast_decoding.py, for the processor that it runs on.
//
// Weights are read as they are stored: fp32, fp16, bf16, or whole numbers of 4 or 8 bits in groups of
// 32 with a scale (and a minimum). The activations of a group become whole numbers too, with one scale:
// at most 8,355,000, which is about the precision of fp32. Each is written with three digits in base
// 256 from -128 to 127, so that the processor's dot product of bytes multiplies it, exactly. A step
// reads all weights once, whatever the number of rows: with few rows, memory is the limit. With the many
// rows of a prompt or a batch, arithmetic is: each tile of weights is widened to fp32 once for all of them.
//
// One thread per core runs `run_step`. Each part of a layer is split into small pieces of work, which
// the threads take one by one; a barrier ends the part.

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(PORTABLE)
#define LANES 4  // numbers in a vector register
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define LANES 8
#if !defined(__AVXVNNI__)
#define PAIRS  // no dot product of bytes: products of bytes and of 16-bit numbers in pairs
#endif
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#define LANES 4
#define NEON
#else
#define PORTABLE
#define LANES 4
#endif

#include "vectors.h"

enum { FP32, FP16, BF16, GROUPS4, GROUPS8 };  // how a matrix is stored
enum { MAX_ROWS = 128, TILE = 16, GROUP = 32, PARTS = TILE / LANES };
enum { WIDE_ROWS = 8, WIDE_COLUMNS = 192 };  // fewer rows are not worth widening; columns widened at once
enum { QUERIES = 32 };                       // rows of a text whose attention is computed together
enum { LARGEST_HEAD = 512 };                 // of those whose attention is computed together
#if LANES == 16
#define BLOCK 16                          // rows whose sums stay in registers
#elif LANES == 8 || defined(__aarch64__)  // 16 registers of 8 numbers, or 32 of 4
#define BLOCK 6
#else
#define BLOCK 2
#endif
enum { BYTES4 = 2 * 2 * TILE + TILE * GROUP / 2, BYTES8 = 2 * TILE + TILE * GROUP };  // of a tile's group
static const float LARGEST = 8355000.0f;  // 127 * (1 + 256 + 65536) = 8,355,711, less what fp32 rounds
static const int SPINS = 2000;            // some microseconds; then the processor goes to others

// --- What fast_decoding.py describes with ctypes, field by field

// A matrix (rows, columns). fp32, fp16, bf16: row by row. Groups: tiles of 16 rows; for each 32 columns
// of a tile 16 fp16 scales, with 4 bits also 16 fp16 minimums, then the numbers, 4 columns of all 16
// rows together; with 4 bits, columns 8n to 8n + 3 are the low halves and 8n + 4 to 8n + 7 the high
// halves of 64 bytes. 8 bits are stored with 128 added.
typedef struct {
    int32_t kind, rows, columns;
    const void *data;
    const float *bias;  // (rows), or NULL
} Matrix;

typedef struct {
    Matrix query, key, value, output, gate, up, down;
    const float *attention_norm, *mlp_norm, *query_norm, *key_norm;  // the last two: NULL if none
    float *keys, *values;  // (texts, key heads, capacity, head size)
    int32_t window;        // columns that a token sees, 0: all
} Layer;

typedef struct {
    int32_t num_layers, width, heads, key_heads, head_size, inner, vocabulary;
    float epsilon, scaling;
    Matrix embedding, head;
    const float *norm;
    Layer *layers;
} Model;

// The rows of a step: a token each, the text that it belongs to, its column in the cache, and the first
// column of its text. Logits are computed for the rows from `first_logits` on.
typedef struct {
    int32_t rows, capacity, first_logits;
    int32_t wide;    // whether weights are widened: worth it for the rows of a prompt, or of many texts
    int32_t stride;  // the number of texts; row + stride is the next column of the same text
    const int32_t *tokens, *texts, *columns, *starts;  // (rows)
    const float *cosines, *sines;                      // (rows, head size), of each row's position
    float *logits;                                     // (rows - first_logits, vocabulary)
} Step;

// --- Vectors of numbers in other formats

typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef Shorts AnyShorts __attribute__((aligned(1), may_alias));

INLINE Floats to_floats(Ints numbers) { return __builtin_convertvector(numbers, Floats); }

INLINE Floats from_bf16(const uint16_t *from) {  // the upper half of an fp32 number
#if LANES == 16
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)), 16);
#elif LANES == 8
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)from)), 16);
#else
    return (Floats)(__builtin_convertvector(*(const AnyShorts *)from, Ints) << 16);
#endif
}

INLINE Floats from_fp16(const uint16_t *from) {
#if LANES == 16
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)from));
#elif LANES == 8
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const void *)from));
#else  // the exponent's offset is 15 instead of 127; finite numbers only
    Ints bits = __builtin_convertvector(*(const AnyShorts *)from, Ints);
    Floats size = (Floats)((bits & 0x7fff) << 13) * 0x1p112f;
    return (Floats)((Ints)size | (bits & 0x8000) << 16);
#endif
}

INLINE Floats from(int kind, const void *data, int64_t index) {
    if (kind == FP32) return load((const float *)data + index);
    return kind == FP16 ? from_fp16((const uint16_t *)data + index)
                        : from_bf16((const uint16_t *)data + index);
}

INLINE void prefetch(int kind, const void *data, int64_t index) {
    __builtin_prefetch((const char *)data + index * (kind == FP32 ? 4 : 2));
}

static float one_from(int kind, const void *data, int64_t index) {
    if (kind == FP32) return ((const float *)data)[index];
    uint16_t numbers[LANES] = {((const uint16_t *)data)[index]};
    return (kind == FP16 ? from_fp16(numbers) : from_bf16(numbers))[0];
}

static float dot(const float *left, const float *right, int count) {
    Floats sums[4] = {{0}};
    int index = 0;
    for (; index + 4 * LANES <= count; index += 4 * LANES)
        for (int part = 0; part < 4; part++)
            sums[part] += load(left + index + part * LANES) * load(right + index + part * LANES);
    for (; index + LANES <= count; index += LANES) sums[0] += load(left + index) * load(right + index);
    float sum = sum_of(sums[0] + sums[1] + (sums[2] + sums[3]));
    for (; index < count; index++) sum += left[index] * right[index];
    return sum;
}

// --- Activations as whole numbers

typedef struct {  // a group of 32 activations of a row
    int8_t digits[3][GROUP];
#if defined(PAIRS)
    // the numbers as hi * 65536 + lo: lo of columns 4n and 4n + 2, then of 4n + 1 and 4n + 3; hi likewise
    int16_t pairs[4][GROUP / 2];
    int32_t lo_sum, hi_sum;
#else
    int32_t digit_sums[3];
#endif
    float scale, sum;  // of the activations, as rounded
} __attribute__((aligned(64))) Group;

// Write 32 activations as whole numbers with three digits each, times a scale. NaN and infinity become
// a scale of NaN, so that every product with them is NaN.
static void to_digits(const float *x, Group *group) {
    int32_t bits[GROUP], numbers[GROUP], largest = 0, sum = 0;
    memcpy(bits, x, sizeof bits);
    // in short loops, which the compiler turns into vectors
    for (int i = 0; i < GROUP; i++) {
        int32_t size = bits[i] & 0x7fffffff;  // sizes of floats are in the order of their bits
        largest = size > largest ? size : largest;
    }
    if (largest >= 0x7f800000) {
        group->scale = group->sum = NAN;
        return;
    }
    float size;
    memcpy(&size, &largest, sizeof size);
    float factor = size > 1e-30f ? LARGEST / size : 0.0f;  // what is smaller counts as 0
    group->scale = size / LARGEST;
    for (int i = 0; i < GROUP; i++) {
        float scaled = x[i] * factor;
        numbers[i] = (int32_t)(scaled + copysignf(0.5f, scaled));
    }
    for (int i = 0; i < GROUP; i++) sum += numbers[i];
    group->sum = group->scale * (float)sum;
#if defined(PAIRS)
    int32_t hi_sum = 0;
    for (int i = 0; i < GROUP / 2; i++) {
        int32_t even = numbers[2 * i], odd = numbers[2 * i + 1];
        int32_t even_hi = (even - (int16_t)even) >> 16, odd_hi = (odd - (int16_t)odd) >> 16;
        group->pairs[0][i] = (int16_t)even;
        group->pairs[1][i] = (int16_t)odd;
        group->pairs[2][i] = (int16_t)even_hi;
        group->pairs[3][i] = (int16_t)odd_hi;
        hi_sum += even_hi + odd_hi;
    }
    group->hi_sum = hi_sum;
    group->lo_sum = sum - (hi_sum << 16);
#endif
    // with 128 added to each, the digits are the bytes of the number
    for (int i = 0; i < GROUP; i++) numbers[i] = (numbers[i] + 0x808080) ^ 0x808080;
    for (int d = 0; d < 3; d++)
        for (int i = 0; i < GROUP; i++) group->digits[d][i] = (int8_t)(numbers[i] >> 8 * d);
#if !defined(PAIRS)
    for (int d = 0; d < 3; d++) {
        group->digit_sums[d] = 0;
        for (int i = 0; i < GROUP; i++) group->digit_sums[d] += group->digits[d][i];
    }
#endif
}

// --- Dot products of 32 columns: LANES rows of a tile with one group of activations

// sums[d] += 4 numbers (0 to 255) of each of LANES rows * 4 digits
#if LANES == 16
typedef __m512i Bytes;
INLINE Bytes load_bytes(const uint8_t *from) { return _mm512_loadu_si512(from); }
INLINE Bytes low_halves(Bytes bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
INLINE Bytes high_halves(Bytes bytes) { return low_halves(_mm512_srli_epi16(bytes, 4)); }
INLINE Ints add_products(Ints sum, Bytes bytes, int32_t digits) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, bytes, _mm512_set1_epi32(digits));
}
#elif LANES == 8
typedef __m256i Bytes;
INLINE Bytes load_bytes(const uint8_t *from) { return _mm256_loadu_si256((const void *)from); }
INLINE Bytes low_halves(Bytes bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
INLINE Bytes high_halves(Bytes bytes) { return low_halves(_mm256_srli_epi16(bytes, 4)); }
#if !defined(PAIRS)
INLINE Ints add_products(Ints sum, Bytes bytes, int32_t digits) {
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, bytes, _mm256_set1_epi32(digits));
}
#endif
#elif defined(NEON)
typedef uint8x16_t Bytes;
INLINE Bytes load_bytes(const uint8_t *from) { return vld1q_u8(from); }
INLINE Bytes low_halves(Bytes bytes) { return vandq_u8(bytes, vdupq_n_u8(15)); }
INLINE Bytes high_halves(Bytes bytes) { return vshrq_n_u8(bytes, 4); }
INLINE Ints add_products(Ints sum, Bytes bytes, int32_t digits) {
    return (Ints)vdotq_s32((int32x4_t)sum, vreinterpretq_s8_u8(bytes),
                           vreinterpretq_s8_s32(vdupq_n_s32(digits)));
}
#else
typedef struct {
    uint8_t byte[4 * LANES];
} Bytes;
INLINE Bytes load_bytes(const uint8_t *from) {
    Bytes bytes;
    memcpy(&bytes, from, sizeof bytes);
    return bytes;
}
INLINE Bytes low_halves(Bytes bytes) {
    for (int i = 0; i < 4 * LANES; i++) bytes.byte[i] &= 15;
    return bytes;
}
INLINE Bytes high_halves(Bytes bytes) {
    for (int i = 0; i < 4 * LANES; i++) bytes.byte[i] >>= 4;
    return bytes;
}
INLINE Ints add_products(Ints sum, Bytes bytes, int32_t digits) {
    int8_t digit[4];
    memcpy(digit, &digits, sizeof digit);
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < 4; i++) sum[lane] += bytes.byte[4 * lane + i] * digit[i];
    return sum;
}
#endif

#if defined(PAIRS)
// Sums of two products of a 4-bit number and a digit in 16 bits: 8 of them are at most 30,720.
INLINE Ints add_products4(Ints sum, Bytes bytes, int32_t digits) {
    return (Ints)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16(bytes, _mm256_set1_epi32(digits)));
}
INLINE Ints finish4(Ints sum) { return (Ints)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
#else
#define add_products4 add_products
INLINE Ints finish4(Ints sum) { return sum; }
#endif

#if defined(NEON)  // it multiplies signed numbers only: those of 8 bits lose the 128 that were added
enum { ADDED = 0 };
INLINE Bytes shifted(Bytes bytes) { return veorq_u8(bytes, vdupq_n_u8(128)); }
#elif !defined(PAIRS)
enum { ADDED = 128 };
INLINE Bytes shifted(Bytes bytes) { return bytes; }
#endif

INLINE int32_t four(const void *from, int number) {  // the number-th 4 bytes
    int32_t bytes;
    memcpy(&bytes, (const char *)from + 4 * number, sizeof bytes);
    return bytes;
}

// first + 256 * second + 65536 * third; the two lower ones are joined exactly, the third by one rounding
INLINE Floats join(Ints first, Ints second, Ints third) {
    return to_floats(third) * 65536.0f + to_floats(first + (second << 8));
}

// Products of the 16 rows of a tile's group with a group of activations; `numbers` follow the scales.
INLINE void dot4(const uint8_t *numbers, const Group *group, Floats result[PARTS]) {
    Ints sums[3][PARTS] = {{{0}}};
    // not unrolled: with all loads at once, the compiler would keep the sums in memory
#pragma GCC unroll 1
    for (int pair = 0; pair < 4; pair++) {  // of 4 columns each
        Bytes low[PARTS], high[PARTS];
        for (int part = 0; part < PARTS; part++) {
            Bytes bytes = load_bytes(numbers + 64 * pair + 4 * LANES * part);
            low[part] = low_halves(bytes);
            high[part] = high_halves(bytes);
        }
        for (int d = 0; d < 3; d++) {
            int32_t first = four(group->digits[d], 2 * pair), second = four(group->digits[d], 2 * pair + 1);
            for (int part = 0; part < PARTS; part++) {
                sums[d][part] = add_products4(sums[d][part], low[part], first);
                sums[d][part] = add_products4(sums[d][part], high[part], second);
            }
        }
    }
    for (int part = 0; part < PARTS; part++)
        result[part] = join(finish4(sums[0][part]), finish4(sums[1][part]), finish4(sums[2][part]));
}

INLINE void dot8(const uint8_t *numbers, const Group *group, Floats result[PARTS]) {
#if defined(PAIRS)  // products of 16-bit numbers in pairs: at most 32 * 255 * 32,768, less than 2^31
    Ints lo[PARTS], hi[PARTS];
    for (int part = 0; part < PARTS; part++) {
        lo[part] = (Ints){0} - 128 * group->lo_sum;
        hi[part] = (Ints){0} - 128 * group->hi_sum;
    }
#pragma GCC unroll 1
    for (int n = 0; n < 8; n++) {  // 4 columns each
        int32_t lo_even = four(group->pairs[0], n), lo_odd = four(group->pairs[1], n);
        int32_t hi_even = four(group->pairs[2], n), hi_odd = four(group->pairs[3], n);
        for (int part = 0; part < PARTS; part++) {
            Bytes bytes = load_bytes(numbers + 64 * n + 4 * LANES * part);
            Bytes even = _mm256_and_si256(bytes, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(bytes, 8);
            lo[part] += (Ints)_mm256_madd_epi16(even, _mm256_set1_epi32(lo_even));
            hi[part] += (Ints)_mm256_madd_epi16(even, _mm256_set1_epi32(hi_even));
            lo[part] += (Ints)_mm256_madd_epi16(odd, _mm256_set1_epi32(lo_odd));
            hi[part] += (Ints)_mm256_madd_epi16(odd, _mm256_set1_epi32(hi_odd));
        }
    }
    for (int part = 0; part < PARTS; part++)
        result[part] = to_floats(hi[part]) * 65536.0f + to_floats(lo[part]);
#else
    Ints sums[3][PARTS];
    for (int d = 0; d < 3; d++)
        for (int part = 0; part < PARTS; part++) sums[d][part] = (Ints){0} - ADDED * group->digit_sums[d];
#pragma GCC unroll 1
    for (int n = 0; n < 8; n++)  // 4 columns each
        for (int part = 0; part < PARTS; part++) {
            Bytes bytes = shifted(load_bytes(numbers + 64 * n + 4 * LANES * part));
            for (int d = 0; d < 3; d++)
                sums[d][part] = add_products(sums[d][part], bytes, four(group->digits[d], n));
        }
    for (int part = 0; part < PARTS; part++) result[part] = join(sums[0][part], sums[1][part], sums[2][part]);
#endif
}

// --- Products of a matrix with the rows of a step

typedef struct {
    int count, width;     // rows; numbers in a row
    const float *x;       // (count, width)
    const Group *groups;  // (count, width / 32), the same as whole numbers
    int wide;
} Rows;

// Products of the 16 rows of a tile with each of `count` rows.
INLINE void multiply_groups(int bits, const uint8_t *tile, const Rows *rows, int count,
                            float (*result)[TILE]) {
    Floats sums[MAX_ROWS][PARTS];
    for (int row = 0; row < count; row++)
        for (int part = 0; part < PARTS; part++) sums[row][part] = (Floats){0};
    int num_groups = rows->width / GROUP;
    int bytes = bits == 4 ? BYTES4 : BYTES8;
    for (int g = 0; g < num_groups; g++, tile += bytes) {
        // the processor fetches ahead by itself, but not far enough
        for (int line = 0; line < bytes; line += 64) __builtin_prefetch(tile + 4096 + line);
        for (int row = 0; row < count; row++) {
            const Group *group = rows->groups + (int64_t)row * num_groups + g;
            Floats dots[PARTS];
            if (bits == 4)
                dot4(tile + 4 * TILE, group, dots);
            else
                dot8(tile + 2 * TILE, group, dots);
            for (int part = 0; part < PARTS; part++) {
                const uint16_t *scales = (const uint16_t *)tile + part * LANES;
                sums[row][part] += from_fp16(scales) * (dots[part] * group->scale);
                if (bits == 4) sums[row][part] += from_fp16(scales + TILE) * group->sum;
            }
        }
    }
    for (int row = 0; row < count; row++)
        for (int part = 0; part < PARTS; part++) store(result[row] + part * LANES, sums[row][part]);
}

// Products of 4 rows of a matrix with `count` rows of activations, 1 or 2.
INLINE void multiply_four(int kind, const Matrix *matrix, const int64_t *begins, const float *x, int count,
                          float (*result)[TILE]) {
    Floats sums[2][4] = {{{0}}};
    int column = 0, width = matrix->columns;
    if (count == 1) {  // two vectors at a time: one sum would wait for the one before
        for (; column + 2 * LANES <= width; column += 2 * LANES)
            for (int i = 0; i < 4; i++) {
                prefetch(kind, matrix->data, begins[i] + 4 * width + column);
                for (int half = 0; half < 2; half++)
                    sums[half][i] += from(kind, matrix->data, begins[i] + column + half * LANES) *
                                     load(x + column + half * LANES);
            }
        for (int i = 0; i < 4; i++) sums[0][i] += sums[1][i];
    }
    for (; column + LANES <= width; column += LANES) {
        Floats numbers[2];
        for (int row = 0; row < count; row++) numbers[row] = load(x + (int64_t)row * width + column);
        for (int i = 0; i < 4; i++) {
            Floats weights = from(kind, matrix->data, begins[i] + column);
            for (int row = 0; row < count; row++) sums[row][i] += weights * numbers[row];
        }
    }
    for (int row = 0; row < count; row++)
        for (int i = 0; i < 4; i++) {
            float sum = sum_of(sums[row][i]);
            for (int rest = column; rest < width; rest++)
                sum += one_from(kind, matrix->data, begins[i] + rest) * x[(int64_t)row * width + rest];
            result[row][i] = sum;
        }
}

INLINE void multiply_floats(int kind, const Matrix *matrix, int tile, const Rows *rows,
                            float (*result)[TILE]) {
    for (int first = 0; first < TILE; first += 4) {
        int64_t begins[4];
        for (int i = 0; i < 4; i++) {
            int row = tile * TILE + first + i;  // beyond the end of the matrix: its last row, not used
            begins[i] = (int64_t)(row < matrix->rows ? row : matrix->rows - 1) * matrix->columns;
        }
        int row = 0;
        for (; row + 2 <= rows->count; row += 2)
            multiply_four(kind, matrix, begins, rows->x + (int64_t)row * rows->width, 2,
                          (float (*)[TILE])(result[row] + first));
        if (row < rows->count)
            multiply_four(kind, matrix, begins, rows->x + (int64_t)row * rows->width, 1,
                          (float (*)[TILE])(result[row] + first));
    }
}

// result[row][i] += the sum over columns of x[row][column] * weights[column][i], for `rows` rows and 16 i
INLINE void add_block(const float *weights, int64_t stride, int columns, const float *x, int64_t x_stride,
                      int rows, float *result, int64_t result_stride) {
    Floats sums[BLOCK][PARTS];
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < PARTS; part++)
            sums[row][part] = load(result + row * result_stride + part * LANES);
    for (int column = 0; column < columns; column++) {
        Floats numbers[PARTS];
        for (int part = 0; part < PARTS; part++)
            numbers[part] = load(weights + column * stride + part * LANES);
        for (int row = 0; row < rows; row++)
            for (int part = 0; part < PARTS; part++)
                sums[row][part] += numbers[part] * x[row * x_stride + column];
    }
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < PARTS; part++)
            store(result + row * result_stride + part * LANES, sums[row][part]);
}

// The same for any number of rows, in blocks of about the same size: the additions to a sum wait for each
// other, so that a block of few sums takes as long as one of many.
static void add_products_of(const float *weights, int64_t stride, int columns, const float *x,
                            int64_t x_stride, int rows, float *result, int64_t result_stride) {
    for (int blocks = (rows + BLOCK - 1) / BLOCK, size; blocks; blocks--, rows -= size) {
        size = (rows + blocks - 1) / blocks;
        switch (size) {  // a known number of rows, so that all sums stay in registers
#define CASE(n)                                                                                              \
    case n:                                                                                                  \
        add_block(weights, stride, columns, x, x_stride, n, result, result_stride);                          \
        break
            CASE(1);
            CASE(2);
#if BLOCK > 2
            CASE(3);
            CASE(4);
            CASE(5);
            CASE(6);
#endif
#if BLOCK > 6
            CASE(7);
            CASE(8);
            CASE(9);
            CASE(10);
            CASE(11);
            CASE(12);
            CASE(13);
            CASE(14);
            CASE(15);
            CASE(16);
#endif
#undef CASE
        }
        x += size * x_stride;
        result += size * result_stride;
    }
}

// 32 columns of a tile of groups in fp32, (32, 16): all rows of a column together.
INLINE void widen_group_of_tile(int bits4, const uint8_t *group, float *result) {
    for (int part = 0; part < PARTS; part++) {
        const uint16_t *scales = (const uint16_t *)group + part * LANES;
        Floats scale = from_fp16(scales), minimum = bits4 ? from_fp16(scales + TILE) : -128.0f * scale;
        const uint8_t *numbers = group + (bits4 ? 4 : 2) * TILE + 4 * LANES * part;
#pragma GCC unroll 8
        for (int n = 0; n < 8; n++) {  // 4 columns each
            Ints four_columns;
            memcpy(&four_columns, numbers + 64 * (bits4 ? n / 2 : n), sizeof four_columns);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                int shift = bits4 ? 8 * i + n % 2 * 4 : 8 * i;
                Floats number = to_floats(four_columns >> shift & (bits4 ? 15 : 255));
                store(result + (4 * n + i) * TILE + part * LANES, scale * number + minimum);
            }
        }
    }
}

// Columns of a tile in fp32, (columns, 16): all rows of a column together. `first` is a multiple of 32.
static void widen_columns(const Matrix *matrix, int tile, int first, int columns, float *result) {
    if (matrix->kind < GROUPS4) {
        for (int i = 0; i < TILE; i++) {
            int row = tile * TILE + i;  // beyond the end of the matrix: its last row, not used
            int64_t begin = (int64_t)(row < matrix->rows ? row : matrix->rows - 1) * matrix->columns + first;
            int column = 0;
            for (; column + LANES <= columns; column += LANES) {
                Floats numbers = from(matrix->kind, matrix->data, begin + column);
                for (int lane = 0; lane < LANES; lane++) result[(column + lane) * TILE + i] = numbers[lane];
            }
            for (; column < columns; column++)
                result[column * TILE + i] = one_from(matrix->kind, matrix->data, begin + column);
        }
        return;
    }
    int bits4 = matrix->kind == GROUPS4, bytes = bits4 ? BYTES4 : BYTES8;
    const uint8_t *data =
        (const uint8_t *)matrix->data + ((int64_t)tile * matrix->columns + first) / GROUP * bytes;
    for (int column = 0; column < columns; column += GROUP, data += bytes)
        if (bits4)  // a known kind, so that the numbers of bits are constants
            widen_group_of_tile(1, data, result + column * TILE);
        else
            widen_group_of_tile(0, data, result + column * TILE);
}

// Fetch columns of a tile that are read next, of a matrix of groups: fp32 is read in larger pieces.
static void fetch_ahead(const Matrix *matrix, int tile, int first, int columns) {
    if (matrix->kind < GROUPS4) return;
    int bytes = matrix->kind == GROUPS4 ? BYTES4 : BYTES8;
    const char *from = (const char *)matrix->data + ((int64_t)tile * matrix->columns + first) / GROUP * bytes;
    for (int line = 0; line < columns / GROUP * bytes; line += 64) __builtin_prefetch(from + line);
}

static void multiply_widened(const Matrix *matrix, int tile, const Rows *rows, float (*result)[TILE]) {
    float widened[WIDE_COLUMNS * TILE] __attribute__((aligned(64)));
    memset(result, 0, rows->count * sizeof *result);
    for (int first = 0; first < matrix->columns; first += WIDE_COLUMNS) {
        int columns = matrix->columns - first < WIDE_COLUMNS ? matrix->columns - first : WIDE_COLUMNS;
        widen_columns(matrix, tile, first, columns, widened);
        fetch_ahead(matrix, tile, first + columns, columns);  // while these are multiplied
        add_products_of(widened, TILE, columns, rows->x + first, rows->width, rows->count, result[0], TILE);
    }
}

static int num_tiles(const Matrix *matrix) { return (matrix->rows + TILE - 1) / TILE; }

// result[row][i] = the product of row 16 * tile + i of a matrix with a row of activations, plus the bias
static void multiply(const Matrix *matrix, int tile, const Rows *rows, float (*result)[TILE]) {
    int64_t num_groups = matrix->columns / GROUP;
    const uint8_t *tile4 = (const uint8_t *)matrix->data + tile * num_groups * BYTES4;
    const uint8_t *tile8 = (const uint8_t *)matrix->data + tile * num_groups * BYTES8;
    if (rows->wide && rows->count >= WIDE_ROWS) multiply_widened(matrix, tile, rows, result);
    // with a known number of rows, all sums stay in registers
    else if (matrix->kind == GROUPS4 && rows->count == 1)
        multiply_groups(4, tile4, rows, 1, result);
    else if (matrix->kind == GROUPS4)
        multiply_groups(4, tile4, rows, rows->count, result);
    else if (matrix->kind == GROUPS8 && rows->count == 1)
        multiply_groups(8, tile8, rows, 1, result);
    else if (matrix->kind == GROUPS8)
        multiply_groups(8, tile8, rows, rows->count, result);
    else if (matrix->kind == FP32)
        multiply_floats(FP32, matrix, tile, rows, result);
    else if (matrix->kind == FP16)
        multiply_floats(FP16, matrix, tile, rows, result);
    else
        multiply_floats(BF16, matrix, tile, rows, result);
    if (matrix->bias)
        for (int row = 0; row < rows->count; row++)
            for (int i = 0; i < TILE && tile * TILE + i < matrix->rows; i++)
                result[row][i] += matrix->bias[tile * TILE + i];
}

// Write the products of a tile with each row to `result` (rows, rows of the matrix), or add them to it.
INLINE void put(const Matrix *matrix, int tile, int rows, float (*products)[TILE], int adds, float *result) {
    int first = tile * TILE, count = matrix->rows - first < TILE ? matrix->rows - first : TILE;
    for (int row = 0; row < rows; row++) {
        float *to = result + (int64_t)row * matrix->rows + first;
        for (int i = 0; i < count; i++) to[i] = adds ? to[i] + products[row][i] : products[row][i];
    }
}

// The 32 numbers of one row of a tile's group in fp32.
INLINE void widen_group(int bits4, const uint8_t *group, int row, float scale, float minimum, float *result) {
    uint8_t numbers[GROUP];
    for (int n = 0; n < 8; n++) {
        uint32_t bytes = four(group + 2 * TILE * (bits4 ? 2 : 1), (bits4 ? n / 2 : n) * TILE + row);
        if (bits4) bytes = bytes >> n % 2 * 4 & 0x0f0f0f0f;
        memcpy(numbers + 4 * n, &bytes, sizeof bytes);
    }
    for (int i = 0; i < GROUP; i++) result[i] = scale * (float)(numbers[i] - (bits4 ? 0 : 128)) + minimum;
}

// The 16 rows of a tile in fp32, (16, columns), as far as the matrix has them.
static void widen_tile(const Matrix *matrix, int tile, float *result) {
    int columns = matrix->columns,
        count = matrix->rows - tile * TILE < TILE ? matrix->rows - tile * TILE : TILE;
    if (matrix->kind < GROUPS4) {
        int64_t begin = (int64_t)tile * TILE * columns, size = (int64_t)count * columns, index = 0;
        for (; index + LANES <= size; index += LANES)
            store(result + index, from(matrix->kind, matrix->data, begin + index));
        for (; index < size; index++) result[index] = one_from(matrix->kind, matrix->data, begin + index);
        return;
    }
    int bits4 = matrix->kind == GROUPS4, bytes = bits4 ? BYTES4 : BYTES8;
    const uint8_t *data = (const uint8_t *)matrix->data + (int64_t)tile * (columns / GROUP) * bytes;
    for (int first = 0; first < columns; first += GROUP, data += bytes) {
        float scales[2 * TILE];
        for (int i = 0; i < (bits4 ? 2 : 1) * TILE; i += LANES)
            store(scales + i, from_fp16((const uint16_t *)data + i));
        for (int row = 0; row < count; row++)
            widen_group(bits4, data, row, scales[row], bits4 ? scales[TILE + row] : 0,
                        result + (int64_t)row * columns + first);
    }
}

// One row of a matrix in fp32: a token's embedding.
static void widen_row(const Matrix *matrix, int row, float *result) {
    int columns = matrix->columns;
    if (matrix->kind < GROUPS4) {
        for (int i = 0; i < columns; i++)
            result[i] = one_from(matrix->kind, matrix->data, (int64_t)row * columns + i);
        return;
    }
    int bits4 = matrix->kind == GROUPS4, bytes = bits4 ? BYTES4 : BYTES8, lane = row % TILE;
    const uint8_t *data = (const uint8_t *)matrix->data + (int64_t)(row / TILE) * (columns / GROUP) * bytes;
    for (int first = 0; first < columns; first += GROUP, data += bytes) {
        float scale = one_from(FP16, data, lane), minimum = bits4 ? one_from(FP16, data, TILE + lane) : 0;
        widen_group(bits4, data, lane, scale, minimum, result + first);
    }
}

// --- Threads

struct Pool;
typedef void Work(struct Pool *pool, int thread);

typedef struct {
    _Alignas(64) atomic_int taken;  // on a cache line of its own, because all threads may write it
} Part;

typedef struct Pool {
    int num_threads, stopping;
    pthread_t *threads;
    Part *parts;  // (num_threads): how much of each thread's part of the work is taken
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    Work *work;
    const void *input;
    const Model *model;
    float *scratch;
    size_t scratch_floats;
    // each on its own cache line, because all threads write them
    _Alignas(64) atomic_int job;      // the number of the current piece of work
    _Alignas(64) atomic_int arrived;  // threads that wait at the barrier
    _Alignas(64) atomic_int barrier;  // barriers passed so far
} Pool;

static void pause_or_yield(int *spins) {
    if (++*spins > SPINS) {
        sched_yield();  // another process may have this core: a pure spin made a step 60 times slower
        return;
    }
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static void wait_for_all(Pool *pool) {
    int passed = atomic_load(&pool->barrier), spins = 0;
    if (atomic_fetch_add(&pool->arrived, 1) == pool->num_threads - 1) {
        atomic_store(&pool->arrived, 0);
        for (int i = 0; i < pool->num_threads; i++) atomic_store(&pool->parts[i].taken, 0);
        atomic_fetch_add(&pool->barrier, 1);
    } else {
        while (atomic_load(&pool->barrier) == passed) pause_or_yield(&spins);
    }
}

typedef struct {
    int count, turn;  // of all numbers; parts that this thread has seen the end of
    int first, end;   // what it took last
} Share;

// Take up to `chunk` of the numbers from 0 to share->count - 1; return whether there were any left. Each
// thread has a part of them, and takes from the others' when its own is done. So it reads weights in the
// order in which they are stored, which the processor fetches ahead, and still waits for none that is slower.
static int take(Pool *pool, int thread, int chunk, Share *share) {
    for (int threads = pool->num_threads; share->turn < threads; share->turn++) {
        int owner = (thread + share->turn) % threads;
        int begin = (int)((int64_t)owner * share->count / threads);
        int end = (int)((int64_t)(owner + 1) * share->count / threads);
        atomic_int *taken = &pool->parts[owner].taken;
        if (begin + atomic_load(taken) >= end) continue;
        share->first = begin + atomic_fetch_add(taken, chunk);
        share->end = share->first + chunk < end ? share->first + chunk : end;
        if (share->first < end) return 1;
    }
    return 0;
}

// for (i = 0; i < count; i++), shared by all threads, `chunk` numbers at a time
#define SHARE(i, count, chunk)                                                                               \
    for (Share i##_share = {count, 0, 0, 0}; take(pool, thread, chunk, &i##_share);)                         \
        for (int i = i##_share.first; i < i##_share.end; i++)

static int chunk_of(const Pool *pool, int count) {
    int chunk = count / (pool->num_threads * 8);
    return chunk < 1 ? 1 : chunk > 16 ? 16 : chunk;
}

typedef struct {
    Pool *pool;
    int thread;
} Worker;

static void *serve(void *argument) {
    Worker worker = *(Worker *)argument;
    free(argument);
    Pool *pool = worker.pool;
    for (int done = 0;; done++) {
        for (int spins = 0; atomic_load(&pool->job) == done && spins < SPINS;) pause_or_yield(&spins);
        pthread_mutex_lock(&pool->mutex);
        while (atomic_load(&pool->job) == done) pthread_cond_wait(&pool->wake, &pool->mutex);
        pthread_mutex_unlock(&pool->mutex);
        if (pool->stopping) return NULL;
        pool->work(pool, worker.thread);
    }
}

static void run(Pool *pool, Work *work, const void *input) {
    pool->work = work;
    pool->input = input;
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->job, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    if (!pool->stopping) work(pool, 0);
}

// --- The step

// RMSNorm, times the norm's weights.
static void normalize(const float *x, const float *weights, float epsilon, int width, float *result) {
    float factor = 1.0f / sqrtf(dot(x, x, width) / (float)width + epsilon);
    for (int i = 0; i < width; i++) result[i] = weights[i] * (x[i] * factor);
}

// Rotate a head by the angles of its position: pairs of numbers are half a head apart.
static void rotate(float *head, const float *cosines, const float *sines, int size) {
    for (int i = 0, half = size / 2; i < half; i++) {
        float first = head[i], second = head[i + half];
        head[i] = first * cosines[i] - second * sines[i];
        head[i + half] = second * cosines[i + half] + first * sines[i + half];
    }
}

// The sum of `vectors` * LANES numbers of each column times its weight, divided by a total. The sums need
// not wait for each other.
INLINE void add_values(int vectors, const float *weights, const float *values, int count, int size,
                       float total, float *result) {
    Floats sums[8];
    for (int i = 0; i < vectors; i++) sums[i] = (Floats){0};
    for (int column = 0; column < count; column++)
        for (int i = 0; i < vectors; i++)
            sums[i] += weights[column] * load(values + (int64_t)column * size + i * LANES);
    for (int i = 0; i < vectors; i++) store(result + i * LANES, sums[i] / total);
}

static float largest_of(const float *numbers, int count) {
    float highest = -INFINITY;
    Floats highests = splat(-INFINITY);
    int i = 0;
    for (; i + LANES <= count; i += LANES)
        highests = choose(load(numbers + i) > highests, load(numbers + i), highests);
    for (; i < count; i++) highest = numbers[i] > highest ? numbers[i] : highest;
    for (int lane = 0; lane < LANES; lane++) highest = highests[lane] > highest ? highests[lane] : highest;
    return highest;
}

// Turn scores of the columns first to last into weights that sum up to the result; others of `count`
// become 0.
static float soften(float *scores, int first, int last, int count, float scaling) {
    float highest = largest_of(scores + first, last + 1 - first), total = 0;
    int column = first;
    Floats totals = {0};
    for (; column + LANES <= last + 1; column += LANES) {
        Floats weights = exponential((load(scores + column) - highest) * scaling);
        store(scores + column, weights);
        totals += weights;
    }
    for (; column <= last; column++) {
        scores[column] = exponential(splat((scores[column] - highest) * scaling))[0];
        total += scores[column];
    }
    memset(scores, 0, first * sizeof *scores);
    memset(scores + last + 1, 0, (count - last - 1) * sizeof *scores);
    return total + sum_of(totals);
}

// Products of a query with LANES keys, which need not wait for each other.
INLINE Floats products_with_keys(const float *query, const float *keys, int size) {
    Floats sums[LANES], result;
    for (int key = 0; key < LANES; key++) sums[key] = (Floats){0};
    int i = 0;
    for (; i + LANES <= size; i += LANES)
        for (int key = 0; key < LANES; key++)
            sums[key] += load(query + i) * load(keys + (int64_t)key * size + i);
    for (int key = 0; key < LANES; key++) result[key] = sum_of(sums[key]);
    for (; i < size; i++)
        for (int key = 0; key < LANES; key++) result[key] += query[i] * keys[(int64_t)key * size + i];
    return result;
}

// Attention of some heads of a row, which share a head of keys, over the columns of its text.
static void attend(const float *queries, int heads, const float *keys, const float *values, int count,
                   int size, float scaling, float *scores, float *results) {
    int column = 0, padded = (count + LANES - 1) / LANES * LANES;
    for (; column + LANES <= count; column += LANES) {
        const float *own = keys + (int64_t)column * size;
        for (int i = 0; i < LANES * size; i += 64 / sizeof *own) __builtin_prefetch(own + LANES * size + i);
        for (int head = 0; head < heads; head++)
            store(scores + head * padded + column, products_with_keys(queries + head * size, own, size));
    }
    for (; column < count; column++)
        for (int head = 0; head < heads; head++)
            scores[head * padded + column] = dot(queries + head * size, keys + (int64_t)column * size, size);
    for (int head = 0; head < heads; head++, scores += padded, results += size) {
        float total = soften(scores, 0, count - 1, count, scaling);
        int first = 0;
        for (; first + 8 * LANES <= size; first += 8 * LANES)
            add_values(8, scores, values + first, count, size, total, results + first);
        for (; first + 4 * LANES <= size; first += 4 * LANES)
            add_values(4, scores, values + first, count, size, total, results + first);
        for (; first + LANES <= size; first += LANES)
            add_values(1, scores, values + first, count, size, total, results + first);
        for (; first < size; first++) {
            float sum = 0;
            for (column = 0; column < count; column++)
                sum += scores[column] * values[(int64_t)column * size + first];
            results[first] = sum / total;
        }
    }
}

// Attention of up to QUERIES rows of a text, `row`, row + stride, ..., for all heads that share a head
// of keys.
static void attend_together(const Model *model, const Layer *layer, const Step *step, int row, int key_head,
                            const float *queries, float *scores, float *results) {
    int size = model->head_size, groups = model->heads / model->key_heads, width = model->heads * size,
        firsts[QUERIES];
    int count = (step->rows - row + step->stride - 1) / step->stride, begin = step->columns[row];
    count = count > QUERIES ? QUERIES : count;
    for (int i = 0; i < count; i++) {  // what each row sees
        int column = step->columns[row] + i, first = step->starts[row + i * step->stride];
        if (layer->window && column - layer->window + 1 > first) first = column - layer->window + 1;
        firsts[i] = first;
        begin = first < begin ? first : begin;
    }
    int columns = step->columns[row] + count - begin, padded = (columns + TILE - 1) / TILE * TILE;
    int64_t own = ((int64_t)step->texts[row] * model->key_heads + key_head) * step->capacity + begin,
            next = (int64_t)width * step->stride;
    const float *keys = layer->keys + own * size, *values = layer->values + own * size;
    float by_column[TILE * LARGEST_HEAD];  // 16 keys, as the weights of a matrix
    memset(scores, 0, (size_t)groups * count * padded * sizeof *scores);
    for (int first = 0; first < columns; first += TILE) {
        for (int i = 0; i < TILE; i++) {
            const float *key = keys + (int64_t)(first + i < columns ? first + i : columns - 1) * size;
            for (int j = 0; j < size; j++) by_column[j * TILE + i] = key[j];
        }
        for (int group = 0; group < groups; group++)
            add_products_of(by_column, TILE, size,
                            queries + (int64_t)row * width + (key_head * groups + group) * size, next, count,
                            scores + (int64_t)group * count * padded + first, padded);
    }
    for (int group = 0; group < groups; group++) {
        float *own_scores = scores + (int64_t)group * count * padded, totals[QUERIES];
        float *result = results + (int64_t)row * width + (key_head * groups + group) * size;
        for (int i = 0; i < count; i++) {
            int last = step->columns[row] + i - begin;
            totals[i] =
                soften(own_scores + (int64_t)i * padded, firsts[i] - begin, last, padded, model->scaling);
            memset(result + i * next, 0, size * sizeof *result);
        }
        for (int first = 0; first < size; first += TILE)
            add_products_of(values + first, size, columns, own_scores, padded, count, result + first, next);
        for (int i = 0; i < count; i++)
            for (int j = 0; j < size; j++) result[i * next + j] /= totals[i];
    }
}

typedef struct {  // where a step keeps its numbers; all (rows, ...)
    float *x, *normed, *query, *key, *value, *attended, *inner, *scores;
    Group *groups;
} Scratch;

static size_t round_up(size_t count) { return (count + 63) / 64 * 64; }

// Whether the attention of a prompt's rows is computed together: heads are whole tiles.
static int attends_together(const Model *model, const Step *step) {
    return step->wide && step->rows > step->stride && model->head_size % TILE == 0 &&
           model->head_size <= LARGEST_HEAD;
}

// The scores that a thread keeps.
static size_t num_scores(const Model *model, const Step *step) {
    size_t together = attends_together(model, step) ? QUERIES : 1;
    return together * (model->heads / model->key_heads) * round_up(step->capacity);
}

// Lay the arrays of a step out one after the other from `begin` on; return how many floats they take.
static size_t lay_out(const Pool *pool, const Model *model, const Step *step, float *begin,
                      Scratch *scratch) {
    size_t rows = step->rows, width = model->width, heads = (size_t)model->heads * model->head_size;
    size_t key_heads = (size_t)model->key_heads * model->head_size, inner = model->inner;
    size_t widest = width > inner ? width : inner;
    widest = widest > heads ? widest : heads;
    size_t groups = rows * (widest / GROUP + 1) * sizeof(Group) / sizeof(float);
    float **fields[] = {&scratch->x,     &scratch->normed, &scratch->query,
                        &scratch->key,   &scratch->value,  &scratch->attended,
                        &scratch->inner, &scratch->scores, (float **)&scratch->groups};
    size_t counts[] = {rows * width,
                       rows * width,
                       rows * heads,
                       rows * key_heads,
                       rows * key_heads,
                       rows * heads,
                       rows * inner,
                       pool->num_threads * num_scores(model, step),
                       groups};
    size_t total = 0;
    for (int i = 0; i < 9; i++) {
        *fields[i] = begin + total;
        total += round_up(counts[i]);
    }
    return total;
}

static int is_grouped(const Matrix *matrix) { return matrix->kind >= GROUPS4; }

static void run_step(Pool *pool, int thread) {
    const Step *step = pool->input;
    const Model *model = pool->model;
    int rows = step->rows, width = model->width, size = model->head_size, inner = model->inner;
    int heads_width = model->heads * size, keys_width = model->key_heads * size;
    int widens = step->wide && rows >= WIDE_ROWS;  // then no matrix reads the rows as whole numbers
    Scratch s;
    lay_out(pool, model, step, pool->scratch, &s);
    float *scores = s.scores + thread * num_scores(model, step), tile[MAX_ROWS][TILE], tile2[MAX_ROWS][TILE];

#define TO_DIGITS(x, count_of_row)                                                                           \
    SHARE(group, rows *((count_of_row) / GROUP), 4)                                                          \
    to_digits((x) + (int64_t)group * GROUP, s.groups + group);                                               \
    wait_for_all(pool)
#define NORMALIZE(weights, is_read_in_digits)                                                                \
    SHARE(row, rows, 1) {                                                                                    \
        float *to = s.normed + (int64_t)row * width;                                                         \
        normalize(s.x + (int64_t)row * width, weights, model->epsilon, width, to);                           \
        if (is_read_in_digits)                                                                               \
            for (int g = 0; g < width / GROUP; g++)                                                          \
                to_digits(to + g * GROUP, s.groups + (int64_t)row * (width / GROUP) + g);                    \
    }                                                                                                        \
    wait_for_all(pool)

    SHARE(row, rows, 1) widen_row(&model->embedding, step->tokens[row], s.x + (int64_t)row * width);
    wait_for_all(pool);
    for (int number = 0; number < model->num_layers; number++) {
        const Layer *layer = model->layers + number;
        Rows normed = {rows, width, s.normed, s.groups, step->wide};

        // a file may store each matrix in a format of its own
        int in_digits = is_grouped(&layer->query) || is_grouped(&layer->key) || is_grouped(&layer->value);
        NORMALIZE(layer->attention_norm, in_digits && !widens);
        const Matrix *matrices[3] = {&layer->query, &layer->key, &layer->value};
        float *results[3] = {s.query, s.key, s.value};
        int tiles[3] = {num_tiles(&layer->query), num_tiles(&layer->key), num_tiles(&layer->value)};
        int all_tiles = tiles[0] + tiles[1] + tiles[2];
        SHARE(i, all_tiles, chunk_of(pool, all_tiles)) {
            int which = i < tiles[0] ? 0 : i < tiles[0] + tiles[1] ? 1 : 2;
            int own = i - (which > 0 ? tiles[0] : 0) - (which > 1 ? tiles[1] : 0);
            multiply(matrices[which], own, &normed, tile);
            put(matrices[which], own, rows, tile, 0, results[which]);
        }
        wait_for_all(pool);

        // each head of queries and keys: its norm if there is one, and its position; keys and values go into
        // the cache
        SHARE(i, rows * (model->heads + model->key_heads), 4) {
            int row = i / (model->heads + model->key_heads), head = i % (model->heads + model->key_heads);
            const float *cosines = step->cosines + (int64_t)row * size,
                        *sines = step->sines + (int64_t)row * size;
            int is_key = head >= model->heads, key_head = head - model->heads;
            float *numbers = is_key ? s.key + (int64_t)row * keys_width + key_head * size
                                    : s.query + (int64_t)row * heads_width + head * size;
            const float *weights = is_key ? layer->key_norm : layer->query_norm;
            if (weights) normalize(numbers, weights, model->epsilon, size, numbers);
            rotate(numbers, cosines, sines, size);
            if (is_key) {
                int64_t column = ((int64_t)step->texts[row] * model->key_heads + key_head) * step->capacity +
                                 step->columns[row];
                memcpy(layer->keys + column * size, numbers, size * sizeof(float));
                memcpy(layer->values + column * size, s.value + (int64_t)row * keys_width + key_head * size,
                       size * sizeof(float));
            }
        }
        wait_for_all(pool);

        // the heads that share keys read them once, where there is other work for every thread
        int at_once = rows * model->key_heads < 4 * pool->num_threads ? 1 : model->heads / model->key_heads;
        int together = attends_together(model, step), texts = step->stride < rows ? step->stride : rows;
        int parts =
            (rows + texts * QUERIES - 1) / (texts * QUERIES) * texts;  // of up to QUERIES rows of a text
        if (together) SHARE(i, parts * model->key_heads, 1) {
                int part = i / model->key_heads, row = part / texts * texts * QUERIES + part % texts;
                if (row < rows)
                    attend_together(model, layer, step, row, i % model->key_heads, s.query, scores,
                                    s.attended);
            }
        else
            SHARE(i, rows * model->heads / at_once, 1) {
                int head = i * at_once % model->heads, row = i * at_once / model->heads,
                    column = step->columns[row], first = step->starts[row];
                if (layer->window && column - layer->window + 1 > first) first = column - layer->window + 1;
                int key_head = head / (model->heads / model->key_heads);
                int64_t begin =
                    (((int64_t)step->texts[row] * model->key_heads + key_head) * step->capacity + first) *
                    size;
                int64_t own = (int64_t)row * heads_width + head * size;
                attend(s.query + own, at_once, layer->keys + begin, layer->values + begin, column - first + 1,
                       size, model->scaling, scores, s.attended + own);
            }
        wait_for_all(pool);
        if (is_grouped(&layer->output) && !widens) { TO_DIGITS(s.attended, heads_width); }
        Rows attended = {rows, heads_width, s.attended, s.groups, step->wide};
        SHARE(i, num_tiles(&layer->output), chunk_of(pool, num_tiles(&layer->output))) {
            multiply(&layer->output, i, &attended, tile);
            put(&layer->output, i, rows, tile, 1, s.x);
        }
        wait_for_all(pool);

        in_digits = is_grouped(&layer->gate) || is_grouped(&layer->up);
        NORMALIZE(layer->mlp_norm, in_digits && !widens);
        SHARE(i, num_tiles(&layer->gate), chunk_of(pool, num_tiles(&layer->gate))) {
            multiply(&layer->gate, i, &normed, tile);
            multiply(&layer->up, i, &normed, tile2);
            for (int row = 0; row < rows; row++)
                for (int j = 0; j < TILE; j += LANES) {  // SiLU(gate) * up
                    Floats gate = load(tile[row] + j);
                    store(tile[row] + j, gate / (1.0f + exponential(-gate)) * load(tile2[row] + j));
                }
            put(&layer->gate, i, rows, tile, 0, s.inner);
        }
        wait_for_all(pool);
        if (is_grouped(&layer->down) && !widens) { TO_DIGITS(s.inner, inner); }
        Rows inner_rows = {rows, inner, s.inner, s.groups, step->wide};
        SHARE(i, num_tiles(&layer->down), chunk_of(pool, num_tiles(&layer->down))) {
            multiply(&layer->down, i, &inner_rows, tile);
            put(&layer->down, i, rows, tile, 1, s.x);
        }
        wait_for_all(pool);
    }
    NORMALIZE(model->norm, is_grouped(&model->head));
    int skipped = step->first_logits;
    Rows last = {rows - skipped, width, s.normed + (int64_t)skipped * width,
                 s.groups + (int64_t)skipped * (width / GROUP), step->wide};
    if (last.count > 0) SHARE(i, num_tiles(&model->head), chunk_of(pool, num_tiles(&model->head))) {
            multiply(&model->head, i, &last, tile);
            put(&model->head, i, last.count, tile, 0, step->logits);
        }
    wait_for_all(pool);
}

typedef struct {
    const Matrix *matrix;
    int32_t first_row, rows;  // the first is the first row of a tile
    float *result;
} Widening;

static void run_widening(Pool *pool, int thread) {
    const Widening *widening = pool->input;
    int first = widening->first_row / TILE, count = (widening->rows + TILE - 1) / TILE;
    SHARE(i, count, chunk_of(pool, count))
    widen_tile(widening->matrix, first + i, widening->result + (int64_t)i * TILE * widening->matrix->columns);
    wait_for_all(pool);
}

// --- What fast_decoding.py calls

void stop(Pool *pool) {
    pool->stopping = 1;
    run(pool, NULL, NULL);
    for (int thread = 1; thread < pool->num_threads; thread++) pthread_join(pool->threads[thread], NULL);
    free(pool->scratch);
    free(pool->threads);
    free(pool->parts);
    free(pool);
}

// Return a pool of threads that wait for work, NULL if the system gives none.
Pool *start(int num_threads) {
    Pool *pool = aligned_alloc(64, (sizeof(Pool) + 63) / 64 * 64);
    if (!pool) return NULL;
    memset(pool, 0, sizeof *pool);
    pool->num_threads = 1;
    pool->threads = calloc(num_threads, sizeof(pthread_t));
    pool->parts = aligned_alloc(64, num_threads * sizeof(Part));
    memset(pool->parts, 0, num_threads * sizeof(Part));
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    for (int thread = 1; thread < num_threads; thread++) {
        Worker *worker = malloc(sizeof *worker);
        *worker = (Worker){pool, thread};
        if (pthread_create(pool->threads + thread, NULL, serve, worker)) {
            free(worker);
            stop(pool);
            return NULL;
        }
        pool->num_threads++;
    }
    return pool;
}

// Compute a step; return 0, or 1 if there is too little memory.
int step(Pool *pool, const Model *model, const Step *input) {
    Scratch unused;
    size_t needed = lay_out(pool, model, input, NULL, &unused);
    if (needed > pool->scratch_floats) {
        free(pool->scratch);
        pool->scratch = aligned_alloc(64, needed * sizeof(float));
        pool->scratch_floats = pool->scratch ? needed : 0;
        if (!pool->scratch) return 1;
    }
    pool->model = model;
    run(pool, run_step, input);
    return 0;
}

// Write rows of a matrix in fp32, from the first row of a tile on: (rows, columns).
void widen(Pool *pool, const Matrix *matrix, int first_row, int rows, float *result) {
    Widening widening = {matrix, first_row, rows, result};
    run(pool, run_widening, &widening);
}

// Write one row of a matrix in fp32.
void widen_one(const Matrix *matrix, int row, float *result) { widen_row(matrix, row, result); }

// Return the name of the instructions that this was compiled for.
const char *instructions(void) {
#if defined(PORTABLE)
    return "portable C";
#elif defined(NEON)
    return "NEON dot product";
#elif LANES == 16
    return "AVX-512 VNNI";
#elif defined(PAIRS)
    return "AVX2";
#else
    return "AVX-VNNI";
#endif
}

typedef struct {
    const Matrix *matrix;
    const float *x;
    int32_t count, wide;
    float *result;
    Group *groups;
} Product;

static void run_product(Pool *pool, int thread) {
    const Product *p = pool->input;
    const Matrix *matrix = p->matrix;
    float tile[MAX_ROWS][TILE];
    int num_groups = is_grouped(matrix) ? p->count * (matrix->columns / GROUP) : 0;
    SHARE(group, num_groups, 4) to_digits(p->x + (int64_t)group * GROUP, p->groups + group);
    wait_for_all(pool);
    Rows rows = {p->count, matrix->columns, p->x, p->groups, p->wide};
    SHARE(i, num_tiles(matrix), chunk_of(pool, num_tiles(matrix))) {
        multiply(matrix, i, &rows, tile);
        put(matrix, i, p->count, tile, 0, p->result);
    }
    wait_for_all(pool);
}

// Write the products of a matrix (rows, columns) with `count` rows of activations: (count, rows). Return 0,
// or 1 if there is too little memory. The tests call this; a step multiplies by itself.
int product(Pool *pool, const Matrix *matrix, const float *x, int count, int wide, float *result) {
    Group *groups = aligned_alloc(64, (size_t)count * (matrix->columns / GROUP + 1) * sizeof(Group));
    if (!groups) return 1;
    Product input = {matrix, x, count, wide, result, groups};
    run(pool, run_product, &input);
    free(groups);
    return 0;
}
