// One element of a step with what a subspace leaves out of a gradient, for the CPU loop and the CUDA kernel alike;
// csrc/python/ops/residual.py states the same functions in PyTorch and reaches the same bits.
#pragma once
#include "rounding.h"

namespace slimstate {

// W <- beta W - step sign(G - P), without what is too small for its sign to mean anything.
struct SignResidual {
  static constexpr bool products = true;
  float beta, step;

  SLIMSTATE_HD float operator()(float w, float g, float product, float limit) const {
    const float outside = g - product;
    const float sign = (outside > limit ? 1.0f : 0.0f) - (outside < -limit ? 1.0f : 0.0f);
    return w * beta - sign * step;
  }
};

// W <- beta W - F G.
struct ScaledResidual {
  static constexpr bool products = false;
  float beta;

  SLIMSTATE_HD float operator()(float w, float g, float, float factor) const { return w * beta - g * factor; }
};

}  // namespace slimstate
