// Adam's arithmetic for one element, for the CPU loops and the CUDA kernels alike. Its float32 numbers and the order of
// its operations are those of csrc/python/ops/directions.py.
#pragma once
#include <cmath>

#include "weights.h"

namespace slimstate {

struct Adam {
  float beta1, rest1, beta2, rest2, eps;  // rest = 1 - beta

  Adam(double b1, double b2, double epsilon)
      : beta1(static_cast<float>(b1)),
        rest1(static_cast<float>(1 - b1)),
        beta2(static_cast<float>(b2)),
        rest2(static_cast<float>(1 - b2)),
        eps(static_cast<float>(epsilon)) {}
};

// What corrects the moments of age t: s1 = -1 / (1 - b1^t), positive to maximize, and s2 = 1 / sqrt(1 - b2^t).
struct Bias {
  float first, second;
};

SLIMSTATE_HD Bias bias_of(double age, double beta1, double beta2, bool maximize) {
  const double first = 1.0 / (1.0 - pow(beta1, age));
  return {static_cast<float>(maximize ? first : -first), static_cast<float>(1.0 / sqrt(1.0 - pow(beta2, age)))};
}

// M <- b1 M + (1-b1) G, V <- b2 V + (1-b2) G^2; returns U = s1 M / (s2 sqrt(V) + eps).
SLIMSTATE_HD float adam_direction(const Adam& adam, Bias bias, float g, float& m, float& v) {
  m = m * adam.beta1 + g * adam.rest1;
  v = v * adam.beta2 + g * g * adam.rest2;
  return m * bias.first / (sqrtf(v) * bias.second + adam.eps);
}

// How moments are kept.

struct Float32Moment {
  using Bits = float;
  static constexpr bool random = false;
  static SLIMSTATE_HD float widen(float x) { return x; }
  static SLIMSTATE_HD float narrow(float x, uint32_t) { return x; }
};

struct BFloat16Moment {
  using Bits = uint16_t;
  static constexpr bool random = true;
  static SLIMSTATE_HD float widen(uint16_t x) { return widen_bfloat16(x); }
  static SLIMSTATE_HD uint16_t narrow(float x, uint32_t bits) { return BFloat16::round(x, bits); }
};

}  // namespace slimstate
