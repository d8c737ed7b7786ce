// What a kernel requires of its tensors, on every device.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
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
  const bool rows = w.stride(0) == w.size(1) && w.stride(1) == 1, columns = w.stride(0) == 1 && w.stride(1) == w.size(0);
  STD_TORCH_CHECK(!low || rows || columns, "hadamard_write_back_: w of low precision must have no gaps");
  STD_TORCH_CHECK(width > 0, "hadamard_write_back_: width must be >= 1, got ", width);
}

inline void check_hadamard_adam(
    const std::vector<torch::stable::Tensor>& ws, const std::vector<torch::stable::Tensor>& gs,
    const std::vector<torch::stable::Tensor>& exp_avgs, const std::vector<torch::stable::Tensor>& exp_avg_sqs,
    const std::vector<torch::stable::Tensor>& ages, const std::vector<torch::stable::Tensor>& indices, int64_t norm) {
  using torch::headeronly::ScalarType;
  constexpr const char* op = "hadamard_adam_";
  const size_t count = ws.size();
  STD_TORCH_CHECK(gs.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
                      ages.size() == count && indices.size() == count,
                  op, ": the lists must be of one length");
  STD_TORCH_CHECK(norm >= 0 && norm <= 2, op, ": norm must be 0, 1 or 2, got ", norm);
  for (size_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(ws[i].scalar_type() == ScalarType::Float && gs[i].scalar_type() == ScalarType::Float, op,
                    ": W and G must be float32");
    check_hadamard_index(op, indices[i], ws[i], exp_avgs[i]);
    check_hadamard_index(op, ages[i], gs[i], exp_avg_sqs[i]);
    STD_TORCH_CHECK(ws[i].size(0) == gs[i].size(0) && ws[i].size(1) == gs[i].size(1) &&
                        ages[i].numel() == indices[i].numel() && indices[i].numel() <= ws[i].size(0),
                    op, ": shapes do not fit");
    STD_TORCH_CHECK(on_one_device(ws[i], gs[i]), op, ": the tensors must be on one device");
  }
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

// Dynamic codes are uint8, companded ones int8.
inline bool is_companded(const torch::stable::Tensor& codes) {
  return codes.scalar_type() == torch::headeronly::ScalarType::Char;
}

enum class Moments { FLOAT32, BFLOAT16, CODES, COMPANDED };

inline bool are_codes(Moments kept) { return kept == Moments::CODES || kept == Moments::COMPANDED; }

// How the moments of a list are kept.
inline Moments check_directions(const std::vector<torch::stable::Tensor>& rs,
                                const std::vector<torch::stable::Tensor>& exp_avgs,
                                const std::vector<torch::stable::Tensor>& exp_avg_sqs,
                                const std::vector<torch::stable::Tensor>& scales,
                                const std::vector<torch::stable::Tensor>& ages, const std::vector<double>& biases,
                                const std::vector<int64_t>& keys, const std::vector<int64_t>& places) {
  using torch::headeronly::ScalarType;
  constexpr const char* op = "adam_directions_";
  const size_t count = rs.size();
  STD_TORCH_CHECK(exp_avgs.size() == count && exp_avg_sqs.size() == count, op, ": as many moments as R needed");
  STD_TORCH_CHECK(scales.empty() || scales.size() == 2 * count, op, ": two scales for each of ", count, " needed");
  STD_TORCH_CHECK(ages.empty() ? biases.size() == 2 * count : ages.size() == count, op,
                  ": either ages of each matrix or two corrections needed");
  const bool companded = count > 0 && is_companded(exp_avgs[0]);
  const ScalarType code = companded ? ScalarType::Char : ScalarType::Byte;
  Moments kept = scales.empty() ? Moments::FLOAT32 : companded ? Moments::COMPANDED : Moments::CODES;
  for (size_t i = 0; i < count; ++i) {
    const torch::stable::Tensor &r = rs[i], &m = exp_avgs[i], &v = exp_avg_sqs[i];
    STD_TORCH_CHECK(r.scalar_type() == ScalarType::Float && r.is_contiguous(), op, ": R must be float32 and contiguous");
    STD_TORCH_CHECK(on_one_device(r, m) && on_one_device(r, v) && on_one_device(r, rs[0]), op,
                    ": all tensors must be on one device");
    if (are_codes(kept)) {
      STD_TORCH_CHECK(r.dim() >= 2, op, ": codes go down the columns of matrices");
      const int64_t length = r.size(r.dim() - 2), inner = r.size(r.dim() - 1);
      const int64_t blocks = (length + 255) / 256 * inner;
      const int64_t needed = length == 0 ? 0 : r.numel() / std::max<int64_t>(1, length * inner) * blocks;
      for (const auto* x : {&m, &v}) {
        STD_TORCH_CHECK(x->scalar_type() == code && x->is_contiguous() && x->numel() == r.numel(), op,
                        ": codes must be uint8 or int8, contiguous and of R's shape");
      }
      for (const auto* x : {&scales[2 * i], &scales[2 * i + 1]}) {
        STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && x->is_contiguous() && x->numel() == needed &&
                            on_one_device(r, *x),
                        op, ": scales must be float32 and contiguous, one for 256 codes of a column");
      }
    } else {
      const Moments own = check_moments(op, m, v, r.numel()) ? Moments::BFLOAT16 : Moments::FLOAT32;
      STD_TORCH_CHECK(i == 0 || own == kept, op, ": all moments must have one dtype");
      kept = own;
    }
    if (!ages.empty()) {
      const int64_t rows = ages[i].numel();
      STD_TORCH_CHECK(ages[i].scalar_type() == ScalarType::Int && ages[i].is_contiguous() && on_one_device(r, ages[i]),
                      op, ": ages must be int32, contiguous and on the device of R");
      STD_TORCH_CHECK(rows == 0 ? r.numel() == 0 : r.numel() % rows == 0, op, ": one age for each row needed");
    }
  }
  if (kept == Moments::BFLOAT16) {
    STD_TORCH_CHECK(keys.size() == 2 * count, op, ": two keys for each matrix needed");
    check_places(op, places, count);
  }
  return kept;
}

enum class SplitMoments { GIVEN, FLOAT32, BFLOAT16 };

// What decides which version of the split step runs.
struct SplitKind {
  torch::headeronly::ScalarType weight;
  bool low, random;
  SplitMoments moments;
};

inline SplitKind check_split(const std::vector<torch::stable::Tensor>& ps,
                             const std::vector<torch::stable::Tensor>& grads,
                             const std::vector<torch::stable::Tensor>& indices,
                             const std::vector<torch::stable::Tensor>& exp_avgs,
                             const std::vector<torch::stable::Tensor>& exp_avg_sqs,
                             const std::vector<torch::stable::Tensor>& lows, const std::vector<int64_t>& shapes,
                             const std::vector<double>& biases, const std::vector<int64_t>& keys,
                             const std::vector<int64_t>& places, const std::vector<int64_t>& moment_keys,
                             const std::vector<int64_t>& moment_places, bool columns, int64_t outer) {
  using torch::headeronly::ScalarType;
  constexpr const char* op = "split_";
  const size_t count = ps.size();
  STD_TORCH_CHECK(grads.size() == count && indices.size() == count && exp_avgs.size() == count &&
                      (exp_avg_sqs.empty() || exp_avg_sqs.size() == count) &&
                      (lows.empty() || lows.size() == count) && shapes.size() == 3 * count,
                  op, ": lists of ", count, " tensors, and three numbers of a shape for each, needed");
  STD_TORCH_CHECK(outer >= 0 && outer <= 2, op, ": outer must be 0, 1 or 2, got ", outer);
  STD_TORCH_CHECK(exp_avg_sqs.empty() || biases.size() == 2 * count, op, ": two corrections for each matrix needed");
  STD_TORCH_CHECK(keys.empty() || keys.size() == count, op, ": a key for each of ", count, " matrices needed");
  SplitKind kind{ps[0].scalar_type(), !lows.empty(), !keys.empty(), SplitMoments::GIVEN};
  STD_TORCH_CHECK(kind.weight == ScalarType::Float || kind.weight == ScalarType::BFloat16 ||
                      kind.weight == ScalarType::Half,
                  op, ": weights must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(!(kind.low && kind.random) && (kind.weight != ScalarType::Float || !(kind.low || kind.random)), op,
                  ": weights in float32 have neither keys nor lows, others have one of them at most");
  if (kind.random) check_places(op, places, count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t members = shapes[3 * i], rows = shapes[3 * i + 1], width = shapes[3 * i + 2];
    const int64_t kept = indices[i].numel() * (columns ? rows : width);
    for (const torch::stable::Tensor* x : {&ps[i], &grads[i]}) {
      STD_TORCH_CHECK(x->scalar_type() == kind.weight && x->is_contiguous() && on_one_device(*x, ps[0]) &&
                          members >= 0 && rows >= 0 && width >= 0 && x->numel() == members * rows * width,
                      op, ": weights and gradients must be contiguous, of one dtype, on one device and of the shape given");
    }
    STD_TORCH_CHECK(indices[i].scalar_type() == ScalarType::Int && indices[i].is_contiguous() &&
                        on_one_device(indices[i], ps[0]),
                    op, ": indices must be int32, contiguous and on the device of the weights");
    STD_TORCH_CHECK(members == 0 || (indices[i].numel() % members == 0 &&
                                     indices[i].numel() / members <= (columns ? width : rows)),
                    op, ": as many indices for each matrix needed, and no more than it has rows or columns");
    STD_TORCH_CHECK(on_one_device(exp_avgs[i], ps[0]), op, ": all tensors must be on one device");
    if (kind.low) {
      STD_TORCH_CHECK(lows[i].scalar_type() == ScalarType::Short && lows[i].is_contiguous() &&
                          lows[i].numel() == ps[i].numel() && on_one_device(lows[i], ps[0]),
                      op, ": lows must be int16, contiguous and of the shape of the weights");
    }
    if (exp_avg_sqs.empty()) {
      STD_TORCH_CHECK(exp_avgs[i].scalar_type() == ScalarType::Float && exp_avgs[i].is_contiguous() &&
                          exp_avgs[i].numel() == kept,
                      op, ": directions must be float32 and contiguous, with a row for each index");
      continue;
    }
    STD_TORCH_CHECK(on_one_device(exp_avg_sqs[i], ps[0]), op, ": all tensors must be on one device");
    const auto own = check_moments(op, exp_avgs[i], exp_avg_sqs[i], kept) ? SplitMoments::BFLOAT16
                                                                         : SplitMoments::FLOAT32;
    STD_TORCH_CHECK(i == 0 || own == kind.moments, op, ": all moments must have one dtype");
    kind.moments = own;
  }
  if (kind.moments == SplitMoments::BFLOAT16) {
    STD_TORCH_CHECK(moment_keys.size() == 2 * count, op, ": two keys for the moments of each matrix needed");
    check_places(op, moment_places, count);
  }
  return kind;
}

inline bool are_rows(const torch::stable::Tensor& x) { return x.dim() == 2 && (x.size(1) < 2 || x.stride(1) == 1); }

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
  STD_TORCH_CHECK(on_one_device(w, g) && on_one_device(w, along), op, ": tensors must be on one device");
}

inline void check_product(const torch::stable::Tensor& w, const torch::stable::Tensor& product) {
  STD_TORCH_CHECK(product.scalar_type() == torch::headeronly::ScalarType::Float && are_rows(product) &&
                      product.size(0) == w.size(0) && product.size(1) == w.size(1) && on_one_device(w, product),
                  "sign_residual_: product must be float32, of w's shape and device, with contiguous rows");
}

}  // namespace slimstate
