#include "residual.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "checks.h"
#include "cpu/clones.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// One row. `along` is a number for each column, or one for all.
template <bool Columns, typename Rule, typename Gradient>
SLIMSTATE_CLONES void row(
    float* __restrict w, const Gradient* __restrict g, const float* __restrict product, const float* __restrict along,
    int64_t columns, Rule rule) {
  const float one = *along;
  for (int64_t j = 0; j < columns; ++j) {
    const float p = Rule::products ? product[j] : 0.0f;
    w[j] = rule(w[j], static_cast<float>(g[j]), p, Columns ? along[j] : one);
  }
}

template <typename Rule, typename Gradient>
void rows(const Tensor& w, const Tensor& g, const Tensor& product, const Tensor& along, Rule rule) {
  const int64_t columns = w.size(1), across = along.size(0) > 1 ? along.stride(0) : 0;
  auto* target = static_cast<float*>(w.mutable_data_ptr());
  const auto* gradient = static_cast<const Gradient*>(g.const_data_ptr());
  const auto* products = static_cast<const float*>(product.const_data_ptr());
  const auto* numbers = static_cast<const float*>(along.const_data_ptr());
  const auto step = along.size(1) > 1 ? row<true, Rule, Gradient> : row<false, Rule, Gradient>;
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, w.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      step(target + i * w.stride(0), gradient + i * g.stride(0), products + i * product.stride(0), numbers + i * across,
           columns, rule);
    }
  });
}

template <typename Rule>
void all(const Tensor& w, const Tensor& g, const Tensor& product, const Tensor& along, Rule rule) {
  if (w.numel() == 0) return;
  switch (g.scalar_type()) {
    case ScalarType::BFloat16:
      return rows<Rule, torch::headeronly::BFloat16>(w, g, product, along, rule);
    case ScalarType::Half:
      return rows<Rule, torch::headeronly::Half>(w, g, product, along, rule);
    default:
      return rows<Rule, float>(w, g, product, along, rule);
  }
}

void sign_residual_(Tensor w, Tensor g, Tensor product, Tensor limit, double beta, double step) {
  slimstate::check_residual("sign_residual_", w, g, limit);
  slimstate::check_product(w, product);
  all(w, g, product, limit, slimstate::SignResidual{static_cast<float>(beta), static_cast<float>(step)});
}

void scaled_residual_(Tensor w, Tensor g, Tensor factor, double beta) {
  slimstate::check_residual("scaled_residual_", w, g, factor);
  all(w, g, factor, factor, slimstate::ScaledResidual{static_cast<float>(beta)});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CPU, m) {
  m.impl("sign_residual_", TORCH_BOX(&sign_residual_));
  m.impl("scaled_residual_", TORCH_BOX(&scaled_residual_));
}
