// Products of rows with the weights of a layer, which for few rows take as long as the weights take to be read.
//
// With the matrix instructions (AMX) of x86 processors. A tile of weights is 16 rows of 32 numbers from where they lie,
// so that these need no other layout; x is laid out as tiles first. The sums of a row are made in the same order
// whatever rows are beside it: equal inputs give equal bits.

#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define DEEP 32  // numbers in a row of a tile
#define TALL 16  // rows of a tile

typedef uint32_t Tile[TALL][TALL];

// Whether the system lets this process use the tiles.
int linear_works(void) {
    const int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

static void configure(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = TALL;
    }
    _tile_loadconfig(&config);
}

static inline void transpose(Vector *rows) {
    const Integers lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
    for (int step = 1; step < TALL; step *= 2) {
        Integers low = lanes + (lanes & step) / step * (TALL - step), high = low + step;
#pragma GCC unroll 16
        for (int i = 0; i < TALL; i++)
            if (!(i & step)) {
                Vector first = rows[i], second = rows[i + step];
                rows[i] = _mm512_permutex2var_ps(first, (__m512i)low, second);
                rows[i + step] = _mm512_permutex2var_ps(first, (__m512i)high, second);
            }
    }
}

// x (rows, inputs) as tiles (rows / TALL, inputs / DEEP): a row of a tile has two inputs of each row of x.
static void pack(const bf16 *x, Tile *tiles, int64_t rows, int64_t inputs) {
    int64_t depth = inputs / DEEP, count = (rows + TALL - 1) / TALL * depth;
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < count; tile++) {
        Vector lines[TALL] = {};
        int64_t first = tile / depth * TALL;
        for (int64_t i = 0; i < TALL && first + i < rows; i++)
            memcpy(lines + i, x + (first + i) * inputs + tile % depth * DEEP, sizeof(Vector));
        transpose(lines);
        memcpy(tiles + tile, lines, sizeof lines);
    }
}

// Products of TALL rows of a and as many of b, inputs apart, with 1 or 2 groups of TALL rows of x, to
// sums[group][0 for a, 1 for b][row of x][row of weights]. What lies ahead of a and b is called from memory meanwhile,
// in the order in which it lies there, which the processor then goes on with by itself.
static void multiply(
    const bf16 *a, const bf16 *b, Tile *tiles, int64_t inputs, int groups, int64_t ahead, Vector sums[2][2][TALL]
) {
    int64_t depth = inputs / DEEP, stride = inputs * sizeof(bf16);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k++) {
        for (int64_t line = k * TALL; ahead && line < (k + 1) * TALL; line++) {
            __builtin_prefetch(a + ahead + line * DEEP, 0, 2);
            __builtin_prefetch(b + ahead + line * DEEP, 0, 2);
        }
        _tile_loadd(4, tiles[k], 64);
        _tile_loadd(6, a + k * DEEP, stride);
        _tile_dpbf16ps(0, 6, 4);
        _tile_loadd(7, b + k * DEEP, stride);
        _tile_dpbf16ps(1, 7, 4);
        if (groups > 1) {
            _tile_loadd(5, tiles[depth + k], 64);
            _tile_dpbf16ps(2, 6, 5);
            _tile_dpbf16ps(3, 7, 5);
        }
    }
    _tile_stored(0, sums[0][0], 64);
    _tile_stored(1, sums[0][1], 64);
    _tile_stored(2, sums[1][0], 64);
    _tile_stored(3, sums[1][1], 64);
    for (int group = 0; group < groups; group++) {
        transpose(sums[group][0]);
        transpose(sums[group][1]);
    }
}

// Stores the values from skip on.
static inline void put(bf16 *y, Vector values, int64_t skip) {
    _mm256_mask_storeu_epi16(y, 0xffff << skip, (__m256i)_mm512_cvtneps_pbh(values));
}

// y = x w^T + bias, or silu(x gate^T) * (x w^T) where there is a gate. x (rows, inputs), w and gate (outputs, inputs),
// bias (outputs) or null, y (rows, outputs); inputs a multiple of DEEP, outputs TALL or more; tiles has room for x with
// rows a multiple of TALL. Blocks that would go beyond the outputs begin earlier, and store what is theirs alone.
void linear(
    const bf16 *x, const bf16 *w, const bf16 *gate, const bf16 *bias, bf16 *y, Tile *tiles, int64_t rows,
    int64_t inputs, int64_t outputs
) {
    int64_t depth = inputs / DEEP, width = gate ? TALL : 2 * TALL, last = outputs - TALL;
#pragma omp parallel
    {
        pack(x, tiles, rows, inputs);
        configure();
#pragma omp for schedule(static)
        for (int64_t begin = 0; begin < outputs; begin += width) {
            int64_t second = gate ? begin : begin + TALL;
            int64_t first = begin < last ? begin : last, other = second < last ? second : last;
            const bf16 *a = (gate ? gate : w) + first * inputs, *b = w + other * inputs;
            for (int64_t row = 0; row < rows; row += 2 * TALL) {
                Vector sums[2][2][TALL];
                int64_t ahead = row ? 0 : width * inputs;
                multiply(a, b, tiles + row / TALL * depth, inputs, rows - row > TALL ? 2 : 1, ahead, sums);
                for (int64_t r = 0; r < 2 * TALL && row + r < rows; r++) {
                    Vector left = sums[r / TALL][0][r % TALL], right = sums[r / TALL][1][r % TALL];
                    bf16 *to = y + (row + r) * outputs;
                    if (gate) {
                        put(to + first, left / (1 + exponential(-left)) * right, begin - first);
                        continue;
                    }
                    put(to + first, bias ? left + load(bias + first) : left, begin - first);
                    put(to + other, bias ? right + load(bias + other) : right, second - other);
                }
            }
        }
        _tile_release();
    }
}

#else

int linear_works(void) { return 0; }

#endif
