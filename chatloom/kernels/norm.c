// RMSNorm (Zhang 2019) and its gradient, each in one pass over its rows; equal inputs give equal bits.

#include <math.h>

#include "vectors.h"

// y = w round(x / rms(x)); scale, one number a row, is 1 / rms(x).
void rms_norm(const bf16 *x, const bf16 *w, bf16 *y, float *scale, int64_t rows, int64_t width, float epsilon) {
#pragma omp parallel for schedule(static) if (rows > 64)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *from = x + row * width;
        Vector squares = {};
        for (int64_t i = 0; i < width; i += LANES) {
            Vector values = load(from + i);
            squares += values * values;
        }
        float own = 1 / sqrtf(total(squares) / width + epsilon);
        scale[row] = own;
        for (int64_t i = 0; i < width; i += LANES)
            store(y + row * width + i, round_to_bf16(load(from + i) * own) * load(w + i));
    }
}

// dw, a row of width for each of shares: their sum is the weight's gradient.
void rms_norm_backward(
    const bf16 *dy, const bf16 *x, const bf16 *w, const float *scale, bf16 *dx, float *dw, int64_t rows, int64_t width,
    int64_t shares
) {
#pragma omp parallel for schedule(static)
    for (int64_t share = 0; share < shares; share++) {
        float *sums = dw + share * width;
        for (int64_t row = rows * share / shares; row < rows * (share + 1) / shares; row++) {
            const bf16 *upstream = dy + row * width, *from = x + row * width;
            Vector products = {};
            for (int64_t i = 0; i < width; i += LANES) {
                Vector normal = load(from + i) * scale[row], gradient = load(upstream + i);
                *(Vector *)(sums + i) += gradient * normal;
                products += gradient * load(w + i) * normal;
            }
            float mean = total(products) / width;
            for (int64_t i = 0; i < width; i += LANES) {
                Vector normal = load(from + i) * scale[row];
                store(dx + row * width + i, (load(upstream + i) * load(w + i) - normal * mean) * scale[row]);
            }
        }
    }
}
