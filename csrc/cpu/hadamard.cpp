#include "hadamard.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <unordered_map>
#include <vector>

#include "adam.h"
#include "checks.h"
#include "cpu/clones.h"
#include "cpu/runs.h"
#include "weights.h"

using slimstate::butterflies;
using slimstate::HadamardBlock;
using torch::stable::Tensor;

#ifdef __GNUC__
#define INLINE __attribute__((always_inline)) inline
#define INDEPENDENT _Pragma("GCC ivdep")
#define UNROLLED _Pragma("GCC unroll 8")
#else
#define INLINE inline
#define INDEPENDENT
#define UNROLLED
#endif

namespace {

// A tile is some columns of M, cut to one power of two: rows of `width` floats, so that all butterflies are between
// whole vectors. Runs of 64 rows are a cache line apart: what is a power of two away shares no set of the cache.
constexpr int64_t width = 16, run = 64, lanes = 8;

INLINE constexpr int64_t at(int64_t row) { return row * width + row / run * width; }

struct Aligned {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Buffer = std::unique_ptr<float[], Aligned>;

Buffer buffer(int64_t numel) {
  return Buffer(static_cast<float*>(::operator new[](static_cast<size_t>(numel) * sizeof(float), std::align_val_t{64})));
}

// Into the second cache: the first is full of the tile.
INLINE void prefetch(const void* p) {
#ifdef __GNUC__
  __builtin_prefetch(p, 0, 2);
#endif
}

// M (d x k) in memory: element (i, c) is p[i * rows + c * columns], and one of the strides is 1.
template <typename T>
struct Matrix {
  T* p;
  int64_t d, k, rows, columns;

  INLINE T* element(int64_t i, int64_t c) const { return p + i * rows + c * columns; }
};

template <typename T>
Matrix<T> matrix(const Tensor& m, T* p) {
  return {p, m.size(0), m.size(1), m.stride(0), m.stride(1)};
}

// -------------------------------------------------------------------------------------------------- four by four

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__aarch64__))
#define HAS_VECTORS
using Four = float __attribute__((vector_size(16)));

INLINE Four load(const float* p) {
  Four x;
  memcpy(&x, p, sizeof x);
  return x;
}

INLINE void store(float* p, Four x) { memcpy(p, &x, sizeof x); }

INLINE void transpose(Four& a, Four& b, Four& c, Four& d) {
  const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
  b = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  c = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
  d = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
}
#endif

// out[c * out_step + r] = factor * in[r * in_step + c] for r < rows, c < columns.
INLINE void transpose_into(
    float* out, int64_t out_step, const float* in, int64_t in_step, int64_t rows, int64_t columns, float factor) {
  int64_t r = 0;
#ifdef HAS_VECTORS
  for (; r + 4 <= rows; r += 4) {
    const float* from = in + r * in_step;
    float* to = out + r;
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4, from += 4, to += 4 * out_step) {
      Four x = load(from), y = load(from + in_step), z = load(from + 2 * in_step), u = load(from + 3 * in_step);
      transpose(x, y, z, u);
      store(to, x * factor);
      store(to + out_step, y * factor);
      store(to + 2 * out_step, z * factor);
      store(to + 3 * out_step, u * factor);
    }
    for (; c < columns; ++c, ++from, to += out_step) {
      for (int64_t j = 0; j < 4; ++j) to[j] = factor * from[j * in_step];
    }
  }
#endif
  for (; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) out[c * out_step + r] = factor * in[r * in_step + c];
  }
}

// ------------------------------------------------------------------------------------------------------- sweeps

// Butterflies between R rows of a tile, `step` floats apart.
template <int R>
INLINE void combine(const float* in, int64_t in_step, float* out, int64_t step, float factor) {
  INDEPENDENT
  for (int64_t c = 0; c < width; ++c) {
    float x[R];
    UNROLLED
    for (int j = 0; j < R; ++j) x[j] = in[j * in_step + c] * factor;
    butterflies<R>(x);
    UNROLLED
    for (int j = 0; j < R; ++j) out[j * step + c] = x[j];
  }
}

template <int R>
INLINE void combine(float* x, int64_t step) {
  INDEPENDENT
  for (int64_t c = 0; c < width; ++c) {
    float y[R];
    UNROLLED
    for (int j = 0; j < R; ++j) y[j] = x[j * step + c];
    butterflies<R>(y);
    UNROLLED
    for (int j = 0; j < R; ++j) x[j * step + c] = y[j];
  }
}

// All R rows that are `step` rows apart, of the rows [first, first + count).
template <int R>
INLINE void sweep(float* tile, int64_t first, int64_t count, int64_t step) {
  for (int64_t group = first; group < first + count; group += R * step) {
    for (int64_t i = group; i < group + step; i += run) {
      for (int64_t j = 0; j < std::min(step, run); ++j) combine<R>(tile + at(i) + j * width, at(step));
    }
  }
}

INLINE void sweep(float* tile, int64_t first, int64_t count, int64_t step, int bits) {
  if (bits == 3) sweep<8>(tile, first, count, step);
  if (bits == 2) sweep<4>(tile, first, count, step);
  if (bits == 1) sweep<2>(tile, first, count, step);
}

// ------------------------------------------------------------------------------------------ into a tile, and back

// A source gives `count` rows of its tile, from row i on, after the butterflies between the first eight, four or two.
template <bool transposed>
struct Columns {
  Matrix<const float> m;
  int64_t start, c, columns;  // the block's first row; which columns
  float factor;

  INLINE void rows(float* tile, int64_t i, int64_t count, int bits) const {
    const float* p = m.element(start + i, c);
    float* x = tile + at(i);
    if (transposed) {
      if (columns < width) std::fill_n(x, count * width, 0.0F);
      for (int64_t r = 0; r < count; r += 16) {  // a cache line of each column
        transpose_columns(x + r * width, p + r, std::min<int64_t>(16, count - r));
      }
    } else if (columns == width && bits == 3) {
      for (int64_t r = 0; r < count; r += 8, p += 8 * m.rows) {
        for (int j = 0; j < 8; ++j) prefetch(p + j * m.rows + width);  // of the next tile
        combine<8>(p, m.rows, x + r * width, width, factor);
      }
      return;
    } else {
      for (int64_t r = 0; r < count; ++r, p += m.rows) {
        for (int64_t j = 0; j < width; ++j) x[r * width + j] = j < columns ? p[j] * factor : 0.0F;
      }
    }
    sweep(tile, i, count, 1, bits);
  }

 private:
  INLINE void transpose_columns(float* x, const float* p, int64_t count) const {
    for (int64_t j = 0; j < columns; j += 4) {
      const int64_t some = std::min<int64_t>(4, columns - j);
      for (int64_t q = j; q < j + some; ++q) prefetch(p + (q + width) * m.columns);
      transpose_into(x + j, width, p + j * m.columns, m.columns, some, count, factor);
    }
  }
};

// Rows U that belong to `index`, zeros elsewhere.
struct Spread {
  HadamardBlock block;
  const int32_t *begin, *end, *origin;
  Matrix<const float> u;
  int64_t c, columns;

  // Rows come in order, and so do the sorted indices.
  INLINE void rows(float* tile, int64_t i, int64_t count, int bits) const {
    std::fill_n(tile + at(i), count * width, 0.0F);
    const auto first = static_cast<int32_t>(block.start + i), last = static_cast<int32_t>(block.start + i + count);
    const float factor = block.before();
    for (const int32_t* j = std::lower_bound(begin, end, first); j != end && *j < last; ++j) {
      const float* from = u.element(j - origin, c);
      float* x = tile + at(*j - block.start);
      if (columns == width) {
        for (int64_t q = 0; q < width; ++q) x[q] = from[q] * factor;
      } else {
        for (int64_t q = 0; q < columns; ++q) x[q] = from[q] * factor;
      }
    }
    sweep(tile, i, count, 1, bits);
  }
};

struct Last {
  int64_t step;
  int bits;
};

INLINE Last last_sweep(int bits) {
  if (bits <= 3) return {1, bits};
  if (bits <= 6) return {8, bits - 3};
  int done = 6;
  while (done + 3 < bits) done += 3;
  return {int64_t{1} << done, bits - done};
}

// All sweeps but the last. Runs are finished while they are in the first cache, then what eight of them make, and so
// on.
template <typename Source>
INLINE void all_but_last(float* tile, int bits, const Source& source) {
  const int64_t size = int64_t{1} << bits;
  if (bits <= 6) {
    source.rows(tile, 0, size, bits <= 3 ? 0 : 3);
    return;
  }
  for (int64_t i = 0; i < size; i += run) {
    source.rows(tile, i, run, 3);
    sweep<8>(tile, i, run, 8);
    const int64_t done = i + run;
    for (int64_t step = run; step * 8 < size && done % (step * 8) == 0; step *= 8) {
      sweep<8>(tile, done - step * 8, step * 8, step);
    }
  }
}

INLINE void finish(float* tile, int bits) {
  const Last last = last_sweep(bits);
  sweep(tile, 0, int64_t{1} << bits, last.step, last.bits);
}

template <typename Source>
INLINE void transform(float* tile, int bits, const Source& source) {
  all_but_last(tile, bits, source);
  finish(tile, bits);
}

// ------------------------------------------------------------------------------------------------------- scores

template <int norm>
INLINE float measure(float x) {
  return norm == 1 ? std::fabs(x) : x * x;
}

// The last sweep, whose results are only measured: lane l of a row's sums takes columns l and l + 8.
template <int norm, int R>
INLINE void measure_last(const float* tile, int64_t step, float* sums) {
  for (int64_t i = 0; i < step; ++i) {
    const float* in = tile + at(i);
    float* out = sums + i * lanes;
    INDEPENDENT
    for (int64_t c = 0; c < lanes; ++c) {
      float x[R], y[R];
      UNROLLED
      for (int j = 0; j < R; ++j) x[j] = in[j * at(step) + c];
      butterflies<R>(x);
      UNROLLED
      for (int j = 0; j < R; ++j) y[j] = out[j * step * lanes + c] + measure<norm>(x[j]);
      UNROLLED
      for (int j = 0; j < R; ++j) x[j] = in[j * at(step) + c + lanes];
      butterflies<R>(x);
      UNROLLED
      for (int j = 0; j < R; ++j) out[j * step * lanes + c] = y[j] + measure<norm>(x[j]);
    }
  }
}

template <int norm, bool transposed>
SLIMSTATE_CLONES void measure_tile(float* tile, int bits, Columns<transposed> columns, float* sums) {
  all_but_last(tile, bits, columns);
  const Last last = last_sweep(bits);
  if (last.bits == 3) measure_last<norm, 8>(tile, last.step, sums);
  if (last.bits == 2) measure_last<norm, 4>(tile, last.step, sums);
  if (last.bits == 1) measure_last<norm, 2>(tile, last.step, sums);
  if (last.bits == 0) measure_last<norm, 1>(tile, last.step, sums);
}

// The norms of the rows of S, squared for norm 2. Columns are summed in chunks of a fixed number, and the chunks in
// order, so that threads do not matter. `kept`, where it is given, gets all tiles before their last sweep.
template <int norm, bool transposed>
void measure_all(const Matrix<const float>& m, float scale, float* scores, float* kept) {
  constexpr int64_t chunk = 16 * width;
  const int64_t chunks = (m.k + chunk - 1) / chunk;
  std::vector<float> parts(static_cast<size_t>(chunks * m.d));
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    int64_t largest = 1;
    while (largest * 2 <= m.d) largest *= 2;
    const Buffer tile = buffer(at(largest)), sums = buffer(largest * lanes);
    for (int64_t i = begin; i < end; ++i) {
      slimstate::for_each_block(m.d, [&](HadamardBlock block) {
        std::fill_n(sums.get(), block.size * lanes, 0.0F);
        for (int64_t c = i * chunk; c < std::min(m.k, (i + 1) * chunk); c += width) {
          const Columns<transposed> columns{m, block.start, c, std::min(width, m.k - c), scale};
          float* own = kept == nullptr ? tile.get() : kept + c / width * at(m.d) + at(block.start);
          measure_tile<norm, transposed>(own, block.bits, columns, sums.get());
        }
        float* part = parts.data() + i * m.d + block.start;
        for (int64_t row = 0; row < block.size; ++row) {
          const float* x = sums.get() + row * lanes;
          part[row] = ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
        }
      });
    }
  });
  slimstate::for_each_block(m.d, [&](HadamardBlock block) {
    const double squared = 1.0 / static_cast<double>(block.size), factor = norm == 1 ? std::sqrt(squared) : squared;
    for (int64_t row = block.start; row < block.start + block.size; ++row) {
      double sum = 0;
      for (int64_t i = 0; i < chunks; ++i) sum += parts[static_cast<size_t>(i * m.d + row)];
      scores[row] = static_cast<float>(sum * factor);
    }
  });
}

// Whether nothing was lost above or below the range of float: then any power of two gives the same choice. Sums of
// magnitudes lose nothing below.
bool in_range(const float* scores, int64_t d, int64_t norm) {
  float total = 0, least = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < d; ++i) {
    total += scores[i];
    least = std::min(least, norm == 1 && scores[i] == 0 ? 1.0F : scores[i]);
  }
  return std::isfinite(total) && least > 0x1p-80F;
}

SLIMSTATE_CLONES float largest_of(const float* p, int64_t numel) {
  float largest = 0;
  for (int64_t i = 0; i < numel; ++i) {
    const float x = std::fabs(p[i]);
    largest = x > largest ? x : largest;
  }
  return largest;
}

// The power of two that takes max|M| into [1/2, 1), or near it. What is not finite stays so, whatever it is.
float own_scale(const Matrix<const float>& m) {
  const bool by_row = m.columns == 1;
  float largest = 0;
  for (int64_t i = 0; i < (by_row ? m.d : m.k); ++i) {
    largest = std::max(largest, largest_of(by_row ? m.element(i, 0) : m.element(0, i), by_row ? m.k : m.d));
  }
  int exponent = 0;
  if (std::isfinite(largest)) std::frexp(largest, &exponent);
  return std::ldexp(1.0F, std::clamp(-exponent, -126, 126));
}

// Whether `kept` holds tiles of S itself, scaled by nothing.
bool measure_all(
    const Matrix<const float>& m, const float* scale, int64_t norm, float* scores, float* kept = nullptr) {
  const bool transposed = m.columns != 1;
  const auto measure = norm == 1 ? (transposed ? measure_all<1, true> : measure_all<1, false>)
                                 : (transposed ? measure_all<2, true> : measure_all<2, false>);
  measure(m, scale == nullptr ? 1.0F : *scale, scores, kept);
  if (scale != nullptr || in_range(scores, m.d, norm)) return kept != nullptr;
  measure(m, own_scale(m), scores, nullptr);
  return false;
}

void hadamard_scores_(Tensor scores, Tensor m, std::optional<Tensor> scale, int64_t norm) {
  slimstate::check_hadamard_scores(scores, m, scale, norm);
  const auto* own = scale.has_value() ? static_cast<const float*>(scale->const_data_ptr()) : nullptr;
  measure_all(matrix(m, static_cast<const float*>(m.const_data_ptr())), own, norm,
              static_cast<float*>(scores.mutable_data_ptr()));
}

// --------------------------------------------------------------------------------------------------------- down

// Indices must be in order, for only then each is found in its block.
void check_order(const Tensor& index, int64_t d) {
  const auto* p = static_cast<const int32_t*>(index.const_data_ptr());
  for (int64_t i = 0; i < index.numel(); ++i) {
    STD_TORCH_CHECK(p[i] >= (i == 0 ? 0 : p[i - 1]) && p[i] < d, "hadamard: indices must be sorted, from 0 to ", d - 1);
  }
}

template <bool transposed>
SLIMSTATE_CLONES void transform_tile(float* tile, HadamardBlock block, Columns<transposed> columns) {
  transform(tile, block.bits, columns);
}

INLINE void zero_rows(float* tile, HadamardBlock block, int32_t begin, int32_t end) {
  for (int64_t i = begin - block.start; i < end - block.start; ++i) std::fill_n(tile + at(i), width, 0.0F);
}

template <bool transposed>
SLIMSTATE_CLONES void down_tile(
    float* tile, HadamardBlock block, Columns<transposed> columns, Matrix<float> r, const int32_t* begin,
    const int32_t* end, const int32_t* origin) {
  transform(tile, block.bits, columns);
  const float factor = block.after();
  for (const int32_t* j = begin; j != end; ++j) {
    const float* x = tile + at(*j - block.start);
    float* out = r.element(j - origin, columns.c);
    if (columns.columns == width) {
      for (int64_t q = 0; q < width; ++q) out[q] = x[q] * factor;
    } else {
      for (int64_t q = 0; q < columns.columns; ++q) out[q] = x[q] * factor;
    }
  }
}

// Calls f with a tile, a block of d, which of the sorted indices are in it, and which columns: for all of them.
template <typename F>
void for_each_tile(int64_t d, int64_t k, const int32_t* index, int64_t rank, const F& f) {
  int64_t largest = 1;
  while (largest * 2 <= d) largest *= 2;
  const int64_t tiles = (k + width - 1) / width, grain = std::max<int64_t>(1, (1 << 15) / (d * width));
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    const Buffer tile = buffer(at(largest));
    slimstate::for_each_block(d, [&](HadamardBlock block) {
      const int32_t* first = std::lower_bound(index, index + rank, static_cast<int32_t>(block.start));
      const int32_t* last = std::lower_bound(first, index + rank, static_cast<int32_t>(block.start + block.size));
      for (int64_t c = begin * width; c < std::min(k, end * width); c += width) {
        f(tile.get(), block, first, last, c, std::min(width, k - c));
      }
    });
  });
}

template <bool transposed>
void down_all(const Matrix<float>& r, const Matrix<const float>& m, const int32_t* index) {
  for_each_tile(m.d, m.k, index, r.d, [&](float* tile, HadamardBlock block, const int32_t* first, const int32_t* last,
                                          int64_t c, int64_t columns) {
    if (first == last) return;
    down_tile<transposed>(tile, block, {m, block.start, c, columns, block.before()}, r, first, last, index);
  });
}

void hadamard_down_(Tensor r, Tensor m, Tensor index) {
  slimstate::check_hadamard_down(r, m, index);
  check_order(index, m.size(0));
  const auto from = matrix(m, static_cast<const float*>(m.const_data_ptr()));
  const auto down = from.columns == 1 ? down_all<false> : down_all<true>;
  down(matrix(r, static_cast<float*>(r.mutable_data_ptr())), from, static_cast<const int32_t*>(index.const_data_ptr()));
}

// --------------------------------------------------------------------------------------------------- write-back

// What W becomes, and what it is rounded by where it is of low precision.
struct Update {
  float alpha, beta;
  slimstate::Key key;
  uint64_t offset;
  slimstate::Place place;
};

// w <- beta w + alpha x for `count` weights that are neighbours in memory, the first of which is number `first` of W.
template <typename Weight>
INLINE void update(
    typename Weight::Bits* w, const float* x, int64_t count, float after, const Update& how, int64_t first) {
  const auto run = [&](int64_t begin, int64_t own, uint64_t index) __attribute__((always_inline)) {
    for (int64_t i = begin; i < begin + own; ++i) {
      int16_t rest = 0;
      const float y = Weight::widen(w[i], rest) * how.beta + x[i] * after * how.alpha;
      const uint64_t place = index + static_cast<uint64_t>(i - begin);
      w[i] = Weight::narrow(y, Weight::random ? slimstate::random_bits(how.key, place) : 0, rest);
    }
  };
  if constexpr (Weight::random) {
    slimstate::stretches(how.place, how.offset + static_cast<uint64_t>(first), count, run);
  } else {
    run(0, count, 0);
  }
}

// Adds the columns of a tile to the weight's.
template <typename Weight, bool transposed>
SLIMSTATE_CLONES void write_tile(const float* tile, HadamardBlock block, int64_t c, int64_t columns,
                                 Matrix<typename Weight::Bits> w, Update how) {
  const float after = block.after();
  if (!transposed) {
    for (int64_t i = 0; i < block.size; ++i) {
      const int64_t row = block.start + i;
      prefetch(w.element(row, c + width));
      update<Weight>(w.element(row, c), tile + at(i), columns, after, how, row * w.k + c);
    }
    return;
  }
  alignas(64) float lines[4 * run];
  for (int64_t i = 0; i < block.size; i += run) {
    const int64_t count = std::min(run, block.size - i), row = block.start + i;
    for (int64_t j = 0; j < columns; j += 4) {
      const int64_t some = std::min<int64_t>(4, columns - j);
      transpose_into(lines, run, tile + at(i) + j, width, count, some, 1.0F);
      for (int64_t q = 0; q < some; ++q) {
        const int64_t column = c + j + q;
        for (int64_t i = 0; i < count; i += 16) prefetch(w.element(row + i, column + width));
        update<Weight>(w.element(row, column), lines + q * run, count, after, how, column * w.d + row);
      }
    }
  }
}

SLIMSTATE_CLONES void spread_tile(float* tile, Spread source) { transform(tile, source.block.bits, source); }

template <typename Weight>
void write_all(const Tensor& w, const Tensor& index, const Tensor& u, const Update& how) {
  const auto to = matrix(w, static_cast<typename Weight::Bits*>(w.mutable_data_ptr()));
  const auto from = matrix(u, static_cast<const float*>(u.const_data_ptr()));
  const auto* origin = static_cast<const int32_t*>(index.const_data_ptr());
  const auto write = to.columns == 1 ? write_tile<Weight, false> : write_tile<Weight, true>;
  for_each_tile(to.d, to.k, origin, index.numel(), [&](float* tile, HadamardBlock block, const int32_t* first,
                                                       const int32_t* last, int64_t c, int64_t columns) {
    spread_tile(tile, {block, first, last, origin, from, c, columns});
    write(tile, block, c, columns, to, how);
  });
}

void hadamard_write_back_(
    Tensor w, Tensor index, Tensor u, double alpha, double beta, bool random, int64_t key, int64_t offset,
    int64_t start, int64_t width, int64_t pitch) {
  using torch::headeronly::ScalarType;
  slimstate::check_hadamard_write_back(w, index, u, width);
  check_order(index, w.size(0));
  const Update how{static_cast<float>(alpha), static_cast<float>(beta),
                   slimstate::expand_key(static_cast<uint64_t>(key)), static_cast<uint64_t>(offset),
                   {static_cast<uint64_t>(start), static_cast<uint64_t>(width), static_cast<uint64_t>(pitch)}};
  if (w.scalar_type() == ScalarType::Float) {
    write_all<slimstate::Float32Weight>(w, index, u, how);
  } else if (w.scalar_type() == ScalarType::BFloat16) {
    (random ? write_all<slimstate::BFloat16Stochastic> : write_all<slimstate::BFloat16Nearest>)(w, index, u, how);
  } else {
    (random ? write_all<slimstate::HalfStochastic> : write_all<slimstate::HalfNearest>)(w, index, u, how);
  }
}

// --------------------------------------------------------------------------------------------------- whole step

// A row of the moments: where its new place is, where it was before (-1: it is new), and its corrections.
struct Row {
  int64_t to, from;
  slimstate::Bias bias;
};

// The rows in an order in which each is read before its place is taken: those that move towards the first from there,
// those that move away from the last, and those that are new, whose places others may have left, at the end. Both lists
// are sorted, so that none of the first two groups crosses the other.
std::vector<Row> carried(const int32_t* old, const int32_t* chosen, int32_t* ages, int64_t rank, bool carry) {
  std::vector<Row> nearer, farther, fresh;
  nearer.reserve(static_cast<size_t>(rank));
  std::vector<int32_t> before(ages, ages + rank);
  for (int64_t i = 0, j = 0; i < rank; ++i) {
    if (carry) {
      while (j < rank && old[j] < chosen[i]) ++j;
    } else {
      j = i;
    }
    const bool kept = !carry || (j < rank && old[j] == chosen[i]);
    ages[i] = (kept ? before[static_cast<size_t>(j)] : 0) + 1;
    (!kept ? fresh : j >= i ? nearer : farther).push_back({i, kept ? j : -1, {}});
  }
  nearer.insert(nearer.end(), farther.rbegin(), farther.rend());
  nearer.insert(nearer.end(), fresh.begin(), fresh.end());
  return nearer;
}

// A whole tile as a source: what it holds already.
struct InPlace {
  INLINE void rows(float* tile, int64_t i, int64_t count, int bits) const { sweep(tile, i, count, 1, bits); }
};

// Up to `width` floats; no call for as many.
INLINE void copy(float* to, const float* from, int64_t count) {
  if (count == width) {
    memcpy(to, from, width * sizeof(float));
  } else {
    std::copy_n(from, count, to);
  }
}

struct Moments {
  Matrix<float> m, v;
  const Row* rows;
  slimstate::Adam adam;
};

// Turns S into the tile of U: Adam's directions in the chosen rows, zeros elsewhere. Rows in [begin, end) of the list.
SLIMSTATE_CLONES void adam_tile(float* tile, const float* scales, const int32_t* chosen, Moments moments, int64_t c,
                                int64_t columns) {
  const int64_t rank = moments.m.d;
  for (const Row* row = moments.rows; row != moments.rows + rank; ++row) {
    float* x = tile + at(chosen[row->to]);
    float *m = moments.m.element(row->to, c), *v = moments.v.element(row->to, c);
    const float *old_m = m + (row->from - row->to) * moments.m.rows, *old_v = v + (row->from - row->to) * moments.v.rows;
    const float after = scales[2 * row->to], before = scales[2 * row->to + 1];
    prefetch(m + width);
    prefetch(v + width);
    const slimstate::Bias bias = row->bias;
    alignas(64) float mean[width] = {}, square[width] = {};
    if (row->from >= 0) {
      copy(mean, old_m, columns);
      copy(square, old_v, columns);
    }
    for (int64_t j = 0; j < width; ++j) {
      x[j] = slimstate::adam_direction(moments.adam, bias, x[j] * after, mean[j], square[j]) * before;
    }
    copy(m, mean, columns);
    copy(v, square, columns);
  }
}

SLIMSTATE_CLONES void inverse_tile(float* tile, HadamardBlock block, const int32_t* begin, const int32_t* end) {
  auto row = static_cast<int32_t>(block.start);
  for (const int32_t* j = begin; j != end; ++j) {
    zero_rows(tile, block, row, *j);
    row = *j + 1;
  }
  zero_rows(tile, block, row, static_cast<int32_t>(block.start + block.size));
  transform(tile, block.bits, InPlace{});
}

// The `rank` largest scores in order of their index, the first of equal ones; `old` where there is nothing to go by.
std::vector<int32_t> leading(const std::vector<float>& scores, const int32_t* old, int64_t rank) {
  float total = 0;
  for (const float score : scores) total += score;
  if (!(total > 0 && std::isfinite(total))) return {old, old + rank};
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](int32_t a, int32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  };
  if (rank < static_cast<int64_t>(order.size())) {
    std::nth_element(order.begin(), order.begin() + rank, order.end(), before);
    order.resize(static_cast<size_t>(rank));
    std::sort(order.begin(), order.end());
  }
  return order;
}

// A small matrix's coefficients are kept between the choice and the step, in a room of 4 MiB that all have in turn.
constexpr int64_t ROOM = 1 << 20;

int64_t tiles_of(const Tensor& w) { return (w.size(1) + width - 1) / width * at(w.size(0)); }

SLIMSTATE_CLONES void finish_tile(float* tile, int bits) { finish(tile, bits); }

void adam_all(const Tensor& w, const Tensor& g, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& ages,
              const Tensor& index, int64_t norm, bool carry, double beta1, double beta2, double eps, bool maximize,
              const Update& how, float* room) {
  const auto to = matrix(w, static_cast<float*>(w.mutable_data_ptr()));
  const auto from = matrix(g, static_cast<const float*>(g.const_data_ptr()));
  auto *old = static_cast<int32_t*>(index.mutable_data_ptr()), *age = static_cast<int32_t*>(ages.mutable_data_ptr());
  const int64_t rank = index.numel(), d = to.d;
  std::vector<int32_t> chosen(old, old + rank);
  const float* kept = nullptr;
  if (norm != 0) {
    std::vector<float> scores(static_cast<size_t>(d), 1.0F);
    if (rank < d && measure_all(from, nullptr, norm, scores.data(), tiles_of(w) <= ROOM ? room : nullptr)) kept = room;
    chosen = leading(scores, old, rank);
  }
  const int32_t* now = chosen.data();

  std::vector<Row> rows = carried(old, now, age, rank, carry);
  std::unordered_map<int32_t, slimstate::Bias> biases;
  for (Row& row : rows) {
    const auto [found, is_new] = biases.try_emplace(age[row.to]);
    if (is_new) found->second = slimstate::bias_of(age[row.to], beta1, beta2, maximize);
    row.bias = found->second;
  }
  std::copy_n(now, rank, old);
  std::vector<float> scales(static_cast<size_t>(2 * rank));
  slimstate::for_each_block(d, [&](HadamardBlock block) {
    for (int64_t i = 0; i < rank; ++i) {
      if (now[i] < block.start || now[i] >= block.start + block.size) continue;
      scales[static_cast<size_t>(2 * i)] = block.after() * (kept == nullptr ? 1.0F : block.before());
      scales[static_cast<size_t>(2 * i + 1)] = block.before();
    }
  });
  const Moments moments{matrix(exp_avg, static_cast<float*>(exp_avg.mutable_data_ptr())),
                        matrix(exp_avg_sq, static_cast<float*>(exp_avg_sq.mutable_data_ptr())), rows.data(),
                        slimstate::Adam(beta1, beta2, eps)};
  const bool columnwise = from.columns != 1;
  const auto write =
      to.columns == 1 ? write_tile<slimstate::Float32Weight, false> : write_tile<slimstate::Float32Weight, true>;
  const int64_t tiles = (to.k + width - 1) / width, grain = std::max<int64_t>(1, (1 << 15) / (d * width));
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t first, int64_t last) {
    const Buffer buffered = buffer(kept == nullptr ? at(d) : 0);
    for (int64_t c = first * width; c < std::min(to.k, last * width); c += width) {
      const int64_t columns = std::min(width, to.k - c);
      float* tile = kept == nullptr ? buffered.get() : room + c / width * at(d);
      slimstate::for_each_block(d, [&](HadamardBlock block) {
        float* part = tile + at(block.start);
        if (kept != nullptr) {
          finish_tile(part, block.bits);
        } else if (columnwise) {
          transform_tile<true>(part, block, {from, block.start, c, columns, block.before()});
        } else {
          transform_tile<false>(part, block, {from, block.start, c, columns, block.before()});
        }
      });
      adam_tile(tile, scales.data(), now, moments, c, columns);
      slimstate::for_each_block(d, [&](HadamardBlock block) {
        const int32_t* begin = std::lower_bound(now, now + rank, static_cast<int32_t>(block.start));
        const int32_t* end = std::lower_bound(begin, now + rank, static_cast<int32_t>(block.start + block.size));
        float* part = tile + at(block.start);
        inverse_tile(part, block, begin, end);
        write(part, block, c, columns, to, how);
      });
    }
  });
}

void hadamard_adam_(std::vector<Tensor> ws, std::vector<Tensor> gs, std::vector<Tensor> exp_avgs,
                    std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> ages, std::vector<Tensor> indices, int64_t norm,
                    bool carry, double alpha, double beta, double beta1, double beta2, double eps, bool maximize) {
  slimstate::check_hadamard_adam(ws, gs, exp_avgs, exp_avg_sqs, ages, indices, norm);
  for (size_t i = 0; i < ws.size(); ++i) check_order(indices[i], ws[i].size(0));
  const Update how{static_cast<float>(alpha), static_cast<float>(beta), {}, 0, {}};
  int64_t most = 0;
  for (const Tensor& w : ws) most = std::max(most, norm != 0 && tiles_of(w) <= ROOM ? tiles_of(w) : 0);
  const Buffer room = buffer(most);
  for (size_t i = 0; i < ws.size(); ++i) {
    adam_all(ws[i], gs[i], exp_avgs[i], exp_avg_sqs[i], ages[i], indices[i], norm, carry, beta1, beta2, eps, maximize,
             how, room.get());
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CPU, m) {
  m.impl("hadamard_scores_", TORCH_BOX(&hadamard_scores_));
  m.impl("hadamard_down_", TORCH_BOX(&hadamard_down_));
  m.impl("hadamard_write_back_", TORCH_BOX(&hadamard_write_back_));
  m.impl("hadamard_adam_", TORCH_BOX(&hadamard_adam_));
}
