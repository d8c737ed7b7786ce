// The split step: one pass over W and G for a list of matrices. Kept rows are stretches of memory. Of kept columns a
// tile of a few rows is gathered, so that each column of it meets its moments, whose memory runs down the columns, as a
// stretch as well; entries are columns of one long row. What is outside goes first, row by row, as memory likes it: it
// leaves a copy of the rows as they were, and asks for the next ones, since nothing does so while columns are gathered.
#include "split.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/clones.h"
#include "cpu/runs.h"

using slimstate::Key;
using Matrix = slimstate::SplitMatrix;
using torch::stable::Tensor;

namespace {

constexpr int64_t JOB = 1 << 15;          // elements of W
constexpr int64_t TILE_ROWS = 64;         // a few lines of memory in each column of the moments
constexpr int64_t TILE_COLUMNS = 512;     // a tile, and what is gathered of it, stay in the second cache
constexpr int64_t ROW_COLUMNS = 1 << 13;  // of a tile of one row
constexpr int64_t GROUP = 4;              // rows that are gathered together
constexpr int64_t STRETCH = 64;           // elements whose successors are asked for together
constexpr int64_t AHEAD = 1 << 10;        // elements, where rows are kept

template <typename T>
constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));  // of memory, in elements

#if defined(__GNUC__)
#define SLIMSTATE_PREFETCH(pointer) __builtin_prefetch(pointer)
#else
#define SLIMSTATE_PREFETCH(pointer)
#endif

// All of a call that is the same for its matrices.
struct Settings {
  slimstate::SplitNumbers numbers;
  slimstate::Adam adam;
};

// What the random bits of a stretch of weights go by: its elements are number index + i of the whole weight.
struct Draw {
  Key key;
  uint64_t index;
};

// Where weights are left as they were, if anywhere, and how many elements on lies what comes next.
struct Beside {
  void* w;
  int16_t* low;
  int64_t ahead;
};

template <typename Weight, int64_t outer, bool copied>
inline __attribute__((always_inline)) void outer_loop(typename Weight::Bits* __restrict w, int16_t* __restrict low,
                                                      const typename Weight::Bits* __restrict g,
                                                      typename Weight::Bits* __restrict old,
                                                      int16_t* __restrict old_low, int64_t count,
                                                      slimstate::SplitNumbers numbers, Draw draw) {
  for (int64_t i = 0; i < count; ++i) {
    int16_t rest = Weight::low ? low[i] : 0;
    if (copied) old[i] = w[i];
    if (copied && Weight::low) old_low[i] = rest;
    const float x = slimstate::outer_step<outer>(numbers, Weight::widen(w[i], rest), Weight::widen(g[i], 0));
    const uint32_t random =
        Weight::random ? slimstate::random_bits(draw.key, draw.index + static_cast<uint64_t>(i)) : 0;
    w[i] = Weight::narrow(x, random, rest);
    if (Weight::low) low[i] = rest;
  }
}

template <typename Weight, int64_t outer, bool copied>
SLIMSTATE_CLONES void outer_run(void* weights, int16_t* low, const void* gradients, int64_t count,
                                slimstate::SplitNumbers numbers, Draw draw, Beside beside) {
  using Bits = typename Weight::Bits;
  auto* w = static_cast<Bits*>(weights);
  const auto* g = static_cast<const Bits*>(gradients);
  auto* old = static_cast<Bits*>(beside.w);
  const auto run = [&](int64_t i, int64_t own) __attribute__((always_inline)) {
    outer_loop<Weight, outer, copied>(w + i, Weight::low ? low + i : nullptr, g + i, copied ? old + i : nullptr,
                                      copied && Weight::low ? beside.low + i : nullptr, own, numbers,
                                      {draw.key, draw.index + static_cast<uint64_t>(i)});
  };
  int64_t i = 0;
  for (; i + STRETCH <= count; i += STRETCH) {
    for (int64_t j = i + beside.ahead; j < i + beside.ahead + STRETCH; j += line<Bits>) {
      SLIMSTATE_PREFETCH(w + j);
      SLIMSTATE_PREFETCH(g + j);
    }
    run(i, STRETCH);
  }
  run(i, count - i);
}

// What is kept: `lines` of `length` elements, `apart` in W and G, `pitch` apart in the moments. Line j begins at
// element index[j] of the whole weight and places[j] of the whole moments, where random bits go by them.
struct Lines {
  int64_t lines, length, apart, pitch;
  const uint64_t *index, *places;
  uint64_t step;  // of the index, from element to element
};

// Of everything that the loop reads, copies: no store can change them.
template <typename Weight, typename Moment, int64_t fixed>
inline __attribute__((always_inline)) void inner_loop(typename Weight::Bits* __restrict w, int16_t* __restrict low,
                                                      const typename Weight::Bits* __restrict g,
                                                      typename Moment::Bits* __restrict m,
                                                      typename Moment::Bits* __restrict v, const Lines& lines,
                                                      slimstate::SplitNumbers numbers, slimstate::Adam adam,
                                                      slimstate::Bias bias, Key key, Key first, Key second) {
  const int64_t length = fixed > 0 ? fixed : lines.length;
  for (int64_t j = 0; j < lines.lines; ++j) {
    const uint64_t index = Weight::random ? lines.index[j] : 0, place = Moment::random ? lines.places[j] : 0;
    const uint64_t step = lines.step;
    for (int64_t i = 0; i < length; ++i) {
      const auto t = static_cast<uint64_t>(i);
      float u;
      if constexpr (Moment::given) {
        u = m[i];
      } else {
        float mean = Moment::widen(m[i]), square = Moment::widen(v[i]);
        u = slimstate::adam_direction(adam, bias, Weight::widen(g[i], 0), mean, square);
        m[i] = Moment::narrow(mean, Moment::random ? slimstate::random_bits(first, place + t) : 0);
        v[i] = Moment::narrow(square, Moment::random ? slimstate::random_bits(second, place + t) : 0);
      }
      int16_t rest = Weight::low ? low[i] : 0;
      const float x = slimstate::inner_step(numbers, Weight::widen(w[i], rest), u);
      w[i] = Weight::narrow(x, Weight::random ? slimstate::random_bits(key, index + t * step) : 0, rest);
      if (Weight::low) low[i] = rest;
    }
    w += lines.apart;
    g += lines.apart;
    m += lines.pitch;
    if (!Moment::given) v += lines.pitch;
    if (Weight::low) low += lines.apart;
  }
}

template <typename Weight, typename Moment>
SLIMSTATE_CLONES void inner_run(typename Weight::Bits* w, int16_t* low, const typename Weight::Bits* g,
                                typename Moment::Bits* m, typename Moment::Bits* v, const Lines& lines,
                                const Settings& all, const Matrix& x) {
  if (lines.length == TILE_ROWS) {
    inner_loop<Weight, Moment, TILE_ROWS>(w, low, g, m, v, lines, all.numbers, all.adam, x.bias, x.key, x.first,
                                          x.second);
  } else {
    inner_loop<Weight, Moment, 0>(w, low, g, m, v, lines, all.numbers, all.adam, x.bias, x.key, x.first, x.second);
  }
}

struct Given {
  using Bits = float;
  static constexpr bool random = false, given = true;
};
struct Float32 : slimstate::Float32Moment {
  static constexpr bool given = false;
};
struct BFloat16 : slimstate::BFloat16Moment {
  static constexpr bool given = false;
};

// Element t of line j, `apart` from the next, is that in row t and column index[j]; of one row, or of GROUP of them.
template <typename T>
void gather(T* lines, const T* rows, int64_t columns, int64_t count, const int32_t* index, int64_t kept,
            int64_t apart) {
  if (count == 1) {
    for (int64_t j = 0; j < kept; ++j) lines[j * apart] = rows[index[j]];
    return;
  }
  for (int64_t j = 0; j < kept; ++j) {
    const T* at = rows + index[j];
    const T values[GROUP] = {at[0], at[columns], at[2 * columns], at[3 * columns]};
    memcpy(lines + j * apart, values, sizeof values);
  }
}

template <typename T>
void scatter(const T* lines, T* rows, int64_t columns, int64_t count, const int32_t* index, int64_t kept,
             int64_t apart) {
  if (count == 1) {
    for (int64_t j = 0; j < kept; ++j) rows[index[j]] = lines[j * apart];
    return;
  }
  for (int64_t j = 0; j < kept; ++j) {
    T* at = rows + index[j];
    T values[GROUP];
    memcpy(values, lines + j * apart, sizeof values);
    for (int64_t t = 0; t < GROUP; ++t) at[t * columns] = values[t];
  }
}

// Rows [rows, rows_end) and columns [columns, columns_end) of one member of a matrix.
struct Job {
  int64_t matrix, member, row, rows_end, column, columns_end;
};

using OuterRun = void (*)(void*, int16_t*, const void*, int64_t, slimstate::SplitNumbers, Draw, Beside);

template <typename Weight, typename Moment>
struct Step {
  using Bits = typename Weight::Bits;
  using MomentBits = typename Moment::Bits;
  const Settings& settings;
  const OuterRun outer;  // null where nothing happens outside
  std::unique_ptr<Bits[]> w, g, old;
  std::unique_ptr<int16_t[]> low, old_low;
  std::unique_ptr<uint64_t[]> index, places;
  int64_t room = 0;

  explicit Step(const Settings& all, OuterRun run) : settings(all), outer(run) {}

  static int16_t* rest(int16_t* low, int64_t at) { return Weight::low ? low + at : nullptr; }

  void outside(const Matrix& x, int64_t at, int64_t count, Beside beside) const {
    if (outer == nullptr) return;
    auto* w = static_cast<Bits*>(x.w) + at;
    const auto* g = static_cast<const Bits*>(x.g) + at;
    if constexpr (!Weight::random) {
      outer(w, rest(x.low, at), g, count, settings.numbers, {}, beside);
    } else {
      slimstate::stretches(x.place, static_cast<uint64_t>(at), count, [&](int64_t i, int64_t own, uint64_t index) {
        auto* copy = beside.w == nullptr ? nullptr : static_cast<Bits*>(beside.w) + i;
        outer(w + i, nullptr, g + i, own, settings.numbers, {x.key, index}, {copy, nullptr, beside.ahead});
      });
    }
  }

  // `count` elements that are kept, together in memory: `at` in the moments, `index` in the whole weight.
  void inside(const Matrix& x, Bits* w, int16_t* low, const Bits* g, int64_t at, int64_t count, uint64_t index) const {
    auto* m = static_cast<MomentBits*>(x.m) + at;
    auto* v = Moment::given ? nullptr : static_cast<MomentBits*>(x.v) + at;
    if constexpr (!Moment::random) {
      inner_run<Weight, Moment>(w, low, g, m, v, {1, count, 0, 0, &index, nullptr, 1}, settings, x);
    } else {
      slimstate::stretches(x.moments, static_cast<uint64_t>(at), count, [&](int64_t i, int64_t own, uint64_t place) {
        const uint64_t begin = index + static_cast<uint64_t>(i);
        inner_run<Weight, Moment>(w + i, rest(low, i), g + i, m + i, v + i, {1, own, 0, 0, &begin, &place, 1}, settings,
                                  x);
      });
    }
  }

  void rows(const Matrix& x, const Job& job) const {
    const int32_t* index = x.index + job.member * x.kept;
    const int32_t* next = std::lower_bound(index, index + x.kept, static_cast<int32_t>(job.row));
    const int64_t first = job.member * x.rows;
    for (int64_t row = job.row; row < job.rows_end;) {
      int64_t end = next == index + x.kept ? job.rows_end : std::min<int64_t>(*next, job.rows_end);
      if (end > row) outside(x, (first + row) * x.columns, (end - row) * x.columns, {nullptr, nullptr, AHEAD});
      const int64_t begin = end, moments = (job.member * x.kept + (next - index)) * x.columns;
      while (end < job.rows_end && next != index + x.kept && *next == end) ++next, ++end;
      const int64_t at = (first + begin) * x.columns, count = (end - begin) * x.columns;
      auto* w = static_cast<Bits*>(x.w) + at;
      const auto* g = static_cast<const Bits*>(x.g) + at;
      if constexpr (!Weight::random) {
        inside(x, w, rest(x.low, at), g, moments, count, 0);
      } else {
        slimstate::stretches(x.place, static_cast<uint64_t>(at), count, [&](int64_t i, int64_t own, uint64_t place) {
          inside(x, w + i, nullptr, g + i, moments + i, own, place);
        });
      }
      row = end;
    }
  }

  void columns(const Matrix& x, const Job& job) {
    const int32_t* all = x.index + job.member * x.kept;
    const int32_t* from = std::lower_bound(all, all + x.kept, static_cast<int32_t>(job.column));
    const int32_t* to = std::lower_bound(from, all + x.kept, static_cast<int32_t>(job.columns_end));
    const int64_t kept = to - from, height = job.rows_end - job.row, width = job.columns_end - job.column;
    // No power of two, in which lines would share a few sets of the cache.
    const int64_t apart = height == 1 ? 1 : height + line<Bits>;
    if (kept * apart > room) {
      room = kept * apart;
      w.reset(new Bits[room]);
      g.reset(new Bits[room]);
      if (Weight::low) low.reset(new int16_t[room]);
      if (Weight::random) index.reset(new uint64_t[room]);
      if (Moment::random) places.reset(new uint64_t[room]);
    }
    if (outer != nullptr && !old) {
      old.reset(new Bits[std::max(GROUP * TILE_COLUMNS, ROW_COLUMNS)]);
      if (Weight::low) old_low.reset(new int16_t[std::max(GROUP * TILE_COLUMNS, ROW_COLUMNS)]);
    }
    const int64_t first = (job.member * x.rows + job.row) * x.columns;
    auto* weights = static_cast<Bits*>(x.w) + first;
    const auto* gradients = static_cast<const Bits*>(x.g) + first;
    int16_t* lows = rest(x.low, first);
    const int64_t moments = (job.member * x.kept + (from - all)) * x.rows + job.row;
    auto* m = static_cast<MomentBits*>(x.m) + moments;
    auto* v = Moment::given ? nullptr : static_cast<MomentBits*>(x.v) + moments;
    for (int64_t t = 0, own; t < height; t += own) {
      const int64_t row = t * x.columns;
      own = t + GROUP <= height ? GROUP : 1;
      for (int64_t j = kept * t / height; j < kept * (t + own) / height && height > 1; ++j) {
        for (int64_t i = 0; i < height; i += line<MomentBits>) {
          SLIMSTATE_PREFETCH(m + j * x.rows + i);
          if (!Moment::given) SLIMSTATE_PREFETCH(v + j * x.rows + i);
        }
      }
      for (int64_t i = 0; i < own; ++i) {
        outside(x, first + row + i * x.columns + job.column, width,
                {old.get() + i * width, rest(old_low.get(), i * width), x.rows == 1 ? width : own * x.columns});
      }
      const bool copied = outer != nullptr;
      const Bits* rows = copied ? old.get() - job.column : weights + row;
      const int64_t pitch = copied ? width : x.columns;
      gather(w.get() + t, rows, pitch, own, from, kept, apart);
      if (Weight::low) {
        gather(low.get() + t, copied ? old_low.get() - job.column : lows + row, pitch, own, from, kept, apart);
      }
      if (!Moment::given) gather(g.get() + t, gradients + row, x.columns, own, from, kept, apart);
    }
    if (x.rows == 1 && !Weight::random) {  // entries, and their moments, lie together
      inside(x, w.get(), rest(low.get(), 0), g.get(), moments, kept, 0);
    } else {
      uint64_t step = 0;
      if (Weight::random) {
        for (int64_t j = 0; j < kept; ++j) index[j] = x.place.index(static_cast<uint64_t>(first + from[j]));
        const auto below = static_cast<uint64_t>(first + x.columns + (kept > 0 ? from[0] : 0));
        if (height > 1 && kept > 0) step = x.place.index(below) - index[0];
      }
      if (Moment::random) {
        for (int64_t j = 0; j < kept; ++j) places[j] = x.moments.index(static_cast<uint64_t>(moments + j * x.rows));
      }
      inner_run<Weight, Moment>(w.get(), rest(low.get(), 0), g.get(), m, v,
                                {kept, height, apart, x.rows, index.get(), places.get(), step}, settings, x);
    }
    for (int64_t t = 0, own; t < height; t += own) {
      const int64_t row = t * x.columns;
      own = t + GROUP <= height ? GROUP : 1;
      scatter(w.get() + t, weights + row, x.columns, own, from, kept, apart);
      if (Weight::low) scatter(low.get() + t, lows + row, x.columns, own, from, kept, apart);
    }
  }
};

template <typename Weight, bool copied>
OuterRun outer_of(int64_t outer) {
  if (outer == slimstate::SIGN) return outer_run<Weight, slimstate::SIGN, copied>;
  return outer == slimstate::SGD ? outer_run<Weight, slimstate::SGD, copied>
                                 : outer_run<Weight, slimstate::NONE, copied>;
}

template <typename Weight, typename Moment>
void run(const std::vector<Matrix>& matrices, const std::vector<Job>& jobs, const Settings& settings, bool columns,
         int64_t outer) {
  const bool idle = outer == slimstate::NONE && settings.numbers.decay == 1.0F;
  torch::stable::parallel_for(0, static_cast<int64_t>(jobs.size()), 1, [&](int64_t begin, int64_t end) {
    const OuterRun outside = columns ? outer_of<Weight, true>(outer) : outer_of<Weight, false>(outer);
    Step<Weight, Moment> step(settings, idle ? nullptr : outside);
    for (int64_t i = begin; i < end; ++i) {
      const Matrix& x = matrices[jobs[i].matrix];
      if (columns) {
        step.columns(x, jobs[i]);
      } else {
        step.rows(x, jobs[i]);
      }
    }
  });
}

using Run = void (*)(const std::vector<Matrix>&, const std::vector<Job>&, const Settings&, bool, int64_t);

template <typename Weight>
Run with_moments(slimstate::SplitMoments moments) {
  switch (moments) {
    case slimstate::SplitMoments::GIVEN:
      return run<Weight, Given>;
    case slimstate::SplitMoments::FLOAT32:
      return run<Weight, Float32>;
    default:
      return run<Weight, BFloat16>;
  }
}

Run run_for(slimstate::SplitKind kind) {
  using torch::headeronly::ScalarType;
  switch (kind.weight) {
    case ScalarType::Float:
      return with_moments<slimstate::Float32Weight>(kind.moments);
    case ScalarType::BFloat16:
      return kind.low      ? with_moments<slimstate::BFloat16Compensated>(kind.moments)
             : kind.random ? with_moments<slimstate::BFloat16Stochastic>(kind.moments)
                           : with_moments<slimstate::BFloat16Nearest>(kind.moments);
    default:
      return kind.low      ? with_moments<slimstate::HalfCompensated>(kind.moments)
             : kind.random ? with_moments<slimstate::HalfStochastic>(kind.moments)
                           : with_moments<slimstate::HalfNearest>(kind.moments);
  }
}

// The last row of a tile that begins here: where weights are rounded at random, the indices of a column in the whole
// are to be evenly spaced.
int64_t tile_end(const Matrix& x, int64_t member, int64_t row, int64_t height) {
  int64_t end = std::min(row + height, x.rows);
  const auto columns = static_cast<uint64_t>(x.columns);
  if (x.place.width > columns && x.place.width % columns == 0) {
    const auto rows = static_cast<int64_t>(std::min<uint64_t>(x.place.width / columns, INT64_MAX));
    const int64_t before = (member * x.rows + row) % rows;
    end = std::min(end, row + (rows - before));
  }
  return end;
}

void split_(std::vector<Tensor> ps, std::vector<Tensor> grads, std::vector<Tensor> indices,
            std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> lows,
            std::vector<int64_t> shapes, std::vector<double> biases, std::vector<int64_t> keys,
            std::vector<int64_t> places, std::vector<int64_t> moment_keys, std::vector<int64_t> moment_places,
            bool columns, int64_t outer, double decay, double step, double outside, double beta1, double beta2,
            double eps) {
  const slimstate::SplitKind kind = slimstate::check_split(ps, grads, indices, exp_avgs, exp_avg_sqs, lows, shapes,
                                                           biases, keys, places, moment_keys, moment_places, columns, outer);
  const std::vector<Matrix> matrices =
      slimstate::split_matrices(kind, ps, grads, indices, exp_avgs, exp_avg_sqs, lows, shapes, biases, keys, places,
                                moment_keys, moment_places);
  std::vector<Job> jobs;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Matrix& x = matrices[i];
    const int64_t width = !columns ? x.columns : x.rows == 1 ? ROW_COLUMNS : TILE_COLUMNS;
    const int64_t height = columns ? TILE_ROWS : std::max<int64_t>(1, JOB / x.columns);
    for (int64_t member = 0; member < x.members; ++member) {
      for (int64_t row = 0, end; row < x.rows; row = end) {
        end = columns ? tile_end(x, member, row, height) : std::min(row + height, x.rows);
        for (int64_t column = 0; column < x.columns; column += width) {
          const int64_t last = std::min(column + width, x.columns);
          jobs.push_back({static_cast<int64_t>(i), member, row, end, column, last});
        }
      }
    }
  }
  const Settings settings{
      {static_cast<float>(decay), static_cast<float>(step), static_cast<float>(outside)}, {beta1, beta2, eps}};
  run_for(kind)(matrices, jobs, settings, columns, outer);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CPU, m) { m.impl("split_", TORCH_BOX(&split_)); }
