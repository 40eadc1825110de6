// The norm of a gradient, and AdamW (Loshchilov 2019) with clipping and rounding, each in one pass over memory.
//
// A thread takes whole blocks, of which every number is treated alike: equal inputs give equal bits.

#include <math.h>

#include "vectors.h"

#define BLOCK 2048

// Gradients are bfloat16 (half) or float32: numbers first to first + count as float32, in room where they were not.
static inline const float *block_of(const void *gradients, int half, int64_t first, int64_t count, float *room) {
    if (!half) return (const float *)gradients + first;
    const bf16 *from = (const bf16 *)gradients + first;
    for (int64_t i = 0; i < count; i++) room[i] = widened(from[i]);
    return room;
}

// One sum of squares for each block.
void squares(const void *gradients, int half, float *sums, int64_t count) {
    int64_t blocks = (count + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) if (blocks > 16)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t first = block * BLOCK, size = count - first < BLOCK ? count - first : BLOCK;
        float room[BLOCK], sum = 0;
        const float *gradient = block_of(gradients, half, first, size, room);
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; i++) sum += gradient[i] * gradient[i];
        sums[block] = sum;
    }
}

// rate: the learning rate over the correction of the mean; scale: 1 / the root of the correction of the variance.
// rounded_weights may be NULL: of weights that are not bfloat16.
void adamw(
    const void *gradients, int half, float *weights, float *means, float *variances, bf16 *rounded_weights, int64_t count,
    float clip, float rate, float decay, float beta1, float beta2, float epsilon, float scale
) {
    int64_t blocks = (count + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) if (blocks > 16)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t first = block * BLOCK, size = count - first < BLOCK ? count - first : BLOCK;
        float room[BLOCK];
        const float *gradient = block_of(gradients, half, first, size, room);
        float *weight = weights + first, *mean = means + first, *variance = variances + first;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            float clipped = gradient[i] * clip;
            mean[i] += (1 - beta1) * (clipped - mean[i]);
            variance[i] = beta2 * variance[i] + (1 - beta2) * clipped * clipped;
            weight[i] -= decay * weight[i] + rate * mean[i] / (sqrtf(variance[i]) * scale + epsilon);
        }
        if (rounded_weights)
            for (int64_t i = 0; i < size; i++) rounded_weights[first + i] = rounded(weight[i]);
    }
}
