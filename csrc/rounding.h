// Stochastic rounding of one float32, for the CPU loop and the CUDA kernel alike. Integer arithmetic only, so that
// csrc/python/ops/rounding.py states the same functions in PyTorch and reaches the same bits.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SLIMSTATE_HD __host__ __device__ __forceinline__
#else
#define SLIMSTATE_HD inline
#endif

namespace slimstate {

// A bijection of 32 bits with good avalanche. Shifts and factors: C. Wellons, "Prospecting for Hash Functions" (2018),
// the two-multiplication mixer "lowbias32".
SLIMSTATE_HD uint32_t mix32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352dU;
  x = (x ^ (x >> 15)) * 0x846ca68bU;
  return x ^ (x >> 16);
}

struct Key {
  uint32_t low, high;
};

// Two Feistel rounds, once per call: still a bijection of 64 bits, but keys that differ in one bit (steps 1, 2, 3...)
// now share neither half.
SLIMSTATE_HD Key expand_key(uint64_t key) {
  const uint32_t low = static_cast<uint32_t>(key);
  const uint32_t high = static_cast<uint32_t>(key >> 32) ^ mix32(low);
  return {low ^ mix32(high), high};
}

// Where the elements of a part lie in the whole tensor: rows of `width`, `pitch` apart, from `start` on.
struct Place {
  uint64_t start, width, pitch;

  SLIMSTATE_HD uint64_t index(uint64_t i) const {
    return i < width ? start + i : start + i / width * pitch + i % width;  // no division where it is one row
  }
};

// The 32 random bits of element `index` of the whole tensor; loops in which its upper half stays count in 32 bits.
SLIMSTATE_HD uint32_t random_bits(Key key, uint32_t high, uint32_t low) {
  return mix32(mix32(low ^ key.low) ^ (key.high ^ high));
}

SLIMSTATE_HD uint32_t random_bits(Key key, uint64_t index) {
  return random_bits(key, static_cast<uint32_t>(index >> 32), static_cast<uint32_t>(index));
}

SLIMSTATE_HD uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

SLIMSTATE_HD float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Both functions round the magnitude and put the sign back, so -x rounds to minus what x rounds to. Past the largest
// finite value there is no upper neighbour to be unbiased towards: there they round to nearest, as a plain cast does.
struct BFloat16 {
  static SLIMSTATE_HD uint16_t round(float x, uint32_t random) {
    const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000U, a = bits & 0x7fffffffU;
    uint32_t rounded = (a + (random >> 16)) >> 16;
    if (a > 0x7f7f0000U) rounded = a >= 0x7f7f8000U ? 0x7f80U : 0x7f7fU;
    if (a > 0x7f800000U) rounded = a >> 16 | 0x40U;  // NaN: keep the payload, make it quiet
    return static_cast<uint16_t>(sign | rounded);
  }
};

struct Half {
  static SLIMSTATE_HD uint16_t round(float x, uint32_t random) {
    const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000U, a = bits & 0x7fffffffU;
    // |x| in units of the last place of its result, as 32.32 fixed point. Below 2^-14 (exponent 113) that unit stops
    // shrinking at 2^-24, so the significand moves right instead.
    const uint32_t exponent = a >> 23, scale = exponent > 113 ? exponent : 113;
    const uint32_t shift = 13 + scale - exponent;
    const uint64_t fixed = static_cast<uint64_t>((a & 0x7fffffU) | 0x800000U) << 32 >> (shift < 63 ? shift : 63);
    // The hidden bit of a normal result is bit 10 and so raises the exponent by the one that was left out.
    uint32_t rounded = ((scale - 113) << 10) + static_cast<uint32_t>((fixed + random) >> 32);
    if (a > 0x477fe000U) rounded = a >= 0x477ff000U ? 0x7c00U : 0x7bffU;
    if (a > 0x7f800000U) rounded = 0x7e00U | (a >> 13 & 0x3ffU);
    return static_cast<uint16_t>(sign | rounded);
  }
};

}  // namespace slimstate
