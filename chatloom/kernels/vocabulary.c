// Log-probabilities of tokens, and what their gradients need, from the logits of a vocabulary: a row stays in the cache
// between its passes, and float32 is in registers only.

#include <math.h>

#include "vectors.h"

#define ABSENT -1e30f

// What lies past the end is so small that it counts for nothing.
static inline Vector load_up_to(const bf16 *from, int64_t count) {
    if (count >= LANES) return load(from);
    Vector values;
    for (int i = 0; i < LANES; i++) values[i] = i < count ? widened(from[i]) : ABSENT;
    return values;
}

// Of softmax(scale * logits): logarithms at the targets, entropies. With keep, one-hot(target) - probabilities takes the
// place of the logits.
void log_softmax(
    bf16 *logits, const int64_t *targets, float *logprobs, float *entropies, int64_t rows, int64_t width, float scale,
    int keep
) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        bf16 *own = logits + row * width;
        Vector highest = (Vector){} + ABSENT, sums = {}, products = {};
        for (int64_t i = 0; i < width; i += LANES) {
            Vector values = load_up_to(own + i, width - i) * scale;
            highest = choose(values > highest, values, highest);
        }
        float most = highest[0];
        for (int i = 1; i < LANES; i++) most = highest[i] > most ? highest[i] : most;
        for (int64_t i = 0; i < width; i += LANES) {
            Vector values = load_up_to(own + i, width - i) * scale, power = exponential(values - most);
            sums += power;
            products += power * (values - most);
        }
        float sum = total(sums), normalizer = most + logf(sum), target = widened(own[targets[row]]) * scale;
        logprobs[row] = target - normalizer;
        entropies[row] = logf(sum) - total(products) / sum;
        if (!keep) continue;
        int64_t whole = width - width % LANES;
        for (int64_t i = 0; i < whole; i += LANES) store(own + i, -exponential(load(own + i) * scale - normalizer));
        if (whole < width) {
            Vector rest = -exponential(load_up_to(own + whole, width - whole) * scale - normalizer);
            for (int64_t i = whole; i < width; i++) own[i] = rounded(rest[i - whole]);
        }
        own[targets[row]] = rounded(1 - expf(target - normalizer));
    }
}
