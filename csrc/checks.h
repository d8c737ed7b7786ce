// What a kernel requires of its tensors, on every device.
#pragma once
#include <torch/csrc/stable/tensor.h>

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

}  // namespace slimstate
