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

// How codes are seen: runs along the middle axis, cut into blocks of 256 that share a scale each.
struct CodeRuns {
  int64_t outer = 1, length = 1, inner = 1;
};

inline int64_t blocks_of_run(int64_t length) { return (length + 255) / 256; }

// x are the numbers that codes stand for, read or written.
inline CodeRuns check_codes(const char* op, const torch::stable::Tensor& codes, const torch::stable::Tensor& scale,
                            const torch::stable::Tensor& x, bool columns) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte, op, ": codes must be uint8");
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && x.scalar_type() == ScalarType::Float, op,
                  ": scale and x must be float32");
  STD_TORCH_CHECK(codes.is_contiguous() && scale.is_contiguous() && x.is_contiguous(), op, ": all must be contiguous");
  for (const auto& other : {scale, x}) {
    STD_TORCH_CHECK(codes.get_device_index() == other.get_device_index() && codes.is_cuda() == other.is_cuda(), op,
                    ": all must be on one device");
  }
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

}  // namespace slimstate
