// What a kernel requires of its tensors, on every device.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>

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

inline bool on_one_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return a.get_device_index() == b.get_device_index() && a.is_cuda() == b.is_cuda();
}

// A matrix in whose memory rows or columns are contiguous, neither overlapping the other's.
inline bool has_matrix_strides(const torch::stable::Tensor& m) {
  return m.dim() == 2 &&
         ((m.stride(1) == 1 && m.stride(0) >= m.size(1)) || (m.stride(0) == 1 && m.stride(1) >= m.size(0)));
}

inline void check_hadamard_scores(const torch::stable::Tensor& scores, const torch::stable::Tensor& m,
                                  const std::optional<torch::stable::Tensor>& scale, int64_t norm) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(m.scalar_type() == ScalarType::Float && scores.scalar_type() == ScalarType::Float,
                  "hadamard_scores_: scores and m must be float32");
  STD_TORCH_CHECK(has_matrix_strides(m), "hadamard_scores_: m must be a matrix with a stride of 1");
  STD_TORCH_CHECK(scores.dim() == 1 && scores.numel() == m.size(0) && scores.is_contiguous(),
                  "hadamard_scores_: scores must be contiguous, with ", m.size(0), " elements");
  STD_TORCH_CHECK(on_one_device(scores, m), "hadamard_scores_: scores and m must be on one device");
  STD_TORCH_CHECK(!scale.has_value() || (scale->scalar_type() == ScalarType::Float && scale->numel() == 1 &&
                                         on_one_device(*scale, m)),
                  "hadamard_scores_: scale must be one float32 on m's device");
  STD_TORCH_CHECK(norm == 1 || norm == 2, "hadamard_scores_: norm must be 1 or 2, got ", norm);
}

inline void check_hadamard_index(const char* name, const torch::stable::Tensor& index, const torch::stable::Tensor& m,
                                 const torch::stable::Tensor& r) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(has_matrix_strides(m), name, ": the matrix must have a stride of 1");
  STD_TORCH_CHECK(m.size(0) <= std::numeric_limits<int32_t>::max(), name, ": too many rows, ", m.size(0));
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Int && index.dim() == 1 && index.is_contiguous(), name,
                  ": index must be int32 and contiguous, of one dimension");
  STD_TORCH_CHECK(r.scalar_type() == ScalarType::Float && r.dim() == 2 && r.is_contiguous() &&
                      r.size(0) == index.numel() && r.size(1) == m.size(1),
                  name, ": the projected matrix must be float32 and contiguous, of shape (", index.numel(), ", ",
                  m.size(1), ")");
  STD_TORCH_CHECK(on_one_device(index, m) && on_one_device(r, m), name, ": the tensors must be on one device");
}

inline void check_hadamard_down(const torch::stable::Tensor& r, const torch::stable::Tensor& m,
                                const torch::stable::Tensor& index) {
  STD_TORCH_CHECK(m.scalar_type() == torch::headeronly::ScalarType::Float, "hadamard_down_: m must be float32");
  check_hadamard_index("hadamard_down_", index, m, r);
}

inline void check_hadamard_write_back(const torch::stable::Tensor& w, const torch::stable::Tensor& index,
                                      const torch::stable::Tensor& u, int64_t width) {
  using torch::headeronly::ScalarType;
  const bool low = w.scalar_type() == ScalarType::BFloat16 || w.scalar_type() == ScalarType::Half;
  STD_TORCH_CHECK(low || w.scalar_type() == ScalarType::Float,
                  "hadamard_write_back_: w must be float32, bfloat16 or float16");
  check_hadamard_index("hadamard_write_back_", index, w, u);
  STD_TORCH_CHECK(!low || w.stride(0) * w.stride(1) == (w.stride(1) == 1 ? w.size(1) : w.size(0)),
                  "hadamard_write_back_: w of low precision must have no gaps");
  STD_TORCH_CHECK(width > 0, "hadamard_write_back_: width must be >= 1, got ", width);
}

}  // namespace slimstate
