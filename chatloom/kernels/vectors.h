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

static inline float widened(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

// To the nearest, ties to even; NaN stays NaN.
static inline bf16 rounded(float number) {
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return number != number ? 0x7fc0 : (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// As `rounded`, of each.
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

static inline Vector choose(Integers condition, Vector yes, Vector no) {
    Integers a, b;
    memcpy(&a, &yes, sizeof a);
    memcpy(&b, &no, sizeof b);
    Integers bits = (condition & a) | (~condition & b);
    Vector values;
    memcpy(&values, &bits, sizeof values);
    return values;
}

// e^x = 2^n e^r with |r| <= ln(2) / 2, e^r by its Taylor series: within 2e-7 of it; 0 below -87, NaN stays NaN.
static inline Vector exponential(Vector x) {
    Vector low = (Vector){} - 87.0f, high = (Vector){} + 88.0f;
    Integers underflow = x < low;
    x = choose(x > high, high, choose(underflow, low, x));
    Vector scaled = x * 1.44269504f;
    Integers n = __builtin_convertvector(scaled + choose(scaled < 0, (Vector){} - 0.5f, (Vector){} + 0.5f), Integers);
    Vector whole = __builtin_convertvector(n, Vector);
    Vector r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vector series = 1 + r * (1 + r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r / 720)))));
    Integers bits = (n + 127) << 23;
    Vector power;
    memcpy(&power, &bits, sizeof power);
    return choose(underflow, (Vector){}, series * power);
}
