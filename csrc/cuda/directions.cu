// Low-rank Adam: projected gradients R into their moments, and U over R, for a list of matrices.
#include <torch/csrc/stable/library.h>

#include "adam.h"
#include "checks.h"
#include "cuda/launch.cuh"

using torch::stable::Tensor;

namespace {

using namespace slimstate::cuda;

struct Matrix {
  float* r;
  void *m, *v;
  const int32_t* ages;  // of each row; null where all have the same
  int64_t numel, columns;
  slimstate::Bias bias;
  slimstate::Key first, second;
  slimstate::Place place;
};

struct Rule {
  slimstate::Adam adam;
  double beta1, beta2;
  bool maximize;
};

template <typename Moment>
__global__ void step(const __grid_constant__ Batch<Matrix> batch, Rule rule) {
  using Bits = typename Moment::Bits;
  __shared__ slimstate::Bias biases[threads];  // of the block's first rows
  const auto [x, block] = batch.find(blockIdx.x);
  auto* m = static_cast<Bits*>(x.m);
  auto* v = static_cast<Bits*>(x.v);
  const int64_t first_row = x.ages == nullptr ? 0 : block * block_elements / x.columns;
  if (x.ages != nullptr) {
    const int64_t row = first_row + threadIdx.x;
    if (row * x.columns < min((block + 1) * block_elements, x.numel)) {
      biases[threadIdx.x] = slimstate::bias_of(x.ages[row], rule.beta1, rule.beta2, rule.maximize);
    }
  }
  __syncthreads();
  const bool wide = aligned(x.r, m, v);
  for (Packs<4> i(x.numel, block); i.inside(); i.next()) {
    auto r = load<4>(x.r + i.start, i.left(), wide);
    auto mean = load<4>(m + i.start, i.left(), wide);
    auto square = load<4>(v + i.start, i.left(), wide);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k >= i.left()) break;
      slimstate::Bias bias = x.bias;
      if (x.ages != nullptr) {
        const int64_t row = (i.start + k) / x.columns - first_row;
        bias = row < threads ? biases[row]
                             : slimstate::bias_of(x.ages[first_row + row], rule.beta1, rule.beta2, rule.maximize);
      }
      float a = Moment::widen(mean[k]), b = Moment::widen(square[k]);
      r[k] = slimstate::adam_direction(rule.adam, bias, r[k], a, b);
      const uint64_t index = Moment::random ? x.place.index(static_cast<uint64_t>(i.start + k)) : 0;
      mean[k] = Moment::narrow(a, Moment::random ? slimstate::random_bits(x.first, index) : 0);
      square[k] = Moment::narrow(b, Moment::random ? slimstate::random_bits(x.second, index) : 0);
    }
    store(x.r + i.start, r, i.left(), wide);
    store(m + i.start, mean, i.left(), wide);
    store(v + i.start, square, i.left(), wide);
  }
}

void adam_directions_(std::vector<Tensor> rs, std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                      std::vector<Tensor> scales, std::vector<Tensor> ages, std::vector<double> biases, std::vector<int64_t> keys,
                      std::vector<int64_t> places, double beta1, double beta2, double eps, bool maximize) {
  const auto kept = slimstate::check_directions(rs, exp_avgs, exp_avg_sqs, scales, ages, biases, keys, places);
  STD_TORCH_CHECK(kept != slimstate::Moments::CODES, "adam_directions_: moments in codes are taken on the CPU only");
  const bool low = kept == slimstate::Moments::BFLOAT16;
  std::vector<Matrix> matrices;
  for (size_t i = 0; i < rs.size(); ++i) {
    Matrix x{};
    x.r = static_cast<float*>(rs[i].mutable_data_ptr());
    x.m = exp_avgs[i].mutable_data_ptr();
    x.v = exp_avg_sqs[i].mutable_data_ptr();
    x.numel = rs[i].numel();
    x.columns = ages.empty() || x.numel == 0 ? 1 : x.numel / ages[i].numel();
    if (ages.empty()) {
      x.bias = {static_cast<float>(biases[2 * i]), static_cast<float>(biases[2 * i + 1])};
    } else {
      x.ages = static_cast<const int32_t*>(ages[i].const_data_ptr());
    }
    if (low) {
      x.first = slimstate::expand_key(static_cast<uint64_t>(keys[2 * i]));
      x.second = slimstate::expand_key(static_cast<uint64_t>(keys[2 * i + 1]));
      x.place = {static_cast<uint64_t>(places[3 * i]), static_cast<uint64_t>(places[3 * i + 1]),
                 static_cast<uint64_t>(places[3 * i + 2])};
    }
    matrices.push_back(x);
  }
  const Rule rule{{beta1, beta2, eps}, beta1, beta2, maximize};
  launch_each(matrices, [](const Matrix& x) { return blocks_of(x.numel); }, rs[0],
              low ? step<slimstate::BFloat16Moment> : step<slimstate::Float32Moment>, rule);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CUDA, m) { m.impl("adam_directions_", TORCH_BOX(&adam_directions_)); }
