// The Walsh-Hadamard transform of the columns of M. A block of threads has a tile in shared memory, some columns cut to
// one power of two; the first butterflies take the matrix as it comes into registers, and what the last ones leave
// there is measured or written to the weight. Neighbouring threads have neighbours in memory, whichever way M lies.
#include "hadamard.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "cuda/launch.cuh"
#include "weights.h"

using slimstate::butterflies;
using slimstate::HadamardBlock;
using torch::stable::Tensor;

namespace {

using namespace slimstate::cuda;

constexpr int tile_bits = 13, tile_size = 1 << tile_bits;  // 32 KiB

// M (d x k) in memory: element (i, c) is p[i * rows + c * columns], and one of the strides is 1.
template <typename T>
struct Matrix {
  T* p;
  int64_t d, k, rows, columns;

  __device__ bool down() const { return columns != 1; }  // whether it is the columns that are contiguous
};

template <typename T>
Matrix<T> matrix(const Tensor& m, T* p) {
  return {p, m.size(0), m.size(1), m.stride(0), m.stride(1)};
}

// One power of two of d.
struct Part {
  HadamardBlock block;
  int64_t chunks;  // of its tiles, each of which a block of threads measures
  float* sums;     // (chunks, size)
};

int64_t tiles(int bits, int64_t k) { return blocks_of(k, tile_size >> bits); }

std::vector<Part> parts(int64_t d) {
  STD_TORCH_CHECK(d < 2 * tile_size, "hadamard: CUDA kernels take at most ", 2 * tile_size - 1, " rows, got ", d);
  std::vector<Part> all;
  slimstate::for_each_block(d, [&](HadamardBlock block) { all.push_back({block, 0, nullptr}); });
  return all;
}

// ------------------------------------------------------------------------------------------------------- sweeps

// Where float x = row * columns + column of a tile lies. Threads of a warp that are 1, 8 or any number of columns apart
// meet in no bank of the shared memory.
__device__ __forceinline__ int at(int x) {
  const int line = x >> 5;
  return x ^ ((line & 7) | ((line >> 1 ^ line >> 3) & 3) << 3);
}

// The sweeps over 2^bits rows: the first one, between neighbours, takes up to 2^3 rows, and so do the others.
struct Sweeps {
  int bits, first, last;

  __device__ explicit Sweeps(int bits)
      : bits(bits), first(min(bits, 3)), last(bits > 3 ? (bits - 4) % 3 + 1 : 0) {}
  __device__ int last_step() const { return bits - last; }
};

template <int R>
struct Radix {
  static constexpr int bits = R == 8 ? 3 : R == 4 ? 2 : R == 2 ? 1 : 0;
  static constexpr int groups = tile_size / R / threads;  // of R rows of a column, for each thread
};

template <typename F>
__device__ __forceinline__ void with_radix(int bits, const F& f) {
  if (bits == 3) f(Radix<8>{});
  if (bits == 2) f(Radix<4>{});
  if (bits == 1) f(Radix<2>{});
  if (bits == 0) f(Radix<1>{});
}

// Group number g of this thread: its rows are row, row + 2^step, ...
struct Group {
  int row, column;

  __device__ __forceinline__ Group(int g, int radix, int bits, int step, bool down) {
    const int i = g * threads + static_cast<int>(threadIdx.x), across = tile_bits - bits, along = bits - radix;
    const int group = down ? i & ((1 << along) - 1) : i >> across;
    column = down ? i >> along : i & ((1 << across) - 1);
    row = (group >> step << (step + radix)) | (group & ((1 << step) - 1));
  }
  __device__ __forceinline__ int place(int j, int bits, int step) const {
    return at(((row + (j << step)) << (tile_bits - bits)) | column);
  }
};

template <int R>
__device__ __forceinline__ void sweep(float* tile, int bits, int step) {
#pragma unroll
  for (int g = 0; g < Radix<R>::groups; ++g) {
    const Group own(g, Radix<R>::bits, bits, step, false);
    float x[R];
#pragma unroll
    for (int j = 0; j < R; ++j) x[j] = tile[own.place(j, bits, step)];
    butterflies<R>(x);
#pragma unroll
    for (int j = 0; j < R; ++j) tile[own.place(j, bits, step)] = x[j];
  }
}

// The sweeps between the first and the last.
__device__ __forceinline__ void middle(float* tile, const Sweeps& sweeps) {
  __syncthreads();
  for (int step = sweeps.first; step < sweeps.last_step(); step += 3) {
    sweep<8>(tile, sweeps.bits, step);
    __syncthreads();
  }
}

// The last sweep, whose results go to f(group, number of the thread's group, the R of them).
template <bool unrolled, typename F>
__device__ __forceinline__ void finish(const float* tile, const Sweeps& sweeps, bool down, const F& f) {
  with_radix(sweeps.last, [&]<int R>(Radix<R>) {
    constexpr int copies = unrolled ? Radix<R>::groups : 1;
#pragma unroll copies
    for (int g = 0; g < Radix<R>::groups; ++g) {
      const Group own(g, Radix<R>::bits, sweeps.bits, sweeps.last_step(), down);
      float x[R];
#pragma unroll
      for (int j = 0; j < R; ++j) x[j] = tile[own.place(j, sweeps.bits, sweeps.last_step())];
      butterflies<R>(x);
      f(own, g, x, Radix<R>{});
    }
  });
}

// The columns from `first` on, after the first sweep, in the tile. Those past the end are zeros. Gives max|M|.
__device__ __forceinline__ float read(
    float* tile, const Matrix<const float>& m, const HadamardBlock& block, int64_t first, float factor) {
  const Sweeps sweeps(block.bits);
  const bool wide = m.rows == 1 && m.columns % 4 == 0 && aligned(m.p);
  float largest = 0;
  with_radix(sweeps.first, [&]<int R>(Radix<R>) {
#pragma unroll
    for (int g = 0; g < Radix<R>::groups; ++g) {
      const Group own(g, Radix<R>::bits, block.bits, 0, m.down());
      const bool inside = first + own.column < m.k;
      const float* p = m.p + (block.start + own.row) * m.rows + (first + own.column) * m.columns;
      float x[R];
      if constexpr (R == 8) {
        if (wide && inside) {
          const auto low = load<4>(p, 4, true), high = load<4>(p + 4, 4, true);
#pragma unroll
          for (int j = 0; j < 4; ++j) x[j] = low[j], x[j + 4] = high[j];
        }
      }
      if (R < 8 || !wide || !inside) {
#pragma unroll
        for (int j = 0; j < R; ++j) x[j] = inside ? p[j * m.rows] : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < R; ++j) {
        largest = fmaxf(largest, fabsf(x[j]));  // NaN is passed over
        x[j] *= factor;
      }
      butterflies<R>(x);
#pragma unroll
      for (int j = 0; j < R; ++j) tile[own.place(j, block.bits, 0)] = x[j];
    }
  });
  return largest;
}

// ------------------------------------------------------------------------------------------------------- scores

// What M is multiplied by, nullptr for 1; for a second pass what `decide` found, 0 where there is none to make.
struct Decision {
  const float* scale;
  bool again;

  __device__ bool idle() const { return again && *scale == 0; }
};

// Sums over the columns of some tiles, each thread's own in registers until the end.
__global__ void measure(const __grid_constant__ Batch<Part> batch, Matrix<const float> m, int64_t norm, Decision how,
                        float* largest) {
  __shared__ float tile[tile_size];
  if (how.idle()) return;
  const auto [part, chunk] = batch.find(blockIdx.x);
  const int bits = part.block.bits, across = tile_bits - bits;
  const Sweeps sweeps(bits);
  const float scale = how.scale == nullptr ? 1.0f : *how.scale;
  float sums[tile_size / threads] = {}, most = 0;
  for (int64_t column = chunk << across; column < m.k; column += part.chunks << across) {
    most = fmaxf(most, read(tile, m, part.block, column, scale));
    middle(tile, sweeps);
    finish<true>(tile, sweeps, false, [&]<int R>(const Group&, int g, const float(&x)[R], Radix<R>) {
#pragma unroll
      for (int j = 0; j < R; ++j) sums[g * R + j] += norm == 1 ? fabsf(x[j]) : x[j] * x[j];
    });
    __syncthreads();
  }
  with_radix(sweeps.last, [&]<int R>(Radix<R>) {
#pragma unroll
    for (int g = 0; g < Radix<R>::groups; ++g) {
      const Group own(g, Radix<R>::bits, bits, sweeps.last_step(), false);
#pragma unroll
      for (int j = 0; j < R; ++j) tile[own.place(j, bits, sweeps.last_step())] = sums[g * R + j];
    }
  });
  for (int half = across - 1; half >= 0; --half) {  // halves of the columns are added
    __syncthreads();
    for (int i = threadIdx.x; i < 1 << (bits + half); i += threads) {
      const int x = i >> half << across | (i & ((1 << half) - 1));
      tile[at(x)] += tile[at(x + (1 << half))];
    }
  }
  __syncthreads();
  float* out = part.sums + chunk * part.block.size;
  for (int row = threadIdx.x; row < part.block.size; row += threads) out[row] = tile[at(row << across)];
  most = block_reduce(most, 0.0f, Max());
  if (threadIdx.x == 0) largest[blockIdx.x] = most;
}

// A block for 32 rows, whose warps share the chunks.
__global__ void add_chunks(const __grid_constant__ Batch<Part> batch, int64_t norm, Decision how, float* scores) {
  __shared__ float partial[threads / 32][32];
  if (how.idle()) return;
  const auto [part, rows] = batch.find(blockIdx.x);
  const HadamardBlock& block = part.block;
  const int64_t row = rows * 32 + threadIdx.x % 32;
  float sum = 0;
  for (int64_t i = threadIdx.x / 32; i < part.chunks && row < block.size; i += threads / 32) {
    sum += part.sums[i * block.size + row];
  }
  partial[threadIdx.x / 32][threadIdx.x % 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || row >= block.size) return;
  for (int i = 1; i < threads / 32; ++i) sum += partial[i][threadIdx.x];
  const float factor = block.before() * block.after();
  scores[block.start + row] = sum * (norm == 1 ? factor : 1.0f / static_cast<float>(block.size));
}

// The power of two that takes max|M| into [1/2, 1), or near it. What is not finite stays so, whatever it is.
__device__ float own_scale(float largest) {
  const auto field = static_cast<int>(slimstate::float_bits(largest) >> 23);
  if (largest == 0 || field == 255) return 1.0f;
  return slimstate::bits_float(static_cast<uint32_t>(min(max(126 - field, -126), 126) + 127) << 23);
}

// One block: whether nothing was lost above or below the range of float. Sums of magnitudes lose nothing below.
__global__ void decide(const float* scores, int64_t d, int64_t norm, const float* largest, int64_t blocks,
                       float* scale) {
  float total = 0, below = 0, most = 0;
  for (int64_t i = threadIdx.x; i < d; i += threads) {
    total += scores[i];
    below += scores[i] > 0x1p-80f || (norm == 1 && scores[i] == 0) ? 0.0f : 1.0f;
  }
  for (int64_t i = threadIdx.x; i < blocks; i += threads) most = fmaxf(most, largest[i]);
  total = block_reduce(total, 0.0f, Sum());
  below = block_reduce(below, 0.0f, Sum());
  most = block_reduce(most, 0.0f, Max());
  if (threadIdx.x == 0) *scale = total <= 3.4028234664e38f && below == 0 ? 0.0f : own_scale(most);
}

void hadamard_scores_(Tensor scores, Tensor m, std::optional<Tensor> scale, int64_t norm) {
  slimstate::check_hadamard_scores(scores, m, scale, norm);
  const auto from = matrix(m, static_cast<const float*>(m.const_data_ptr()));
  std::vector<Part> all = parts(from.d);
  int64_t blocks = 0, sums = 0;
  for (Part& part : all) {
    // Enough blocks for a device, and at most 8 MiB of sums.
    part.chunks = std::min(tiles(part.block.bits, from.k), std::min<int64_t>(512, (1 << 21) >> part.block.bits));
    blocks += part.chunks;
    sums += part.chunks * part.block.size;
  }
  const Tensor memory = torch::stable::new_empty(m, {1 + blocks + sums});
  auto* decision = static_cast<float*>(memory.mutable_data_ptr());
  float *largest = decision + 1, *next = largest + blocks, *out = static_cast<float*>(scores.mutable_data_ptr());
  for (Part& part : all) {
    part.sums = next;
    next += part.chunks * part.block.size;
  }
  const auto pass = [&](const Decision& how) {
    launch_each(all, [](const Part& part) { return part.chunks; }, m, measure, from, norm, how, largest);
    launch_each(all, [](const Part& part) { return blocks_of(part.block.size, 32); }, m, add_chunks, norm, how, out);
  };
  pass({scale.has_value() ? static_cast<const float*>(scale->const_data_ptr()) : nullptr, false});
  if (scale.has_value() || from.d == 0) return;
  launch(m, 1, decide, out, from.d, norm, largest, blocks, decision);
  pass({decision, true});
}

// ------------------------------------------------------------------------------------------------ some rows of it

// Which of the sorted indices are in a block. They are not checked: that would wait for the device.
struct Chosen {
  const int32_t* index;
  int64_t begin, end;

  __device__ Chosen(const int32_t* index, int64_t rank, const HadamardBlock& block)
      : index(index), begin(below(rank, block.start)), end(below(rank, block.start + block.size)) {}
  __device__ int64_t below(int64_t rank, int64_t value) const {
    int64_t low = 0, high = rank;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (index[middle] < value) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  // Calls f with all j, the row of the tile that is number j, and columns that are inside.
  template <typename F>
  __device__ __forceinline__ void each(const HadamardBlock& block, int64_t first, int64_t k, const F& f) const {
    const int across = tile_bits - block.bits;
    for (int64_t i = threadIdx.x; i < (end - begin) << across; i += threads) {
      const int64_t j = begin + (i >> across), row = index[j] - block.start;
      const int column = static_cast<int>(i) & ((1 << across) - 1);
      if (first + column < k && row >= 0 && row < block.size) {
        f(j, first + column, at(static_cast<int>(row) << across | column));
      }
    }
  }
};

__global__ void down(const __grid_constant__ Batch<Part> batch, Matrix<const float> m, float* r, const int32_t* index,
                     int64_t rank) {
  __shared__ float tile[tile_size];
  const auto [part, number] = batch.find(blockIdx.x);
  const HadamardBlock& block = part.block;
  const Chosen chosen(index, rank, block);
  if (chosen.begin == chosen.end) return;
  const int64_t first = number << (tile_bits - block.bits);
  const Sweeps sweeps(block.bits);
  read(tile, m, block, first, block.before());
  middle(tile, sweeps);
  with_radix(sweeps.last, [&]<int R>(Radix<R>) { sweep<R>(tile, sweeps.bits, sweeps.last_step()); });
  __syncthreads();
  const float after = block.after();
  chosen.each(block, first, m.k, [&](int64_t j, int64_t c, int place) { r[j * m.k + c] = tile[place] * after; });
}

void hadamard_down_(Tensor r, Tensor m, Tensor index) {
  slimstate::check_hadamard_down(r, m, index);
  const auto from = matrix(m, static_cast<const float*>(m.const_data_ptr()));
  launch_each(parts(from.d), [&](const Part& part) { return tiles(part.block.bits, from.k); }, m, down, from,
              static_cast<float*>(r.mutable_data_ptr()), static_cast<const int32_t*>(index.const_data_ptr()),
              index.numel());
}

// --------------------------------------------------------------------------------------------------- write-back

// What W becomes, and what it is rounded by where it is of low precision.
struct Update {
  const float* u;
  const int32_t* index;
  int64_t rank;
  float alpha, beta;
  slimstate::Key key;
  uint64_t offset;
  slimstate::Place place;
};

template <typename Weight>
__global__ void write_back(
    const __grid_constant__ Batch<Part> batch, Matrix<typename Weight::Bits> w, const Update how) {
  __shared__ float tile[tile_size];
  const auto [part, number] = batch.find(blockIdx.x);
  const HadamardBlock& block = part.block;
  const int64_t start = block.start, first = number << (tile_bits - block.bits);
  const Chosen chosen(how.index, how.rank, block);
  const Sweeps sweeps(block.bits);
  for (int i = threadIdx.x; i < tile_size; i += threads) tile[i] = 0;
  __syncthreads();
  const float before = block.before(), after = block.after();
  chosen.each(block, first, w.k, [&](int64_t j, int64_t c, int place) { tile[place] = how.u[j * w.k + c] * before; });
  __syncthreads();
  with_radix(sweeps.first, [&]<int R>(Radix<R>) { sweep<R>(tile, sweeps.bits, 0); });
  middle(tile, sweeps);
  finish<false>(tile, sweeps, w.down(), [&]<int R>(const Group& own, int, const float(&x)[R], Radix<R>) {
    const int64_t column = first + own.column;
    if (column >= w.k) return;
    typename Weight::Bits* p = w.p + column * w.columns;
#pragma unroll
    for (int j = 0; j < R; ++j) {
      const int64_t row = start + own.row + (int64_t{j} << sweeps.last_step());
      int16_t rest = 0;
      const float y = Weight::widen(p[row * w.rows], rest) * how.beta + x[j] * after * how.alpha;
      const int64_t own_number = w.down() ? column * w.d + row : row * w.k + column;
      const uint64_t index = Weight::random ? how.place.index(how.offset + static_cast<uint64_t>(own_number)) : 0;
      p[row * w.rows] = Weight::narrow(y, Weight::random ? slimstate::random_bits(how.key, index) : 0, rest);
    }
  });
}

template <typename Weight>
void write_all(const Tensor& w, const Update& how) {
  const auto to = matrix(w, static_cast<typename Weight::Bits*>(w.mutable_data_ptr()));
  launch_each(parts(to.d), [&](const Part& part) { return tiles(part.block.bits, to.k); }, w, write_back<Weight>, to,
              how);
}

void hadamard_write_back_(
    Tensor w, Tensor index, Tensor u, double alpha, double beta, bool random, int64_t key, int64_t offset,
    int64_t start, int64_t width, int64_t pitch) {
  using torch::headeronly::ScalarType;
  slimstate::check_hadamard_write_back(w, index, u, width);
  const Update how{static_cast<const float*>(u.const_data_ptr()),
                   static_cast<const int32_t*>(index.const_data_ptr()),
                   index.numel(),
                   static_cast<float>(alpha),
                   static_cast<float>(beta),
                   slimstate::expand_key(static_cast<uint64_t>(key)),
                   static_cast<uint64_t>(offset),
                   {static_cast<uint64_t>(start), static_cast<uint64_t>(width), static_cast<uint64_t>(pitch)}};
  if (w.scalar_type() == ScalarType::Float) {
    write_all<slimstate::Float32Weight>(w, how);
  } else if (w.scalar_type() == ScalarType::BFloat16) {
    (random ? write_all<slimstate::BFloat16Stochastic> : write_all<slimstate::BFloat16Nearest>)(w, how);
  } else {
    (random ? write_all<slimstate::HalfStochastic> : write_all<slimstate::HalfNearest>)(w, how);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CUDA, m) {
  m.impl("hadamard_scores_", TORCH_BOX(&hadamard_scores_));
  m.impl("hadamard_down_", TORCH_BOX(&hadamard_down_));
  m.impl("hadamard_write_back_", TORCH_BOX(&hadamard_write_back_));
}
