// What the kernels of 8-bit codes and of AdamW on dense parameters require of their tensors, on every device.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "adam.h"
#include "checks.h"
#include "codes.h"

namespace slimstate {

// How codes are seen: runs along the middle axis, cut into blocks of 256 that share a scale each.
struct CodeRuns {
  int64_t outer = 1, length = 1, inner = 1;
};

inline CodeKind code_kind(const torch::stable::Tensor& codes, bool with_sign) {
  return {is_companded(codes), with_sign};
}

inline int64_t blocks_of_run(int64_t length) { return (length + code_block - 1) / code_block; }

// x are the numbers that codes stand for, read or written.
inline CodeRuns check_codes(const char* op, const torch::stable::Tensor& codes, const torch::stable::Tensor& scale,
                            const torch::stable::Tensor& x, bool columns) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte || is_companded(codes), op, ": codes must be uint8 or int8");
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && x.scalar_type() == ScalarType::Float, op,
                  ": scale and x must be float32");
  STD_TORCH_CHECK(codes.is_contiguous() && scale.is_contiguous() && x.is_contiguous(), op, ": all must be contiguous");
  STD_TORCH_CHECK(on_one_device(codes, scale) && on_one_device(codes, x), op, ": all must be on one device");
  const int64_t dims = codes.dim();
  STD_TORCH_CHECK(dims >= (columns ? 2 : 1), op, ": codes have ", dims, " dimensions");
  CodeRuns runs;
  if (columns) {
    runs.length = codes.size(dims - 2);
    runs.inner = codes.size(dims - 1);
    for (int64_t i = 0; i < dims - 2; ++i) runs.outer *= codes.size(i);
  } else if (dims == 1) {
    runs.length = codes.size(0);
  } else {
    runs.outer = codes.size(0);
    for (int64_t i = 1; i < dims; ++i) runs.length *= codes.size(i);
  }
  STD_TORCH_CHECK(x.numel() == codes.numel(), op, ": x has ", x.numel(), " elements, codes have ", codes.numel());
  const int64_t scales = runs.outer * blocks_of_run(runs.length) * runs.inner;
  STD_TORCH_CHECK(scale.numel() == scales, op, ": scale has ", scale.numel(), " elements, not ", scales);
  return runs;
}

// How weights and moments are kept; the stochastic ones need a key.
enum class Format { float32, bfloat16, bfloat16_stochastic, bfloat16_compensated, half, half_stochastic, half_compensated };

// Calls f(Format's functions), one of those in weights.h.
template <typename F>
SLIMSTATE_HD decltype(auto) with_format(Format format, const F& f) {
  switch (format) {
    case Format::bfloat16: return f(BFloat16Nearest{});
    case Format::bfloat16_stochastic: return f(BFloat16Stochastic{});
    case Format::bfloat16_compensated: return f(BFloat16Compensated{});
    case Format::half: return f(HalfNearest{});
    case Format::half_stochastic: return f(HalfStochastic{});
    case Format::half_compensated: return f(HalfCompensated{});
    default: return f(Float32Weight{});
  }
}

// One dense parameter in a step of AdamW.
struct Dense {
  void* p;
  const void* grad;
  void *first, *second;                 // moments: numbers, or codes
  float *first_scale, *second_scale;    // of codes
  int16_t* low;
  int64_t rows, length;                 // runs of codes; else one run of all elements
  Key weight_key, first_key, second_key;
  Place place;
  Bias bias;
};

// What all parameters of a call have in common.
struct DenseKind {
  Format weight, grad, moment;
  bool coded, companded;
};

struct DenseNumbers {
  Adam adam;
  float decay;

  DenseNumbers(double beta1, double beta2, double eps, double decay, bool maximize)
      : adam(beta1, beta2, eps), decay(static_cast<float>(decay)) {
    if (maximize) adam.rest1 = -adam.rest1;  // as -G would
  }
};

struct DenseList {
  DenseKind kind;
  std::vector<Dense> items;
};

// W <- decay W + U, with U of adam.h; the bias has the learning rate in it.
SLIMSTATE_HD float adamw(const DenseNumbers& numbers, Bias bias, float w, float g, float& m, float& v) {
  return w * numbers.decay + adam_direction(numbers.adam, bias, g, m, v);
}

inline DenseList check_adamw(const std::vector<torch::stable::Tensor>& ps,
                             const std::vector<torch::stable::Tensor>& grads,
                             const std::vector<torch::stable::Tensor>& firsts,
                             const std::vector<torch::stable::Tensor>& seconds,
                             const std::vector<torch::stable::Tensor>& scales,
                             const std::vector<torch::stable::Tensor>& lows, const std::vector<double>& biases,
                             const std::vector<int64_t>& keys, const std::vector<int64_t>& places, bool stochastic,
                             double lr) {
  using torch::headeronly::ScalarType;
  constexpr const char* op = "adamw_step_";
  const size_t count = ps.size();
  STD_TORCH_CHECK(grads.size() == count && firsts.size() == count && seconds.size() == count &&
                      (scales.empty() || scales.size() == 2 * count) && (lows.empty() || lows.size() == count) &&
                      biases.size() == 2 * count,
                  op, ": gradients, moments and two corrections for each of ", count, " parameters needed");
  STD_TORCH_CHECK(keys.size() == places.size() && (keys.empty() || keys.size() == 3 * count), op,
                  ": three keys and a place for each of ", count, " parameters needed, or none");
  DenseList list{};
  if (count == 0) return list;
  const auto format = [&](ScalarType dtype, bool random, bool low) {
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
                    ": weights, gradients and moments must be float32, bfloat16 or float16");
    if (dtype == ScalarType::Float) return Format::float32;
    const int nearest = static_cast<int>(dtype == ScalarType::BFloat16 ? Format::bfloat16 : Format::half);
    return static_cast<Format>(nearest + (low ? 2 : random ? 1 : 0));
  };
  const ScalarType weight = ps[0].scalar_type(), grad = grads[0].scalar_type(), moment = firsts[0].scalar_type();
  list.kind.companded = is_companded(firsts[0]);
  list.kind.coded = moment == ScalarType::Byte || list.kind.companded;
  list.kind.weight = format(weight, stochastic, !lows.empty());
  list.kind.grad = format(grad, false, false);
  list.kind.moment = list.kind.coded ? Format::float32 : format(moment, true, false);
  const bool low_moments = !list.kind.coded && list.kind.moment != Format::float32;
  STD_TORCH_CHECK(lows.empty() || weight != ScalarType::Float, op, ": weights in float32 have no lows");
  STD_TORCH_CHECK(!keys.empty() || !(low_moments || (stochastic && weight != ScalarType::Float && lows.empty())), op,
                  ": keys needed");
  STD_TORCH_CHECK(list.kind.coded == !scales.empty(), op, ": two scales for each parameter needed, where M is codes");
  for (size_t i = 0; i < count; ++i) {
    const int64_t numel = ps[i].numel();
    const auto check = [&](const torch::stable::Tensor& x, ScalarType dtype, const char* what) {
      STD_TORCH_CHECK(x.scalar_type() == dtype && x.is_contiguous() && x.numel() == numel && on_one_device(x, ps[0]),
                      op, ": ", what, " ", i, " must be contiguous, of the others' dtype and device and of ", numel,
                      " elements");
    };
    check(ps[i], weight, "parameter");
    check(grads[i], grad, "gradient");
    check(firsts[i], moment, "first moment");
    check(seconds[i], moment, "second moment");
    Dense x{};
    x.p = ps[i].mutable_data_ptr();
    x.grad = grads[i].const_data_ptr();
    x.first = firsts[i].mutable_data_ptr();
    x.second = seconds[i].mutable_data_ptr();
    x.rows = 1;
    x.length = numel;
    if (list.kind.coded) {
      x.rows = ps[i].dim() > 1 ? ps[i].size(0) : 1;
      x.length = x.rows == 0 ? 0 : numel / x.rows;
      for (const auto& scale : {scales[2 * i], scales[2 * i + 1]}) {
        STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && scale.is_contiguous() &&
                            on_one_device(scale, ps[0]) && scale.numel() == x.rows * blocks_of_run(x.length),
                        op, ": scales must be float32, contiguous, and one for each block of 256 in a row");
      }
      x.first_scale = static_cast<float*>(scales[2 * i].mutable_data_ptr());
      x.second_scale = static_cast<float*>(scales[2 * i + 1].mutable_data_ptr());
    }
    if (!lows.empty()) {
      check(lows[i], ScalarType::Short, "low");
      x.low = static_cast<int16_t*>(lows[i].mutable_data_ptr());
    }
    x.place = {0, uint64_t{1} << 63, 0};
    if (!keys.empty()) {
      x.weight_key = expand_key(static_cast<uint64_t>(keys[3 * i]));
      x.first_key = expand_key(static_cast<uint64_t>(keys[3 * i + 1]));
      x.second_key = expand_key(static_cast<uint64_t>(keys[3 * i + 2]));
      STD_TORCH_CHECK(places[3 * i + 1] > 0, op, ": width must be >= 1, got ", places[3 * i + 1]);
      x.place = {static_cast<uint64_t>(places[3 * i]), static_cast<uint64_t>(places[3 * i + 1]),
                 static_cast<uint64_t>(places[3 * i + 2])};
    }
    x.bias = {static_cast<float>(biases[2 * i] * lr), static_cast<float>(biases[2 * i + 1])};
    if (numel > 0) list.items.push_back(x);
  }
  return list;
}

}  // namespace slimstate
