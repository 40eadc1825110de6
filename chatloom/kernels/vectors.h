// bfloat16 in memory, float32 in between, sixteen at a time.

#include <stdint.h>
#include <string.h>

#define LANES 16

typedef uint16_t bf16;
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef float Halfway __attribute__((vector_size(2 * LANES), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES), aligned(4)));

// Plain loops here, which compilers turn into one instruction where the processor has it.
static inline Vector load(const bf16 *from) {
    int32_t bits[LANES];
    for (int i = 0; i < LANES; i++) bits[i] = (int32_t)((uint32_t)from[i] << 16);
    Vector values;
    memcpy(&values, bits, sizeof values);
    return values;
}

// To the nearest, ties to even; NaN stays NaN.
static inline void store(bf16 *to, Vector values) {
    int32_t bits[LANES];
    Integers is_nan = values != values;
    memcpy(bits, &values, sizeof bits);
    for (int i = 0; i < LANES; i++) {
        int32_t rounded = (bits[i] + 0x7fff + ((bits[i] >> 16) & 1)) >> 16;
        to[i] = (bf16)(is_nan[i] ? 0x7fc0 : rounded);
    }
}

static inline Vector round_to_bf16(Vector values) {
    bf16 rounded[LANES];
    store(rounded, values);
    return load(rounded);
}

static inline float total(Vector values) {
    Halfway low, high;
    memcpy(&low, &values, sizeof low);
    memcpy(&high, (char *)&values + sizeof low, sizeof high);
    low += high;
    return ((low[0] + low[4]) + (low[1] + low[5])) + ((low[2] + low[6]) + (low[3] + low[7]));
}
