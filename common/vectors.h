// Vectors of LANES numbers in fp32, which GCC and Clang translate for every processor. LANES is defined by
// the file that includes this one: decoder.c and attention.c choose it by what they need of a processor.

#include <stdint.h>

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef Floats AnyFloats __attribute__((aligned(1), may_alias));
#define INLINE static inline __attribute__((always_inline))

INLINE Floats load(const float *from) { return *(const AnyFloats *)from; }
INLINE void store(float *to, Floats numbers) { *(AnyFloats *)to = numbers; }

INLINE Floats splat(float x) {  // written out: 0 + x would be an addition, and a loop moves lane by lane
#if LANES == 16
    return (Floats){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#elif LANES == 8
    return (Floats){x, x, x, x, x, x, x, x};
#else
    return (Floats){x, x, x, x};
#endif
}

INLINE Floats choose(Ints mask, Floats yes, Floats no) {
    return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no));
}

INLINE float sum_of(Floats numbers) {
    for (int half = LANES / 2; half; half /= 2)  // in pairs, which need not wait for each other
        for (int lane = 0; lane < half; lane++) numbers[lane] += numbers[lane + half];
    return numbers[0];
}

// exp(x) for x from -87 to 88, limited to that: the polynomial of Cephes, off by at most 2 units
INLINE Floats exponential(Floats x) {
    x = choose(x < -87.0f, splat(-87.0f), choose(x > 88.0f, splat(88.0f), x));
    Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
    Floats power = shifted - 12582912.0f;
    Floats rest = x - power * 0.693359375f + power * 2.12194440e-4f;
    Floats y = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    return y * (Floats)(((Ints)shifted - 0x4b400000 + 127) << 23);
}
