// Low-rank Adam: projected gradients R into their moments, and U over R, for a list of matrices.
#include <torch/csrc/stable/library.h>

#include "adam.h"
#include "adamw.h"
#include "checks.h"
#include "cuda/codes.cuh"
#include "cuda/launch.cuh"

using torch::stable::Tensor;

namespace {

using namespace slimstate::cuda;

struct Matrix {
  float* r;
  void *m, *v;
  const int32_t* ages;  // of each row; null where all have the same
  float *m_scale, *v_scale;  // of codes, which go down `length` rows
  int64_t numel, columns, length;
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

int64_t tiles(const Matrix& x) {
  if (x.numel == 0) return 0;
  return x.numel / (x.length * x.columns) * slimstate::blocks_of_run(x.length) * ((x.columns + 31) / 32);
}

// Codes: a block of threads for 256 rows of 32 columns, every eighth row for each thread, in registers in between.
template <typename Codes>
__global__ void step_codes(const __grid_constant__ Batch<Matrix> batch, Rule rule) {
  using slimstate::code_block;
  using Bits = typename Codes::Bits;
  constexpr int warps = threads / 32, own_rows = code_block / warps;
  __shared__ typename Codes::Room rooms[2];
  __shared__ slimstate::Bias biases[code_block];
  __shared__ float largest[2][warps][32];
  const auto [x, tile] = batch.find(blockIdx.x);
  const int64_t beside = (x.columns + 31) / 32, blocks = (x.length + code_block - 1) / code_block;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = tile % beside * 32 + lane, block = tile / beside, member = block / blocks;
  const int64_t row = member * x.length + block % blocks * code_block;
  const int rows = static_cast<int>(min(code_block, x.length - block % blocks * code_block));
  const Codes m_codes(rooms[0], true), v_codes(rooms[1], false);
  for (int t = threadIdx.x; t < rows; t += threads) {
    biases[t] = x.ages == nullptr ? x.bias
                                  : slimstate::bias_of(x.ages[row + t], rule.beta1, rule.beta2, rule.maximize);
  }
  __syncthreads();
  auto* m = static_cast<Bits*>(x.m);
  auto* v = static_cast<Bits*>(x.v);
  const bool inside = column < x.columns;
  const int64_t at = block * x.columns + column;
  const float m_scale = inside ? x.m_scale[at] : 0, v_scale = inside ? x.v_scale[at] : 0;
  float mean[own_rows], square[own_rows], most_m = 0, most_v = 0;
#pragma unroll
  for (int i = 0; i < own_rows; ++i) {
    const int t = warp + i * warps;
    if (!inside || t >= rows) continue;
    const int64_t element = (row + t) * x.columns + column;
    mean[i] = m_codes.value(m[element]) * m_scale;
    square[i] = v_codes.value(v[element]) * v_scale;
    x.r[element] = slimstate::adam_direction(rule.adam, biases[t], x.r[element], mean[i], square[i]);
    most_m = Max{}(fabsf(mean[i]), most_m);
    most_v = Max{}(fabsf(square[i]), most_v);
  }
  largest[0][warp][lane] = most_m;
  largest[1][warp][lane] = most_v;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < warps; ++i) {
    most_m = Max{}(largest[0][i][lane], most_m);
    most_v = Max{}(largest[1][i][lane], most_v);
  }
  const float new_m = slimstate::scale_of(most_m, Codes::kind(true));
  const float new_v = slimstate::scale_of(most_v, Codes::kind(false));
  if (inside && warp == 0) {
    x.m_scale[at] = new_m;
    x.v_scale[at] = new_v;
  }
  const float m_factor = slimstate::factor_of(new_m, Codes::kind(true));
  const float v_factor = slimstate::factor_of(new_v, Codes::kind(false));
#pragma unroll
  for (int i = 0; i < own_rows; ++i) {
    const int t = warp + i * warps;
    if (!inside || t >= rows) continue;
    const int64_t element = (row + t) * x.columns + column;
    m[element] = m_codes.code(mean[i], m_factor);
    v[element] = v_codes.code(square[i], v_factor);
  }
}

void adam_directions_(std::vector<Tensor> rs, std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                      std::vector<Tensor> scales, std::vector<Tensor> ages, std::vector<double> biases, std::vector<int64_t> keys,
                      std::vector<int64_t> places, double beta1, double beta2, double eps, bool maximize) {
  using slimstate::Moments;
  const Moments kept = slimstate::check_directions(rs, exp_avgs, exp_avg_sqs, scales, ages, biases, keys, places);
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
    if (kept == Moments::BFLOAT16) {
      x.first = slimstate::expand_key(static_cast<uint64_t>(keys[2 * i]));
      x.second = slimstate::expand_key(static_cast<uint64_t>(keys[2 * i + 1]));
      x.place = {static_cast<uint64_t>(places[3 * i]), static_cast<uint64_t>(places[3 * i + 1]),
                 static_cast<uint64_t>(places[3 * i + 2])};
    }
    if (slimstate::are_codes(kept)) {
      x.m_scale = static_cast<float*>(scales[2 * i].mutable_data_ptr());
      x.v_scale = static_cast<float*>(scales[2 * i + 1].mutable_data_ptr());
      x.length = rs[i].size(rs[i].dim() - 2);
      x.columns = rs[i].size(rs[i].dim() - 1);
    }
    matrices.push_back(x);
  }
  const Rule rule{{beta1, beta2, eps}, beta1, beta2, maximize};
  if (slimstate::are_codes(kept)) {
    const auto step = kept == Moments::CODES ? step_codes<Dynamic> : step_codes<Companding>;
    launch_each(matrices, tiles, rs[0], step, rule);
    return;
  }
  launch_each(matrices, [](const Matrix& x) { return blocks_of(x.numel); }, rs[0],
              kept == Moments::BFLOAT16 ? step<slimstate::BFloat16Moment> : step<slimstate::Float32Moment>, rule);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CUDA, m) { m.impl("adam_directions_", TORCH_BOX(&adam_directions_)); }
