#include "tangent_operands.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/launch.cuh"
#include "weights.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using namespace slimstate;
using namespace slimstate::cuda;

// A parameter and what its kernels tell each other: dot products of each unit (a row, or 8192 entries of one), of each
// row |w|^2 and the factor, and the decision: which view fired (0 none, 1 channel, 2 layer) and |W|^2.
struct Item {
  Operand x;
  View channel, layer;
  Factor factor;
  float *units = nullptr, *lengths = nullptr, *factors = nullptr, *decision = nullptr;
};

SLIMSTATE_HD int64_t units_of(const Operand& x) { return (x.columns + block_elements - 1) / block_elements; }

constexpr int each = 8;
using Values = Pack<float, each>;

__device__ Values read(const Kept& x, int64_t at, int64_t left) {
  if (x.type == ScalarType::Float) {
    const float* p = static_cast<const float*>(x.data) + at;
    return load<each>(p, left, aligned(p));
  }
  const uint16_t* p = static_cast<const uint16_t*>(x.data) + at;
  const auto codes = load<each>(p, left, aligned(p));
  const bool half = x.type == ScalarType::Half;
  Values values;
  if (x.low != nullptr) {
    const auto lows = load<each>(x.low + at, left, aligned(x.low + at));
#pragma unroll
    for (int k = 0; k < each; ++k) {
      values[k] = half ? HalfCompensated::widen(codes[k], lows[k]) : BFloat16Compensated::widen(codes[k], lows[k]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < each; ++k) values[k] = half ? widen_half(codes[k]) : widen_bfloat16(codes[k]);
  }
  return values;
}

__device__ void write(const Kept& x, const Place& place, int64_t at, int64_t left, const Values& values) {
  if (x.type == ScalarType::Float) {
    float* p = static_cast<float*>(x.data) + at;
    return store(p, values, left, aligned(p));
  }
  const bool half = x.type == ScalarType::Half;
  Pack<uint16_t, each> codes;
  if (x.low != nullptr) {
    Pack<int16_t, each> lows;
#pragma unroll
    for (int k = 0; k < each; ++k) {
      codes[k] = half ? HalfCompensated::narrow(values[k], 0, lows[k])
                      : BFloat16Compensated::narrow(values[k], 0, lows[k]);
    }
    store(x.low + at, lows, left, aligned(x.low + at));
  } else if (x.random) {
#pragma unroll
    for (int k = 0; k < each; ++k) {
      const uint32_t random = random_bits(x.key, place.index(static_cast<uint64_t>(at + k)));
      codes[k] = half ? Half::round(values[k], random) : BFloat16::round(values[k], random);
    }
  } else {
#pragma unroll
    for (int k = 0; k < each; ++k) codes[k] = half ? nearest_half(values[k]) : nearest_bfloat16(values[k]);
  }
  uint16_t* p = static_cast<uint16_t*>(x.data) + at;
  store(p, codes, left, aligned(p));
}

// U of `each` entries; m and v become the moments after this step.
__device__ Values directions(const Operand& x, const Values& g, Values& m, Values& v) {
  Values u;
#pragma unroll
  for (int k = 0; k < each; ++k) {
    const float grad = x.sign * g[k];
    if (x.v.data != nullptr) {
      u[k] = x.nesterov ? x.adam.take<true>(grad, m[k], v[k]) : x.adam.take<false>(grad, m[k], v[k]);
    } else if (x.m.data != nullptr) {
      u[k] = x.nesterov ? x.momentum.take<true>(grad, m[k]) : x.momentum.take<false>(grad, m[k]);
    } else {
      u[k] = x.momentum.take(grad);
    }
  }
  return u;
}

__device__ void read_moments(const Operand& x, int64_t at, int64_t left, Values& m, Values& v) {
  if (x.m.data != nullptr) m = read(x.m, at, left);
  if (x.v.data != nullptr) v = read(x.v, at, left);
}

// A block for each unit: <w, g>, |g|^2, |w|^2 if `test`, then <w, u> if `radial`. If that alone, where a view fired.
template <bool test, bool radial>
__global__ void sum_units(const __grid_constant__ Batch<Item> batch) {
  const auto [item, block] = batch.find(blockIdx.x);
  if (!test && item.decision[0] == 0) return;
  const Operand& x = item.x;
  const int64_t units = units_of(x), row = block / units, begin = row * x.columns + block % units * block_elements;
  const int64_t end = min(begin + block_elements, (row + 1) * x.columns);
  float wg = 0, gg = 0, ww = 0, wu = 0;
  for (int64_t at = begin + threadIdx.x * int64_t{each}; at < end; at += int64_t{threads} * each) {
    const int64_t left = end - at;
    const Values w = read(x.w, at, left), g = read(x.g, at, left);
    if (test) {
#pragma unroll
      for (int k = 0; k < each; ++k) wg += w[k] * g[k], gg += g[k] * g[k], ww += w[k] * w[k];
    }
    if (radial) {
      Values m{}, v{};
      read_moments(x, at, left, m, v);
      const Values u = directions(x, g, m, v);
#pragma unroll
      for (int k = 0; k < each; ++k) wu += k < left ? w[k] * u[k] : 0.0f;
    }
  }
  float* out = item.units + block * (3 * test + radial);
  if (test) {
    wg = block_reduce(wg, 0.0f, Sum());
    gg = block_reduce(gg, 0.0f, Sum());
    ww = block_reduce(ww, 0.0f, Sum());
    if (threadIdx.x == 0) out[0] = wg, out[1] = gg, out[2] = ww;
  }
  if (radial) {
    wu = block_reduce(wu, 0.0f, Sum());
    if (threadIdx.x == 0) out[3 * test] = wu;
  }
}

__device__ float sum_of_row(const Item& item, int64_t row, int count, int which) {
  const int64_t units = units_of(item.x);
  float sum = 0;
  for (int64_t k = 0; k < units; ++k) sum += item.units[(row * units + k) * count + which];
  return sum;
}

// A block for each parameter: which view fires.
__global__ void decide(const __grid_constant__ Batch<Item> batch, bool layer_view) {
  const Item& item = batch.find(blockIdx.x).item;
  float against = 0, seen = 0, wg = 0, gg = 0, ww = 0;
  for (int64_t row = threadIdx.x; row < item.x.rows; row += threads) {
    const Dots dots{sum_of_row(item, row, 3, 0), sum_of_row(item, row, 3, 1), sum_of_row(item, row, 3, 2)};
    item.lengths[row] = dots.ww;
    against += item.channel.orthogonal(dots) ? 0.0f : 1.0f;
    seen += item.channel.seen(dots) ? 1.0f : 0.0f;
    wg += dots.wg, gg += dots.gg, ww += dots.ww;
  }
  against = block_reduce(against, 0.0f, Sum());
  seen = block_reduce(seen, 0.0f, Sum());
  const Dots all{block_reduce(wg, 0.0f, Sum()), block_reduce(gg, 0.0f, Sum()), block_reduce(ww, 0.0f, Sum())};
  if (threadIdx.x == 0) {
    const bool channel = against == 0 && seen > 0;
    const bool layer = !channel && layer_view && item.layer.orthogonal(all) && item.layer.seen(all);
    item.decision[0] = channel ? 1.0f : layer ? 2.0f : 0.0f;
    item.decision[1] = all.ww;
  }
}

// A block for each parameter: what each row is multiplied by.
__global__ void find_factors(const __grid_constant__ Batch<Item> batch) {
  const Item& item = batch.find(blockIdx.x).item;
  const float fired = item.decision[0];
  float all = item.factor.plain;
  if (fired == 2) {
    float wu = 0;
    for (int64_t row = threadIdx.x; row < item.x.rows; row += threads) wu += sum_of_row(item, row, 1, 0);
    wu = block_reduce(wu, 0.0f, Sum());
    all = item.factor.fired(item.layer.multiple(item.decision[1], wu));
  }
  for (int64_t row = threadIdx.x; row < item.x.rows; row += threads) {
    item.factors[row] = fired == 1
                            ? item.factor.fired(item.channel.multiple(item.lengths[row], sum_of_row(item, row, 1, 0)))
                            : all;
  }
}

__global__ void step(const __grid_constant__ Batch<Item> batch) {
  const auto [item, block] = batch.find(blockIdx.x);
  const Operand& x = item.x;
  for (Packs<each> i(x.rows * x.columns, block); i.inside(); i.next()) {
    Values w = read(x.w, i.start, i.left()), m{}, v{};
    const Values g = read(x.g, i.start, i.left());
    read_moments(x, i.start, i.left(), m, v);
    const Values u = directions(x, g, m, v);
    int64_t row = 0, column = 0;
    if (item.factors != nullptr) row = i.start / x.columns, column = i.start % x.columns;
#pragma unroll
    for (int k = 0; k < each; ++k) {
      if (k >= i.left()) break;
      w[k] = w[k] * (item.factors != nullptr ? item.factors[row] : item.factor.plain) - u[k] * x.lr;
      if (++column == x.columns) ++row, column = 0;
    }
    write(x.w, x.place, i.start, i.left(), w);
    if (x.m.data != nullptr) write(x.m, x.place, i.start, i.left(), m);
    if (x.v.data != nullptr) write(x.v, x.place, i.start, i.left(), v);
  }
}

// A block for 256 rows: their sums, as (4, rows).
__global__ void sum_rows(const __grid_constant__ Batch<Item> batch) {
  const auto [item, block] = batch.find(blockIdx.x);
  const int64_t row = block * threads + threadIdx.x;
  if (row >= item.x.rows) return;
  for (int j = 0; j < 4; ++j) item.factors[j * item.x.rows + row] = sum_of_row(item, row, 4, j);
}

int64_t all_units(const Item& item) { return item.x.rows * units_of(item.x); }
int64_t one_block(const Item& item) { return item.x.rows * item.x.columns == 0 ? 0 : 1; }

Tensor scratch(const Tensor& like, int64_t numel) {
  return torch::stable::new_empty(like, {numel}, std::make_optional(ScalarType::Float));
}

void tangent_dots_(
    Tensors dots, Tensors weights, Tensors grads, Tensors firsts, Tensors seconds, Tensors lows,
    std::vector<double> ages, double rate1, double rate2, double eps, bool nesterov, bool maximize) {
  const char* op = "tangent_dots_";
  const Numbers numbers{0, 0, rate1, rate2, eps, 1, 1, nesterov, true, maximize, false};
  const auto all = operands(op, weights, grads, firsts, seconds, lows, {}, {}, ages, numbers);
  STD_TORCH_CHECK(dots.size() == all.size(), op, ": one tensor of dots for each weight");
  if (all.empty()) return;
  std::vector<Item> items(all.size());
  int64_t size = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    items[i].x = all[i];
    items[i].factors = of_rows(op, dots[i], all[i], 4);
    size += 4 * all_units(items[i]);
  }
  const Tensor memory = scratch(weights[0], size);
  float* next = static_cast<float*>(memory.mutable_data_ptr());
  for (Item& item : items) {
    item.units = next;
    next += 4 * all_units(item);
  }
  launch_each(items, all_units, weights[0], sum_units<true, true>);
  launch_each(items, [](const Item& item) { return blocks_of(item.x.rows, threads); }, weights[0], sum_rows);
}

void tangent_step_(
    Tensors weights, Tensors grads, Tensors firsts, Tensors seconds, Tensors lows, Tensors factors,
    std::vector<int64_t> keys, std::vector<int64_t> places, std::vector<double> ages, double lr, double decay,
    double rate1, double rate2, double eps, double delta, double wd_ratio, bool nesterov, bool layer_view,
    bool maximize, bool stochastic) {
  const char* op = "tangent_step_";
  const Numbers numbers{lr,       decay,      rate1,    rate2,     eps, delta, wd_ratio,
                        nesterov, layer_view, maximize, stochastic};
  const auto all = operands(op, weights, grads, firsts, seconds, lows, keys, places, ages, numbers);
  check_factors(op, factors, all);
  if (all.empty()) return;
  std::vector<Item> items(all.size()), tested;
  int64_t size = 0;
  const auto needed = [](const Item& item) { return item.x.rows * (3 * units_of(item.x) + 2) + 2; };
  for (size_t i = 0; i < all.size(); ++i) {
    Item& item = items[i];
    item.x = all[i];
    item.factor = Factor(lr, decay, wd_ratio);
    item.x.tested = item.x.tested && factors.empty() && one_block(item) > 0;
    if (!factors.empty()) item.factors = of_rows(op, factors[i], all[i], 1);
    if (item.x.tested) {
      item.channel = View(eps, delta, static_cast<double>(item.x.columns));
      item.layer = View(eps, delta, static_cast<double>(item.x.rows * item.x.columns));
      size += needed(item);
    }
  }
  const Tensor memory = scratch(weights[0], size);
  float* next = static_cast<float*>(memory.mutable_data_ptr());
  for (Item& item : items) {
    if (!item.x.tested) continue;
    item.units = next;
    item.lengths = item.units + 3 * all_units(item);
    item.factors = item.lengths + item.x.rows;
    item.decision = item.factors + item.x.rows;
    next += needed(item);
    tested.push_back(item);
  }
  launch_each(tested, all_units, weights[0], sum_units<true, false>);
  launch_each(tested, one_block, weights[0], decide, layer_view);
  launch_each(tested, all_units, weights[0], sum_units<false, true>);
  launch_each(tested, one_block, weights[0], find_factors);
  launch_each(items, [](const Item& item) { return blocks_of(item.x.rows * item.x.columns); }, weights[0], step);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CUDA, m) {
  m.impl("tangent_dots_", TORCH_BOX(&tangent_dots_));
  m.impl("tangent_step_", TORCH_BOX(&tangent_step_));
}
