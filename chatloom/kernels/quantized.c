// Products with weights of BITS bits (4 or 8), widened in registers on their way from memory; sums are float32.
//
// A weight is scale * (code - zero); `group` inputs of an output share scale and zero. Sixteen outputs are a tile:
// codes are (tiles, inputs / PER, 16) words with PER inputs of one output in each, lowest bits first; scales (float16)
// and zeros (bytes) are (tiles, inputs / group, 16). So a thread reads one stream, and no sum crosses lanes.
//
// BFLOAT16 says what the activations are: bfloat16, or float32. Threads share no sum: equal inputs give equal bits.

#include <stdlib.h>

#include "vectors.h"

#define PER (32 / BITS)
#define ROWS 8  // that share what is widened of a tile; their sums stay in registers
#define AHEAD 32  // vectors of words that are on their way from memory

#if BFLOAT16
typedef bf16 Element;
#define READ load
#define WRITE store
#else
typedef float Element;
static inline Vector READ(const float *from) { return *(const Vector *)from; }
static inline void WRITE(float *to, Vector values) { *(Vector *)to = values; }
#endif

// The code of PER that begins at bit `shift` of each word.
static inline Vector code(Integers words, int shift) {
#if BITS == 4 && defined(__AVX512F__) && !defined(__clang__)
    // A shuffle looks at the lowest four bits of each index alone: it masks and converts at once.
    const Vector table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return __builtin_shuffle(table, words >> shift);
#else
    return __builtin_convertvector((words >> shift) & ((1 << BITS) - 1), Vector);
#endif
}

// float16 is float32 with fewer bits of each kind: a factor mends the exponent. Finite numbers only.
static inline Vector read_scales(const uint16_t *from) {
    Integers bits;
    for (int i = 0; i < LANES; i++) bits[i] = (from[i] & 0x7fff) << 13 | (from[i] & 0x8000) << 16;
    Vector values;
    memcpy(&values, &bits, sizeof values);
    return values * 0x1p112f;
}

static inline Vector read_zeros(const uint8_t *from) {
    Integers values;
    for (int i = 0; i < LANES; i++) values[i] = from[i];
    return __builtin_convertvector(values, Vector);
}

// One tile's outputs of N rows. With few rows a sum is made in CHAINS parts, or each addition would wait for the last.
#define MULTIPLY_TILE(N, CHAINS) \
    static void multiply_tile_##N( \
        const float *x, const float *sums, const int32_t *codes, const uint16_t *scales, const uint8_t *zeros, \
        Element *y, int64_t inputs, int64_t outputs, int64_t group \
    ) { \
        int64_t groups = inputs / group; \
        Vector all[N] = {}; \
        for (int64_t g = 0; g < groups; g++) { \
            Vector parts[N][CHAINS] = {}; \
            for (int64_t i = g * group; i < (g + 1) * group; i += PER) { \
                Integers words = *(const Integers *)(codes + i / PER * LANES); \
                __builtin_prefetch(codes + (i / PER + AHEAD) * LANES); \
                _Pragma("GCC unroll 8") for (int k = 0; k < PER; k++) { \
                    Vector weight = code(words, k * BITS); \
                    _Pragma("GCC unroll 8") for (int row = 0; row < N; row++) \
                        parts[row][k % CHAINS] += weight * x[row * inputs + i + k]; \
                } \
            } \
            Vector scale = read_scales(scales + g * LANES), zero = read_zeros(zeros + g * LANES); \
            for (int row = 0; row < N; row++) { \
                Vector sum = parts[row][0]; \
                for (int chain = 1; chain < CHAINS; chain++) sum += parts[row][chain]; \
                all[row] += scale * (sum - zero * sums[row * groups + g]); \
            } \
        } \
        for (int row = 0; row < N; row++) WRITE(y + row * outputs, all[row]); \
    }

MULTIPLY_TILE(1, 4)
MULTIPLY_TILE(2, 2)
MULTIPLY_TILE(3, 2)
MULTIPLY_TILE(4, 1)
MULTIPLY_TILE(5, 1)
MULTIPLY_TILE(6, 1)
MULTIPLY_TILE(7, 1)
MULTIPLY_TILE(8, 1)

// y (rows, tiles * 16) = x (rows, inputs) W^T; 1 where there is no memory for x in float32.
int multiply(
    const Element *x, const int32_t *codes, const uint16_t *scales, const uint8_t *zeros, Element *y, int64_t rows,
    int64_t inputs, int64_t tiles, int64_t group
) {
    static void (*const multiply_tile[])(
        const float *, const float *, const int32_t *, const uint16_t *, const uint8_t *, Element *, int64_t, int64_t,
        int64_t
    ) = {
        multiply_tile_1, multiply_tile_2, multiply_tile_3, multiply_tile_4,
        multiply_tile_5, multiply_tile_6, multiply_tile_7, multiply_tile_8,
    };
    int64_t groups = inputs / group, outputs = tiles * LANES;
    float *wide = malloc(rows * (inputs + groups) * sizeof(float)), *sums = wide + rows * inputs;
    if (!wide) return 1;
    for (int64_t i = 0; i < rows * inputs; i += LANES) *(Vector *)(wide + i) = READ(x + i);
    for (int64_t part = 0; part < rows * groups; part++) {
        Vector sum = {};
        int64_t i = part * group, end = i + group;
        for (; i + LANES <= end; i += LANES) sum += *(const Vector *)(wide + i);
        sums[part] = total(sum);
        for (; i < end; i++) sums[part] += wide[i];
    }
#pragma omp parallel for schedule(dynamic)
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t row = 0; row < rows; row += ROWS)
            multiply_tile[(rows - row < ROWS ? rows - row : ROWS) - 1](
                wide + row * inputs, sums + row * groups, codes + tile * (inputs / PER) * LANES,
                scales + tile * groups * LANES, zeros + tile * groups * LANES, y + row * outputs + tile * LANES, inputs,
                outputs, group
            );
    free(wide);
    return 0;
}

// W^T (inputs, tiles * 16).
void dequantize(
    const int32_t *codes, const uint16_t *scales, const uint8_t *zeros, Element *weights, int64_t inputs, int64_t tiles,
    int64_t group
) {
    int64_t groups = inputs / group, outputs = tiles * LANES;
#pragma omp parallel for schedule(dynamic)
    for (int64_t g = 0; g < groups; g++)
        for (int64_t tile = 0; tile < tiles; tile++) {
            int64_t at = (tile * groups + g) * LANES;
            Vector scale = read_scales(scales + at), zero = read_zeros(zeros + at);
            for (int64_t i = g * group; i < (g + 1) * group; i += PER) {
                Integers words = *(const Integers *)(codes + (tile * inputs + i) / PER * LANES);
                for (int k = 0; k < PER; k++)
                    WRITE(weights + (i + k) * outputs + tile * LANES, scale * (code(words, k * BITS) - zero));
            }
        }
}
