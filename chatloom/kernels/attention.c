// Causal attention with grouped queries, where PyTorch has nothing fast for a CPU in bfloat16: one new token in each of
// many sequences, and the gradients of short sequences.
//
// HEAD is the size of a head, a multiple of 16; GROUP queries share a key. A thread takes whole heads of sequences and
// sums in a fixed order: equal inputs give equal bits.

#include <math.h>
#include <stdlib.h>

#include "vectors.h"

#define PARTS (HEAD / LANES)
#define AHEAD 8  // positions of the cache that are on their way from memory
#define ROWS 8  // queries that share what is loaded of a key

// Rotary positions (Su 2021) of one head, in float32, rounded once; the sine has its sign.
static inline void rotate(const bf16 *from, const bf16 *cosine, const bf16 *sine, Vector *to) {
    for (int part = 0; part < PARTS; part++) {
        const bf16 *other = from + (part * LANES + HEAD / 2) % HEAD;
        to[part] = round_to_bf16(
            load(from + part * LANES) * load(cosine + part * LANES) + load(other) * load(sine + part * LANES)
        );
    }
}

// One more token in each of rows sequences: its key and value go into the cache, its queries attend to all there is.
// states (rows, heads + 2 key heads, HEAD), cosine and sine (rows, HEAD), cache (rows, room, 2, key heads, HEAD),
// lengths: the new token counted in; y (rows, heads, HEAD).
void attend_rows(
    const bf16 *states, const bf16 *cosine, const bf16 *sine, bf16 *cache, const int64_t *lengths, bf16 *y, int64_t rows,
    int64_t room, int64_t key_heads, float scale
) {
    int64_t heads = GROUP * key_heads, step = 2 * key_heads * HEAD;
#pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < rows * key_heads; task++) {
        int64_t row = task / key_heads, head = task % key_heads, length = lengths[row];
        int64_t width = (length + LANES - 1) / LANES * LANES;
        const bf16 *own = states + row * (heads + 2 * key_heads) * HEAD;
        bf16 *keys = cache + row * room * step + head * HEAD, *values = keys + key_heads * HEAD;
        Vector turned[PARTS], queries[GROUP][PARTS], sums[GROUP][PARTS] = {};
        float highest[GROUP], normalizer[GROUP], weights[GROUP][width];
        rotate(own + (heads + head) * HEAD, cosine + row * HEAD, sine + row * HEAD, turned);
        for (int part = 0; part < PARTS; part++) store(keys + (length - 1) * step + part * LANES, turned[part]);
        memcpy(values + (length - 1) * step, own + (heads + key_heads + head) * HEAD, HEAD * sizeof(bf16));
        for (int q = 0; q < GROUP; q++) {
            rotate(own + (head * GROUP + q) * HEAD, cosine + row * HEAD, sine + row * HEAD, queries[q]);
            highest[q] = -INFINITY;
        }
        for (int64_t s = 0; s < length; s++) {
            const bf16 *at = keys + s * step;
            for (int line = 0; line < HEAD; line += 32) __builtin_prefetch(at + AHEAD * step + line);
            Vector products[GROUP] = {};
            for (int part = 0; part < PARTS; part++) {
                Vector key = load(at + part * LANES);
                for (int q = 0; q < GROUP; q++) products[q] += queries[q][part] * key;
            }
            for (int q = 0; q < GROUP; q++) {
                weights[q][s] = total(products[q]) * scale;
                highest[q] = weights[q][s] > highest[q] ? weights[q][s] : highest[q];
            }
        }
        for (int q = 0; q < GROUP; q++) {
            Vector all = {};
            for (int64_t s = length; s < width; s++) weights[q][s] = -INFINITY;
            for (int64_t s = 0; s < width; s += LANES) {
                Vector *block = (Vector *)(weights[q] + s);
                *block = exponential(*block - highest[q]);
                all += *block;
            }
            normalizer[q] = total(all);
        }
        for (int64_t s = 0; s < length; s++) {
            const bf16 *at = values + s * step;
            for (int line = 0; line < HEAD; line += 32) __builtin_prefetch(at + AHEAD * step + line);
            for (int part = 0; part < PARTS; part++) {
                Vector value = load(at + part * LANES);
                for (int q = 0; q < GROUP; q++) sums[q][part] += weights[q][s] * value;
            }
        }
        for (int q = 0; q < GROUP; q++)
            for (int part = 0; part < PARTS; part++)
                store(y + (row * heads + head * GROUP + q) * HEAD + part * LANES, sums[q][part] / normalizer[q]);
    }
}

// A head of one sequence, as floats: rows of it, or with a position's numbers LANES apart, for products by position.
static void widen(const bf16 *from, int64_t step, int64_t length, float *by_row, float *by_column, int64_t width) {
    for (int64_t s = 0; s < length; s++) {
        for (int part = 0; part < PARTS; part++)
            *(Vector *)(by_row + s * HEAD + part * LANES) = load(from + s * step + part * LANES);
        if (by_column)
            for (int d = 0; d < HEAD; d++) by_column[d * width + s] = by_row[s * HEAD + d];
    }
}

// Products of ROWS rows with all columns up to last.
static void multiply(const float *rows, const float *columns, int64_t last, int64_t width, float *out) {
    for (int64_t s = 0; s < last; s += LANES) {
        Vector sums[ROWS] = {};
        for (int d = 0; d < HEAD; d++) {
            Vector column = *(Vector *)(columns + d * width + s);
            for (int r = 0; r < ROWS; r++) sums[r] += rows[r * HEAD + d] * column;
        }
        for (int r = 0; r < ROWS; r++) *(Vector *)(out + r * width + s) = sums[r];
    }
}

// Gradients of causal attention over sequences laid end to end (Dao 2022, with whole rows of scores).
// q, dq, out, dout (tokens, heads, HEAD); k, v, dk, dv (tokens, key heads, HEAD); logsumexp (heads, tokens).
// Returns 1 where there is no memory for the longest sequence, and has written nothing of use then.
int attention_backward(
    const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *out, const bf16 *dout, const float *logsumexp, bf16 *dq,
    bf16 *dk, bf16 *dv, const int64_t *starts, int64_t sequences, int64_t key_heads, float scale
) {
    int64_t heads = GROUP * key_heads, tokens = starts[sequences];
    int failed = 0;
#pragma omp parallel for schedule(dynamic) reduction(| : failed)
    for (int64_t task = 0; task < sequences * key_heads; task++) {
        int64_t sequence = task / key_heads, head = task % key_heads, start = starts[sequence];
        int64_t length = starts[sequence + 1] - start, width = (length + LANES - 1) / LANES * LANES;
        int64_t step = heads * HEAD, key_step = key_heads * HEAD, key_start = start * key_step + head * HEAD;
        // keys and values by row and by column, their gradients; queries and upstream of ROWS rows; scores and products
        float *memory = calloc((6 * width + 2 * ROWS) * HEAD + 2 * ROWS * width, sizeof(float));
        if (!memory) {
            failed |= 1;
            continue;
        }
        float *keys = memory, *key_columns = keys + width * HEAD, *values = key_columns + width * HEAD;
        float *value_columns = values + width * HEAD, *key_grads = value_columns + width * HEAD;
        float *value_grads = key_grads + width * HEAD, *queries = value_grads + width * HEAD;
        float *upstream = queries + ROWS * HEAD, *weights = upstream + ROWS * HEAD, *grads = weights + ROWS * width;
        widen(k + key_start, key_step, length, keys, key_columns, width);
        widen(v + key_start, key_step, length, values, value_columns, width);
        for (int64_t query_head = head * GROUP; query_head < (head + 1) * GROUP; query_head++)
            for (int64_t first = 0; first < length; first += ROWS) {
                int64_t rows = length - first < ROWS ? length - first : ROWS, last = first + rows;
                int64_t from = (start + first) * step + query_head * HEAD;
                if (rows < ROWS) memset(queries, 0, 2 * ROWS * HEAD * sizeof(float));
                widen(q + from, step, rows, queries, NULL, 0);
                widen(dout + from, step, rows, upstream, NULL, 0);
                multiply(queries, key_columns, last, width, weights);
                multiply(upstream, value_columns, last, width, grads);
                for (int64_t r = 0; r < ROWS; r++) {
                    Vector products = {};
                    if (r < rows)
                        for (int part = 0; part < PARTS; part++)
                            products += *(Vector *)(upstream + r * HEAD + part * LANES) *
                                        load(out + from + r * step + part * LANES);
                    float delta = total(products);
                    float own = r < rows ? logsumexp[query_head * tokens + start + first + r] : INFINITY;
                    for (int64_t s = 0; s < last; s += LANES) {
                        Vector *weight = (Vector *)(weights + r * width + s), *grad = (Vector *)(grads + r * width + s);
                        *weight = exponential(*weight * scale - own);
                        for (int i = 0; i < LANES && s + LANES > first + r + 1; i++)
                            if (s + i > first + r) (*weight)[i] = 0;
                        *grad = *weight * (*grad - delta) * scale;
                    }
                }
                for (int part = 0; part < PARTS; part++) {
                    Vector query[ROWS], above[ROWS], query_grads[ROWS] = {};
                    for (int r = 0; r < ROWS; r++) {
                        query[r] = *(Vector *)(queries + r * HEAD + part * LANES);
                        above[r] = *(Vector *)(upstream + r * HEAD + part * LANES);
                    }
                    for (int64_t s = 0; s < last; s++) {
                        Vector key = *(Vector *)(keys + s * HEAD + part * LANES);
                        Vector key_grad = *(Vector *)(key_grads + s * HEAD + part * LANES);
                        Vector value_grad = *(Vector *)(value_grads + s * HEAD + part * LANES);
                        for (int r = 0; r < ROWS; r++) {
                            float grad = grads[r * width + s];
                            query_grads[r] += grad * key;
                            key_grad += grad * query[r];
                            value_grad += weights[r * width + s] * above[r];
                        }
                        *(Vector *)(key_grads + s * HEAD + part * LANES) = key_grad;
                        *(Vector *)(value_grads + s * HEAD + part * LANES) = value_grad;
                    }
                    for (int64_t r = 0; r < rows; r++) store(dq + from + r * step + part * LANES, query_grads[r]);
                }
            }
        for (int64_t s = 0; s < length; s++)
            for (int part = 0; part < PARTS; part++) {
                store(dk + key_start + s * key_step + part * LANES, *(Vector *)(key_grads + s * HEAD + part * LANES));
                store(dv + key_start + s * key_step + part * LANES, *(Vector *)(value_grads + s * HEAD + part * LANES));
            }
        free(memory);
    }
    return failed;
}
