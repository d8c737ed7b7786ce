// The split step, for one element: Adam or a given direction on what is kept, the sign, the gradient or nothing
// elsewhere. The order of operations is that of csrc/python/ops/split.py. And the arguments of the op, read for all
// devices.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "adam.h"
#include "checks.h"

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

struct SplitMatrix {
  void* w;
  const void* g;
  int16_t* low;
  const int32_t* index;  // `kept` of each of its members, sorted
  void *m, *v;           // moments of what is kept, or in m its direction
  int64_t members, rows, columns, kept;
  Bias bias;
  Key key, first, second;
  Place place, moments;
};

// Those that are not empty.
inline std::vector<SplitMatrix> split_matrices(
    SplitKind kind, const std::vector<torch::stable::Tensor>& ps, const std::vector<torch::stable::Tensor>& grads,
    const std::vector<torch::stable::Tensor>& indices, const std::vector<torch::stable::Tensor>& exp_avgs,
    const std::vector<torch::stable::Tensor>& exp_avg_sqs, const std::vector<torch::stable::Tensor>& lows,
    const std::vector<int64_t>& shapes, const std::vector<double>& biases, const std::vector<int64_t>& keys,
    const std::vector<int64_t>& places, const std::vector<int64_t>& moment_keys,
    const std::vector<int64_t>& moment_places) {
  const auto place = [](const std::vector<int64_t>& from, size_t i) {
    return Place{static_cast<uint64_t>(from[3 * i]), static_cast<uint64_t>(from[3 * i + 1]),
                 static_cast<uint64_t>(from[3 * i + 2])};
  };
  const auto key = [](const std::vector<int64_t>& from, size_t i) {
    return expand_key(static_cast<uint64_t>(from[i]));
  };
  std::vector<SplitMatrix> matrices;
  for (size_t i = 0; i < ps.size(); ++i) {
    if (ps[i].numel() == 0) continue;
    SplitMatrix x{};
    x.w = ps[i].mutable_data_ptr();
    x.g = grads[i].const_data_ptr();
    x.index = static_cast<const int32_t*>(indices[i].const_data_ptr());
    x.low = kind.low ? static_cast<int16_t*>(lows[i].mutable_data_ptr()) : nullptr;
    x.m = exp_avgs[i].mutable_data_ptr();
    x.members = shapes[3 * i];
    x.rows = shapes[3 * i + 1];
    x.columns = shapes[3 * i + 2];
    x.kept = indices[i].numel() / x.members;
    x.place = kind.random ? place(places, i) : Place{0, UINT64_MAX, 0};
    if (kind.random) x.key = key(keys, i);
    if (kind.moments != SplitMoments::GIVEN) {
      x.v = exp_avg_sqs[i].mutable_data_ptr();
      x.bias = {static_cast<float>(biases[2 * i]), static_cast<float>(biases[2 * i + 1])};
    }
    if (kind.moments == SplitMoments::BFLOAT16) {
      x.moments = place(moment_places, i);
      x.first = key(moment_keys, 2 * i);
      x.second = key(moment_keys, 2 * i + 1);
    }
    matrices.push_back(x);
  }
  return matrices;
}

}  // namespace slimstate
