// The Walsh-Hadamard transform of one column, for the CPU tiles and the CUDA blocks alike: butterflies on neighbours
// first, then on pairs 2, 4, 8... apart. A column's bits depend on that order alone, so that neither tiles nor threads
// nor the device change them.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define SLIMSTATE_BUTTERFLY __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define SLIMSTATE_BUTTERFLY __attribute__((always_inline)) inline  // into each clone of its caller
#else
#define SLIMSTATE_BUTTERFLY inline
#endif

namespace slimstate {

SLIMSTATE_BUTTERFLY void butterfly(float& a, float& b) {
  const float sum = a + b, difference = a - b;
  a = sum;
  b = difference;
}

// log2(R) sweeps at once: x[j] is what lies j strides from x[0], R is 1, 2, 4 or 8.
template <int R>
SLIMSTATE_BUTTERFLY void butterflies(float* x) {
  if constexpr (R >= 2) butterfly(x[0], x[1]);
  if constexpr (R >= 4) {
    butterfly(x[2], x[3]);
    butterfly(x[0], x[2]);
    butterfly(x[1], x[3]);
  }
  if constexpr (R >= 8) {
    butterfly(x[4], x[5]);
    butterfly(x[6], x[7]);
    butterfly(x[4], x[6]);
    butterfly(x[5], x[7]);
    butterfly(x[0], x[4]);
    butterfly(x[1], x[5]);
    butterfly(x[2], x[6]);
    butterfly(x[3], x[7]);
  }
}

// A power of two that d is cut into, and the factor 2^(-bits / 2) of its matrix in two parts: a power of two that comes
// before the butterflies, which then reach no farther than the result, and the rest, 1 or sqrt(1/2), after them.
struct HadamardBlock {
  int64_t start, size;
  int bits;

  SLIMSTATE_BUTTERFLY float before() const { return 1.0F / static_cast<float>(int64_t{1} << (bits / 2)); }
  SLIMSTATE_BUTTERFLY float after() const { return bits % 2 != 0 ? 0.70710678118654752F : 1.0F; }
};

// Calls f with the blocks of d: its binary digits, the largest first.
template <typename F>
void for_each_block(int64_t d, const F& f) {
  int64_t start = 0;
  for (int bits = 62; bits >= 0; --bits) {
    if ((d >> bits & 1) == 0) continue;
    f(HadamardBlock{start, int64_t{1} << bits, bits});
    start += int64_t{1} << bits;
  }
}

}  // namespace slimstate
