// The split step, for one element: Adam or a given direction on what is kept, the sign, the gradient or nothing
// elsewhere. The order of operations is that of csrc/python/ops/split.py.
#pragma once
#include "adam.h"

namespace slimstate {

enum Outer : int64_t { SIGN, SGD, NONE };

// W <- decay W + step U where it is kept, W <- decay W - outside outer(G) elsewhere.
struct SplitNumbers {
  float decay, step, outside;
};

template <int64_t outer>
SLIMSTATE_HD float outer_step(const SplitNumbers& numbers, float w, float g) {
  w = w * numbers.decay;
  if constexpr (outer == SIGN) return w - static_cast<float>((g > 0.0F) - (g < 0.0F)) * numbers.outside;
  if constexpr (outer == SGD) return w - g * numbers.outside;
  return w;
}

SLIMSTATE_HD float inner_step(const SplitNumbers& numbers, float w, float u) {
  return w * numbers.decay + u * numbers.step;
}

}  // namespace slimstate
