// What a kernel requires of its tensors, on every device.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace slimstate {

inline void check_stochastic_round(const torch::stable::Tensor& out, const torch::stable::Tensor& x, int64_t width) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::BFloat16 || out.scalar_type() == ScalarType::Half,
                  "stochastic_round_: out must be bfloat16 or float16");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "stochastic_round_: x must be float32");
  STD_TORCH_CHECK(out.numel() == x.numel(), "stochastic_round_: out has ", out.numel(), " elements, x has ", x.numel());
  STD_TORCH_CHECK(out.is_contiguous() && x.is_contiguous(), "stochastic_round_: out and x must be contiguous");
  STD_TORCH_CHECK(out.get_device_index() == x.get_device_index() && out.is_cuda() == x.is_cuda(),
                  "stochastic_round_: out and x must be on one device");
  STD_TORCH_CHECK(width > 0, "stochastic_round_: width must be >= 1, got ", width);
}

// Places come as (start, width, pitch) of each tensor.
inline void check_places(const char* op, const std::vector<int64_t>& places, size_t count) {
  STD_TORCH_CHECK(places.size() == 3 * count, op, ": needs three numbers of a place for each of ", count, " tensors, got ",
                  places.size());
  for (size_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(places[3 * i + 1] > 0, op, ": width must be >= 1, got ", places[3 * i + 1]);
  }
}

inline bool on_one_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return a.get_device_index() == b.get_device_index() && a.is_cuda() == b.is_cuda();
}

// Whether two moments of something of `numel` elements are bfloat16; else they are float32.
inline bool check_moments(const char* op, const torch::stable::Tensor& m, const torch::stable::Tensor& v,
                          int64_t numel) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(m.scalar_type() == ScalarType::Float || m.scalar_type() == ScalarType::BFloat16, op,
                  ": moments must be float32 or bfloat16");
  STD_TORCH_CHECK(m.scalar_type() == v.scalar_type(), op, ": both moments must have one dtype");
  STD_TORCH_CHECK(m.numel() == numel && v.numel() == numel, op, ": moments of ", numel, " elements needed, got ",
                  m.numel(), " and ", v.numel());
  STD_TORCH_CHECK(m.is_contiguous() && v.is_contiguous(), op, ": moments must be contiguous");
  return m.scalar_type() == ScalarType::BFloat16;
}

// Whether the moments of a list are bfloat16.
inline bool check_directions(const std::vector<torch::stable::Tensor>& rs,
                             const std::vector<torch::stable::Tensor>& exp_avgs,
                             const std::vector<torch::stable::Tensor>& exp_avg_sqs,
                             const std::vector<torch::stable::Tensor>& ages, const std::vector<double>& biases,
                             const std::vector<int64_t>& keys, const std::vector<int64_t>& places) {
  using torch::headeronly::ScalarType;
  constexpr const char* op = "adam_directions_";
  const size_t count = rs.size();
  STD_TORCH_CHECK(exp_avgs.size() == count && exp_avg_sqs.size() == count, op, ": as many moments as R needed");
  STD_TORCH_CHECK(ages.empty() ? biases.size() == 2 * count : ages.size() == count, op,
                  ": either ages of each matrix or two corrections needed");
  bool low = false;
  for (size_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(rs[i].scalar_type() == ScalarType::Float && rs[i].is_contiguous(), op,
                    ": R must be float32 and contiguous");
    const bool own = check_moments(op, exp_avgs[i], exp_avg_sqs[i], rs[i].numel());
    STD_TORCH_CHECK(i == 0 || own == low, op, ": all moments must have one dtype");
    low = own;
    STD_TORCH_CHECK(on_one_device(rs[i], exp_avgs[i]) && on_one_device(rs[i], exp_avg_sqs[i]) &&
                        on_one_device(rs[i], rs[0]),
                    op, ": all tensors must be on one device");
    if (!ages.empty()) {
      const int64_t rows = ages[i].numel();
      STD_TORCH_CHECK(ages[i].scalar_type() == ScalarType::Int && ages[i].is_contiguous() &&
                          on_one_device(rs[i], ages[i]),
                      op, ": ages must be int32, contiguous and on the device of R");
      STD_TORCH_CHECK(rows == 0 ? rs[i].numel() == 0 : rs[i].numel() % rows == 0, op, ": one age for each row needed");
    }
  }
  if (low) {
    STD_TORCH_CHECK(keys.size() == 2 * count, op, ": two keys for each matrix needed");
    check_places(op, places, count);
  }
  return low;
}

}  // namespace slimstate
