// The split step: one pass over W and G for a list of matrices. Where rows are kept, threads take neighbouring elements
// and find their row among the indices; entries are rows of one element. Where columns are kept, a block takes a tile:
// what is kept of it goes through shared memory, so that the moments, whose memory runs down the columns, are read and
// written in whole lines too.
#include "split.h"

#include <torch/csrc/stable/library.h>

#include "cuda/launch.cuh"

using Matrix = slimstate::SplitMatrix;
using torch::stable::Tensor;

namespace {

using namespace slimstate::cuda;

constexpr int TILE_ROWS = 32, TILE_COLUMNS = 96;

struct Settings {
  slimstate::SplitNumbers numbers;
  slimstate::Adam adam;
  int64_t outer;
  slimstate::SplitMoments moments;
};

// How many indices are below `value`.
__device__ int64_t below(const int32_t* index, int64_t count, int64_t value) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (index[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

__device__ float outside(const Settings& all, float w, float g) {
  if (all.outer == slimstate::SIGN) return slimstate::outer_step<slimstate::SIGN>(all.numbers, w, g);
  if (all.outer == slimstate::SGD) return slimstate::outer_step<slimstate::SGD>(all.numbers, w, g);
  return slimstate::outer_step<slimstate::NONE>(all.numbers, w, g);
}

template <typename Moment>
__device__ float direction(const Settings& all, const Matrix& x, float g, int64_t at) {
  auto* m = static_cast<typename Moment::Bits*>(x.m) + at;
  auto* v = static_cast<typename Moment::Bits*>(x.v) + at;
  float mean = Moment::widen(*m), square = Moment::widen(*v);
  const float u = slimstate::adam_direction(all.adam, x.bias, g, mean, square);
  const uint64_t index = Moment::random ? x.moments.index(static_cast<uint64_t>(at)) : 0;
  *m = Moment::narrow(mean, Moment::random ? slimstate::random_bits(x.first, index) : 0);
  *v = Moment::narrow(square, Moment::random ? slimstate::random_bits(x.second, index) : 0);
  return u;
}

// The new value of a weight that is kept, by element `at` of its moments, which are updated. All threads agree on how
// they are kept, so that is asked here, and not decided by as many kernels.
__device__ float inside(const Settings& all, const Matrix& x, float w, float g, int64_t at) {
  float u;
  if (all.moments == slimstate::SplitMoments::GIVEN) {
    u = static_cast<const float*>(x.m)[at];
  } else if (all.moments == slimstate::SplitMoments::FLOAT32) {
    u = direction<slimstate::Float32Moment>(all, x, g, at);
  } else {
    u = direction<slimstate::BFloat16Moment>(all, x, g, at);
  }
  return slimstate::inner_step(all.numbers, w, u);
}

template <typename Weight>
__device__ typename Weight::Bits narrow(const Matrix& x, float value, int64_t at, int16_t& rest) {
  const uint32_t random =
      Weight::random ? slimstate::random_bits(x.key, x.place.index(static_cast<uint64_t>(at))) : 0;
  return Weight::narrow(value, random, rest);
}

template <typename Weight>
__global__ void rows(const __grid_constant__ Batch<Matrix> batch, Settings all) {
  using Bits = typename Weight::Bits;
  const auto [x, block] = batch.find(blockIdx.x);
  auto* weights = static_cast<Bits*>(x.w);
  const auto* gradients = static_cast<const Bits*>(x.g);
  const int64_t numel = x.members * x.rows * x.columns;
  const bool wide = aligned(weights, gradients) && (!Weight::low || aligned(x.low));
  for (Packs<4> i(numel, block); i.inside(); i.next()) {
    auto w = load<4>(weights + i.start, i.left(), wide);
    const auto g = load<4>(gradients + i.start, i.left(), wide);
    Pack<int16_t, 4> low{};
    if (Weight::low) low = load<4>(x.low + i.start, i.left(), wide);
    int64_t row = -1, moments = -1;  // where the moments of this row begin, if it is kept
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k >= i.left()) break;
      const int64_t at = i.start + k, own = at / x.columns;
      if (own != row) {
        row = own;
        const int64_t member = row / x.rows, line = row - member * x.rows;
        const int32_t* index = x.index + member * x.kept;
        const int64_t j = below(index, x.kept, line);
        moments = j < x.kept && index[j] == line ? (member * x.kept + j) * x.columns : -1;
      }
      const float old = Weight::widen(w[k], low[k]), gradient = Weight::widen(g[k], 0);
      const float value = moments < 0 ? outside(all, old, gradient)
                                      : inside(all, x, old, gradient, moments + at - row * x.columns);
      w[k] = narrow<Weight>(x, value, at, low[k]);
    }
    store(weights + i.start, w, i.left(), wide);
    if (Weight::low) store(x.low + i.start, low, i.left(), wide);
  }
}

SLIMSTATE_HD int64_t tiles(int64_t length, int64_t own) { return (length + own - 1) / own; }

template <typename Weight>
__global__ void columns(const __grid_constant__ Batch<Matrix> batch, Settings all) {
  using Bits = typename Weight::Bits;
  __shared__ float w[TILE_COLUMNS][TILE_ROWS + 1], g[TILE_COLUMNS][TILE_ROWS + 1];  // of what is kept, by column
  __shared__ int slot[TILE_COLUMNS];                                                  // of each column, or -1
  const auto [x, block] = batch.find(blockIdx.x);
  auto* weights = static_cast<Bits*>(x.w);
  const auto* gradients = static_cast<const Bits*>(x.g);
  const int64_t across = tiles(x.columns, TILE_COLUMNS), down = tiles(x.rows, TILE_ROWS);
  const int64_t member = block / (across * down), row = block / across % down * TILE_ROWS;
  const int64_t column = block % across * TILE_COLUMNS;
  const int height = static_cast<int>(min(int64_t{TILE_ROWS}, x.rows - row));
  const int width = static_cast<int>(min(int64_t{TILE_COLUMNS}, x.columns - column));
  const int32_t* index = x.index + member * x.kept;
  const int64_t from = below(index, x.kept, column);
  const int kept = static_cast<int>(below(index, x.kept, column + width) - from);
  for (int c = threadIdx.x; c < width; c += threads) slot[c] = -1;
  __syncthreads();
  for (int j = threadIdx.x; j < kept; j += threads) slot[index[from + j] - column] = j;
  __syncthreads();
  const int64_t corner = (member * x.rows + row) * x.columns + column;
  for (int i = threadIdx.x; i < height * width; i += threads) {
    const int t = i / width, c = i - t * width;
    const int64_t at = corner + t * x.columns + c;
    int16_t rest = Weight::low ? x.low[at] : 0;
    const float old = Weight::widen(weights[at], rest), gradient = Weight::widen(gradients[at], 0);
    if (const int j = slot[c]; j >= 0) {
      w[j][t] = old;
      g[j][t] = gradient;
    } else {
      weights[at] = narrow<Weight>(x, outside(all, old, gradient), at, rest);
      if (Weight::low) x.low[at] = rest;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kept * height; i += threads) {
    const int j = i / height, t = i - j * height;
    w[j][t] = inside(all, x, w[j][t], g[j][t], (member * x.kept + from + j) * x.rows + row + t);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kept * height; i += threads) {
    const int t = i / kept, j = i - t * kept;
    const int64_t at = corner + t * x.columns + index[from + j] - column;
    int16_t rest = 0;
    weights[at] = narrow<Weight>(x, w[j][t], at, rest);
    if (Weight::low) x.low[at] = rest;
  }
}

using Kernel = void (*)(Batch<Matrix>, Settings);

template <typename Weight>
Kernel either(bool by_column) {
  return by_column ? columns<Weight> : rows<Weight>;
}

Kernel kernel_for(slimstate::SplitKind kind, bool by_column) {
  using torch::headeronly::ScalarType;
  switch (kind.weight) {
    case ScalarType::Float:
      return either<slimstate::Float32Weight>(by_column);
    case ScalarType::BFloat16:
      return kind.low      ? either<slimstate::BFloat16Compensated>(by_column)
             : kind.random ? either<slimstate::BFloat16Stochastic>(by_column)
                           : either<slimstate::BFloat16Nearest>(by_column);
    default:
      return kind.low      ? either<slimstate::HalfCompensated>(by_column)
             : kind.random ? either<slimstate::HalfStochastic>(by_column)
                           : either<slimstate::HalfNearest>(by_column);
  }
}

void split_(std::vector<Tensor> ps, std::vector<Tensor> grads, std::vector<Tensor> indices,
            std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> lows,
            std::vector<int64_t> shapes, std::vector<double> biases, std::vector<int64_t> keys,
            std::vector<int64_t> places, std::vector<int64_t> moment_keys, std::vector<int64_t> moment_places,
            bool columns, int64_t outer, double decay, double step, double outside, double beta1, double beta2,
            double eps) {
  const slimstate::SplitKind kind =
      slimstate::check_split(ps, grads, indices, exp_avgs, exp_avg_sqs, lows, shapes, biases, keys, places,
                             moment_keys, moment_places, columns, outer);
  std::vector<Matrix> by_row, by_column;
  for (Matrix& x : slimstate::split_matrices(kind, ps, grads, indices, exp_avgs, exp_avg_sqs, lows, shapes, biases,
                                             keys, places, moment_keys, moment_places)) {
    const bool entries = columns && x.rows == 1;
    if (entries) std::swap(x.rows, x.columns);
    (columns && !entries ? by_column : by_row).push_back(x);
  }
  const Settings all{{static_cast<float>(decay), static_cast<float>(step), static_cast<float>(outside)},
                     {beta1, beta2, eps},
                     outer,
                     kind.moments};
  launch_each(by_row, [](const Matrix& x) { return blocks_of(x.members * x.rows * x.columns); }, ps[0],
              kernel_for(kind, false), all);
  const auto count = [](const Matrix& x) {
    return x.members * tiles(x.rows, TILE_ROWS) * tiles(x.columns, TILE_COLUMNS);
  };
  launch_each(by_column, count, ps[0], kernel_for(kind, true), all);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CUDA, m) { m.impl("split_", TORCH_BOX(&split_)); }
