// The arguments of the ops of tangent.h, checked and parameter by parameter.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "tangent.h"

namespace slimstate {

using Tensors = std::vector<torch::stable::Tensor>;

// Where something is kept: in float32, or in 16 bits with what they leave in `low`, or rounded.
struct Kept {
  void* data = nullptr;
  torch::headeronly::ScalarType type = torch::headeronly::ScalarType::Float;
  int16_t* low = nullptr;
  bool random = false;  // rounded by the key, else to nearest
  Key key{};
};

// A parameter as rows; a vector is one row. `m` and `v` have no data where the rule has no such moment.
struct Operand {
  int64_t rows = 0, columns = 0;
  Kept w, g, m, v;
  Place place{};
  float sign = 1, lr = 0;
  bool tested = false, nesterov = false;
  Adam adam;
  Momentum momentum;
};

struct Numbers {
  double lr, decay, rate1, rate2, eps, delta, wd_ratio;
  bool nesterov, layer_view, maximize, stochastic;
};

inline void check_like(
    const char* op, const char* name, const torch::stable::Tensor& x, const torch::stable::Tensor& weight) {
  STD_TORCH_CHECK(x.numel() == weight.numel(), op, ": ", name, " has ", x.numel(), " elements, its weight has ",
                  weight.numel());
  STD_TORCH_CHECK(x.is_contiguous(), op, ": ", name, " must be contiguous");
  STD_TORCH_CHECK(x.is_cuda() == weight.is_cuda() && x.get_device_index() == weight.get_device_index(), op, ": ", name,
                  " must be on its weight's device");
}

inline bool is_kept(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline std::vector<Operand> operands(
    const char* op, const Tensors& weights, const Tensors& grads, const Tensors& firsts, const Tensors& seconds,
    const Tensors& lows, const std::vector<int64_t>& keys, const std::vector<int64_t>& places,
    const std::vector<double>& ages, const Numbers& numbers) {
  using torch::headeronly::ScalarType;
  const size_t count = weights.size();
  STD_TORCH_CHECK(grads.size() == count && ages.size() == count, op, ": one gradient and one age for each weight");
  for (const auto size : {firsts.size(), seconds.size(), lows.size(), keys.size() / 3, places.size() / 3}) {
    STD_TORCH_CHECK(size == 0 || size == count, op, ": a list has ", size, " entries for ", count, " weights");
  }
  STD_TORCH_CHECK(seconds.empty() || firsts.size() == count, op, ": second moments without first ones");
  STD_TORCH_CHECK(keys.size() % 3 == 0 && places.size() % 3 == 0, op, ": keys and places come in threes");

  std::vector<Operand> result;
  result.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const auto& w = weights[i];
    STD_TORCH_CHECK(is_kept(w.scalar_type()), op, ": weights must be float32, bfloat16 or float16");
    STD_TORCH_CHECK(w.is_contiguous(), op, ": weights must be contiguous");
    check_like(op, "a gradient", grads[i], w);
    STD_TORCH_CHECK(grads[i].scalar_type() == w.scalar_type(), op, ": a gradient must have its weight's dtype");
    const int64_t rows = w.dim() < 2 ? 1 : w.size(0), columns = rows == 0 ? 0 : w.numel() / rows;
    Operand x;
    x.rows = rows;
    x.columns = columns;
    x.w = {w.mutable_data_ptr(), w.scalar_type()};
    x.g = {const_cast<void*>(grads[i].const_data_ptr()), w.scalar_type()};
    x.place = {0, INT64_MAX, 0};
    x.sign = numbers.maximize ? -1.0f : 1.0f;
    x.lr = static_cast<float>(numbers.lr);
    x.tested = w.dim() > 1 && numbers.delta > 0;
    x.nesterov = numbers.nesterov;
    if (seconds.empty()) {
      x.momentum = Momentum(numbers.rate1, numbers.rate2);
    } else {
      x.adam = Adam(numbers.rate1, numbers.rate2, numbers.eps, ages[i]);
    }
    if (!places.empty()) {
      STD_TORCH_CHECK(places[3 * i] >= 0 && places[3 * i + 1] > 0 && places[3 * i + 2] >= 0, op,
                      ": a place must have start and pitch >= 0 and width >= 1");
      x.place = {static_cast<uint64_t>(places[3 * i]), static_cast<uint64_t>(places[3 * i + 1]),
                 static_cast<uint64_t>(places[3 * i + 2])};
    }
    const auto key = [&](size_t purpose) { return expand_key(static_cast<uint64_t>(keys[3 * i + purpose])); };
    const auto moment = [&](const Tensors& moments, size_t purpose) {
      if (moments.empty()) return Kept{};
      const auto& y = moments[i];
      check_like(op, "a moment", y, w);
      STD_TORCH_CHECK(is_kept(y.scalar_type()), op, ": moments must be float32, bfloat16 or float16");
      Kept kept{y.mutable_data_ptr(), y.scalar_type()};
      if ((kept.random = !keys.empty())) kept.key = key(purpose);
      return kept;
    };
    x.m = moment(firsts, 1);
    x.v = moment(seconds, 2);
    if (!lows.empty()) {
      check_like(op, "a compensation", lows[i], w);
      STD_TORCH_CHECK(lows[i].scalar_type() == ScalarType::Short, op, ": a compensation must be int16");
      x.w.low = static_cast<int16_t*>(lows[i].mutable_data_ptr());
    }
    if ((x.w.random = numbers.stochastic && !keys.empty())) x.w.key = key(0);
    result.push_back(x);
  }
  return result;
}

// `x` has so many float32 for each row.
inline float* of_rows(const char* op, const torch::stable::Tensor& x, const Operand& operand, int64_t each) {
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float && x.is_contiguous() &&
                      x.numel() == each * operand.rows,
                  op, ": ", each, " float32 for each row, contiguous");
  return static_cast<float*>(x.mutable_data_ptr());
}

inline void check_factors(const char* op, const Tensors& factors, const std::vector<Operand>& all) {
  STD_TORCH_CHECK(factors.empty() || factors.size() == all.size(), op, ": factors of each weight, or none");
}

}  // namespace slimstate
