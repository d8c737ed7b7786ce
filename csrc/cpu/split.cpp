// The split step: one pass over W and G for a list of matrices. Kept rows are stretches of memory. Of kept columns a
// tile of a few rows is gathered, so that each column of it meets its moments, whose memory runs down the columns, as a
// stretch as well; entries are columns of one long row.
#include "split.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "checks.h"
#include "cpu/clones.h"
#include "cpu/runs.h"

using slimstate::Key;
using slimstate::Place;
using torch::stable::Tensor;

namespace {

constexpr int64_t JOB = 1 << 15;           // elements of W
constexpr int64_t TILE_ROWS = 16;          // a line of memory of float32
constexpr int64_t TILE_COLUMNS = 512;      // what is gathered of a tile stays in the first cache
constexpr int64_t ROW_COLUMNS = 1 << 13;   // of a tile of one row

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

struct Matrix {
  void* w;
  const void* g;
  int16_t* low;
  const int32_t* index;  // `kept` of each of its members, sorted
  void *m, *v;           // moments of what is kept, or in m its direction
  int64_t members, rows, columns, kept;
  slimstate::Bias bias;
  Key key, first, second;
  Place place, moments;
};

// What the random bits of a stretch of weights go by: its elements are number index + i step of the whole weight.
struct Draw {
  Key key;
  uint64_t index, step;
};

template <typename Weight, int64_t outer>
SLIMSTATE_CLONES void outer_run(void* weights, int16_t* low, const void* gradients, int64_t count,
                                slimstate::SplitNumbers numbers, Draw draw) {
  using Bits = typename Weight::Bits;
  auto* w = static_cast<Bits*>(weights);
  const auto* g = static_cast<const Bits*>(gradients);
  for (int64_t i = 0; i < count; ++i) {
    int16_t rest = Weight::low ? low[i] : 0;
    const float x = slimstate::outer_step<outer>(numbers, Weight::widen(w[i], rest), Weight::widen(g[i], 0));
    const uint32_t random =
        Weight::random ? slimstate::random_bits(draw.key, draw.index + static_cast<uint64_t>(i)) : 0;
    w[i] = Weight::narrow(x, random, rest);
    if (Weight::low) low[i] = rest;
  }
}

// What is kept: `lines` of `length` elements, together in memory in W and G, `pitch` apart in the moments. Line j begins
// at element index[j] of the whole weight and places[j] of the whole moments, where random bits go by them.
struct Lines {
  int64_t lines, length, pitch;
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
    w += length;
    g += length;
    m += lines.pitch;
    if (!Moment::given) v += lines.pitch;
    if (Weight::low) low += length;
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

// Rows [rows, rows_end) and columns [columns, columns_end) of one member of a matrix.
struct Job {
  int64_t matrix, member, row, rows_end, column, columns_end;
};

using OuterRun = void (*)(void*, int16_t*, const void*, int64_t, slimstate::SplitNumbers, Draw);

template <typename Weight, typename Moment>
struct Step {
  using Bits = typename Weight::Bits;
  using MomentBits = typename Moment::Bits;
  const Settings& settings;
  const OuterRun outer;  // null where nothing happens outside
  std::unique_ptr<Bits[]> w, g;
  std::unique_ptr<int16_t[]> low;
  std::unique_ptr<uint64_t[]> index, places;
  int64_t room = 0;

  explicit Step(const Settings& all, OuterRun run) : settings(all), outer(run) {}

  static int16_t* rest(int16_t* low, int64_t at) { return Weight::low ? low + at : nullptr; }

  void outside(const Matrix& x, int64_t at, int64_t count) const {
    if (outer == nullptr) return;
    auto* w = static_cast<Bits*>(x.w) + at;
    const auto* g = static_cast<const Bits*>(x.g) + at;
    if constexpr (!Weight::random) {
      outer(w, rest(x.low, at), g, count, settings.numbers, {});
    } else {
      slimstate::stretches(x.place, static_cast<uint64_t>(at), count, [&](int64_t i, int64_t own, uint64_t index) {
        outer(w + i, nullptr, g + i, own, settings.numbers, {x.key, index, 1});
      });
    }
  }

  // `count` elements that are kept, together in memory: `at` in the moments, `index` in the whole weight.
  void inside(const Matrix& x, Bits* w, int16_t* low, const Bits* g, int64_t at, int64_t count, uint64_t index) const {
    auto* m = static_cast<MomentBits*>(x.m) + at;
    auto* v = Moment::given ? nullptr : static_cast<MomentBits*>(x.v) + at;
    if constexpr (!Moment::random) {
      inner_run<Weight, Moment>(w, low, g, m, v, {1, count, 0, &index, nullptr, 1}, settings, x);
    } else {
      slimstate::stretches(x.moments, static_cast<uint64_t>(at), count, [&](int64_t i, int64_t own, uint64_t place) {
        const uint64_t begin = index + static_cast<uint64_t>(i);
        inner_run<Weight, Moment>(w + i, rest(low, i), g + i, m + i, v + i, {1, own, 0, &begin, &place, 1}, settings,
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
      if (end > row) outside(x, (first + row) * x.columns, (end - row) * x.columns);
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
    if (kept * height > room) {
      room = kept * height;
      w.reset(new Bits[room]);
      g.reset(new Bits[room]);
      if (Weight::low) low.reset(new int16_t[room]);
      if (Weight::random) index.reset(new uint64_t[room]);
      if (Moment::random) places.reset(new uint64_t[room]);
    }
    const int64_t first = (job.member * x.rows + job.row) * x.columns;
    auto* weights = static_cast<Bits*>(x.w) + first;
    const auto* gradients = static_cast<const Bits*>(x.g) + first;
    int16_t* lows = rest(x.low, first);
    const int64_t moments = (job.member * x.kept + (from - all)) * x.rows + job.row;
    auto* m = static_cast<MomentBits*>(x.m) + moments;
    auto* v = Moment::given ? nullptr : static_cast<MomentBits*>(x.v) + moments;
    for (int64_t j = 0; j < kept && height > 1; ++j) {  // too far apart for the processor to see what comes next
      SLIMSTATE_PREFETCH(m + j * x.rows);
      if (!Moment::given) SLIMSTATE_PREFETCH(v + j * x.rows);
    }
    for (int64_t t = 0; t < height; ++t) {
      const int64_t row = t * x.columns;
      for (int64_t j = 0; j < kept; ++j) w[j * height + t] = weights[row + from[j]];
      if (!Moment::given) {
        for (int64_t j = 0; j < kept; ++j) g[j * height + t] = gradients[row + from[j]];
      }
      if (Weight::low) {
        for (int64_t j = 0; j < kept; ++j) low[j * height + t] = lows[row + from[j]];
      }
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
                                {kept, height, x.rows, index.get(), places.get(), step}, settings, x);
    }
    for (int64_t t = 0; t < height; ++t) {
      const int64_t row = t * x.columns;
      outside(x, first + row + job.column, width);
      for (int64_t j = 0; j < kept; ++j) weights[row + from[j]] = w[j * height + t];
      if (Weight::low) {
        for (int64_t j = 0; j < kept; ++j) lows[row + from[j]] = low[j * height + t];
      }
    }
  }
};

template <typename Weight>
OuterRun outer_of(int64_t outer) {
  if (outer == slimstate::SIGN) return outer_run<Weight, slimstate::SIGN>;
  return outer == slimstate::SGD ? outer_run<Weight, slimstate::SGD> : outer_run<Weight, slimstate::NONE>;
}

template <typename Weight, typename Moment>
void run(const std::vector<Matrix>& matrices, const std::vector<Job>& jobs, const Settings& settings, bool columns,
         int64_t outer) {
  const bool idle = outer == slimstate::NONE && settings.numbers.decay == 1.0F;
  torch::stable::parallel_for(0, static_cast<int64_t>(jobs.size()), 1, [&](int64_t begin, int64_t end) {
    Step<Weight, Moment> step(settings, idle ? nullptr : outer_of<Weight>(outer));
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
  const auto place = [](const std::vector<int64_t>& from, size_t i) {
    return Place{static_cast<uint64_t>(from[3 * i]), static_cast<uint64_t>(from[3 * i + 1]),
                 static_cast<uint64_t>(from[3 * i + 2])};
  };
  const auto key = [](const std::vector<int64_t>& from, size_t i) {
    return slimstate::expand_key(static_cast<uint64_t>(from[i]));
  };
  std::vector<Matrix> matrices;
  std::vector<Job> jobs;
  for (size_t i = 0; i < ps.size(); ++i) {
    Matrix x{};
    if (ps[i].numel() == 0) {
      matrices.push_back(x);
      continue;
    }
    x.w = ps[i].mutable_data_ptr();
    x.g = grads[i].const_data_ptr();
    x.index = static_cast<const int32_t*>(indices[i].const_data_ptr());
    x.low = kind.low ? static_cast<int16_t*>(lows[i].mutable_data_ptr()) : nullptr;
    x.m = exp_avgs[i].mutable_data_ptr();
    x.members = shapes[3 * i];
    x.rows = shapes[3 * i + 1];
    x.columns = shapes[3 * i + 2];
    x.kept = indices[i].numel() / x.members;
    x.place = kind.random ? place(places, i) : Place{0, UINT64_MAX, 0};
    if (kind.random) x.key = key(keys, i);
    if (kind.moments != slimstate::SplitMoments::GIVEN) {
      x.v = exp_avg_sqs[i].mutable_data_ptr();
      x.bias = {static_cast<float>(biases[2 * i]), static_cast<float>(biases[2 * i + 1])};
    }
    if (kind.moments == slimstate::SplitMoments::BFLOAT16) {
      x.moments = place(moment_places, i);
      x.first = key(moment_keys, 2 * i);
      x.second = key(moment_keys, 2 * i + 1);
    }
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
    matrices.push_back(x);
  }
  const Settings settings{
      {static_cast<float>(decay), static_cast<float>(step), static_cast<float>(outside)}, {beta1, beta2, eps}};
  run_for(kind)(matrices, jobs, settings, columns, outer);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CPU, m) { m.impl("split_", TORCH_BOX(&split_)); }
