#include "residual.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "checks.h"
#include "cuda/launch.cuh"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using namespace slimstate::cuda;

// Rows of W, of G and of the product, `stride` elements apart; numbers along W, apart by 0 or 1 of its rows and columns.
template <typename Gradient>
struct Matrices {
  float* w;
  const Gradient* g;
  const float* product;
  const float* along;
  int64_t rows, columns, w_stride, g_stride, product_stride, along_stride;
  bool each_column;
};

constexpr int pack = 4;
constexpr int64_t across = threads * pack;  // columns of a block of threads

// A block has some columns of a row.
template <typename Rule, typename Gradient>
__global__ void residual(const Matrices<Gradient> x, Rule rule) {
  const int64_t pieces = (x.columns + across - 1) / across, i = blockIdx.x / pieces;
  const int64_t j = blockIdx.x % pieces * across + threadIdx.x * int64_t{pack}, left = x.columns - j;
  if (left <= 0) return;
  float* w = x.w + i * x.w_stride + j;
  const Gradient* g = x.g + i * x.g_stride + j;
  const float* along = x.along + i * x.along_stride + (x.each_column ? j : 0);
  const float* product = Rule::products ? x.product + i * x.product_stride + j : w;
  const bool wide = aligned(w, product) && reinterpret_cast<uintptr_t>(g) % sizeof(Pack<Gradient, pack>) == 0;
  auto values = load<pack>(w, left, wide);
  const auto gradients = load<pack>(g, left, wide);
  const auto products = Rule::products ? load<pack>(product, left, wide) : values;
#pragma unroll
  for (int k = 0; k < pack; ++k) {
    const float number = along[x.each_column && k < left ? k : 0];
    values[k] = rule(values[k], static_cast<float>(gradients[k]), products[k], number);
  }
  store(w, values, left, wide);
}

template <typename Rule, typename Gradient>
void start(const Tensor& w, const Tensor& g, const Tensor& product, const Tensor& along, Rule rule) {
  const Matrices<Gradient> x{static_cast<float*>(w.mutable_data_ptr()),
                             static_cast<const Gradient*>(g.const_data_ptr()),
                             static_cast<const float*>(product.const_data_ptr()),
                             static_cast<const float*>(along.const_data_ptr()),
                             w.size(0),
                             w.size(1),
                             w.stride(0),
                             g.stride(0),
                             product.stride(0),
                             along.size(0) > 1 ? along.stride(0) : 0,
                             along.size(1) > 1};
  launch(w, x.rows * blocks_of(x.columns, across), residual<Rule, Gradient>, x, rule);
}

template <typename Rule>
void all(const Tensor& w, const Tensor& g, const Tensor& product, const Tensor& along, Rule rule) {
  switch (g.scalar_type()) {
    case ScalarType::BFloat16:
      return start<Rule, torch::headeronly::BFloat16>(w, g, product, along, rule);
    case ScalarType::Half:
      return start<Rule, torch::headeronly::Half>(w, g, product, along, rule);
    default:
      return start<Rule, float>(w, g, product, along, rule);
  }
}

void sign_residual_(Tensor w, Tensor g, Tensor product, Tensor limit, double beta, double step) {
  slimstate::check_residual("sign_residual_", w, g, limit);
  slimstate::check_product(w, product);
  all(w, g, product, limit, slimstate::SignResidual{static_cast<float>(beta), static_cast<float>(step)});
}

void scaled_residual_(Tensor w, Tensor g, Tensor factor, double beta) {
  slimstate::check_residual("scaled_residual_", w, g, factor);
  all(w, g, w, factor, slimstate::ScaledResidual{static_cast<float>(beta)});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CUDA, m) {
  m.impl("sign_residual_", TORCH_BOX(&sign_residual_));
  m.impl("scaled_residual_", TORCH_BOX(&scaled_residual_));
}
