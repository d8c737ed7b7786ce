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

inline bool are_rows(const torch::stable::Tensor& x) { return x.dim() == 2 && (x.size(1) < 2 || x.stride(1) == 1); }

inline bool same_device(const torch::stable::Tensor& x, const torch::stable::Tensor& y) {
  return x.get_device_index() == y.get_device_index() && x.is_cuda() == y.is_cuda();
}

inline void check_residual(const char* op, const torch::stable::Tensor& w, const torch::stable::Tensor& g,
                           const torch::stable::Tensor& along) {
  using torch::headeronly::ScalarType;
  const auto dtype = g.scalar_type();
  STD_TORCH_CHECK(w.scalar_type() == ScalarType::Float && along.scalar_type() == ScalarType::Float, op,
                  ": w and what goes along it must be float32");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
                  ": g must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(are_rows(w) && are_rows(g) && are_rows(along), op, ": tensors must be matrices of contiguous rows");
  STD_TORCH_CHECK(w.size(0) == g.size(0) && w.size(1) == g.size(1), op, ": w and g must have one shape");
  STD_TORCH_CHECK((along.size(0) == 1 || along.size(0) == w.size(0)) && (along.size(1) == 1 || along.size(1) == w.size(1)),
                  op, ": what goes along w must have 1 or w's size in each dimension");
  STD_TORCH_CHECK(same_device(w, g) && same_device(w, along), op, ": tensors must be on one device");
}

inline void check_product(const torch::stable::Tensor& w, const torch::stable::Tensor& product) {
  STD_TORCH_CHECK(product.scalar_type() == torch::headeronly::ScalarType::Float && are_rows(product) &&
                      product.size(0) == w.size(0) && product.size(1) == w.size(1) && same_device(w, product),
                  "sign_residual_: product must be float32, of w's shape and device, with contiguous rows");
}

}  // namespace slimstate
