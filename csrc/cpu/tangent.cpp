#include "tangent_operands.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/clones.h"
#include "weights.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using namespace slimstate;

// A row is summed in runs: a run in lanes of float32, all else in float64. What a run, a tile and a unit are does not
// depend on the threads, so neither do the sums.
constexpr int64_t RUN = 256, TILE = 1024, UNIT = 8 * TILE, GRAIN = 1 << 15;

// ---------------------------------------------------------------------------------------------- loops over a tile

template <typename Format>
SLIMSTATE_CLONES void widen(float* __restrict out, const uint16_t* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = Format::widen(x[i], 0);
}

template <typename Format>
SLIMSTATE_CLONES void join(
    float* __restrict out, const uint16_t* __restrict x, const int16_t* __restrict low, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = Format::widen(x[i], low[i]);
}

template <typename Format>
SLIMSTATE_CLONES void round_nearest(uint16_t* __restrict out, const float* __restrict x, int64_t n) {
  int16_t none = 0;
  for (int64_t i = 0; i < n; ++i) out[i] = Format::narrow(x[i], 0, none);
}

template <typename Format>
SLIMSTATE_CLONES void round_random(
    uint16_t* __restrict out, const float* __restrict x, int64_t n, Key key, uint64_t index) {
  for (int64_t i = 0; i < n; ++i) out[i] = Format::round(x[i], random_bits(key, index + static_cast<uint64_t>(i)));
}

template <typename Format>
SLIMSTATE_CLONES void divide(
    uint16_t* __restrict out, int16_t* __restrict low, const float* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = Format::narrow(x[i], 0, low[i]);
}

// Adds a tile's <w, g>, |g|^2, |w|^2 to the sums; the compiler sums in lanes where `simd reduction` lets it.
SLIMSTATE_CLONES void add_dots(double* sums, const float* __restrict w, const float* __restrict g, int64_t n) {
  for (int64_t begin = 0; begin < n; begin += RUN) {
    const int64_t end = std::min(begin + RUN, n);
    float wg = 0, gg = 0, ww = 0;
#pragma omp simd reduction(+ : wg, gg, ww)
    for (int64_t i = begin; i < end; ++i) {
      wg += w[i] * g[i];
      gg += g[i] * g[i];
      ww += w[i] * w[i];
    }
    sums[0] += wg, sums[1] += gg, sums[2] += ww;
  }
}

SLIMSTATE_CLONES void add_dot(double* sum, const float* __restrict w, const float* __restrict u, int64_t n) {
  for (int64_t begin = 0; begin < n; begin += RUN) {
    const int64_t end = std::min(begin + RUN, n);
    float wu = 0;
#pragma omp simd reduction(+ : wu)
    for (int64_t i = begin; i < end; ++i) wu += w[i] * u[i];
    *sum += wu;
  }
}

// out <- U or, if it is the weight and this the step, out <- factor out - lr U.
template <bool nesterov, bool step>
SLIMSTATE_CLONES void adam_tile(
    float* __restrict out, const float* __restrict g, float* __restrict m, float* __restrict v, int64_t n, float sign,
    Adam rule, float factor, float lr) {
  for (int64_t i = 0; i < n; ++i) {
    const float u = rule.take<nesterov>(sign * g[i], m[i], v[i]);
    out[i] = step ? out[i] * factor - u * lr : u;
  }
}

template <bool nesterov, bool step>
SLIMSTATE_CLONES void momentum_tile(
    float* __restrict out, const float* __restrict g, float* __restrict m, int64_t n, float sign, Momentum rule,
    float factor, float lr) {
  for (int64_t i = 0; i < n; ++i) {
    const float u = rule.take<nesterov>(sign * g[i], m[i]);
    out[i] = step ? out[i] * factor - u * lr : u;
  }
}

template <bool step>
SLIMSTATE_CLONES void plain_tile(
    float* __restrict out, const float* __restrict g, int64_t n, float sign, Momentum rule, float factor, float lr) {
  for (int64_t i = 0; i < n; ++i) {
    const float u = rule.take(sign * g[i]);
    out[i] = step ? out[i] * factor - u * lr : u;
  }
}

SLIMSTATE_CLONES void step_tile(
    float* __restrict w, const float* __restrict u, int64_t n, float factor, float lr) {
  for (int64_t i = 0; i < n; ++i) w[i] = w[i] * factor - u[i] * lr;
}

// ------------------------------------------------------------------------------------------------- one parameter

float* floats(const Kept& x, int64_t at) { return static_cast<float*>(x.data) + at; }
uint16_t* codes(const Kept& x, int64_t at) { return static_cast<uint16_t*>(x.data) + at; }

// n entries from `at` on as float32: they themselves, or in the buffer.
float* read(const Kept& x, int64_t at, int64_t n, float* buffer) {
  if (x.type == ScalarType::Float) return floats(x, at);
  const bool half = x.type == ScalarType::Half;
  if (x.low != nullptr) {
    (half ? join<HalfCompensated> : join<BFloat16Compensated>)(buffer, codes(x, at), x.low + at, n);
  } else {
    (half ? widen<HalfNearest> : widen<BFloat16Nearest>)(buffer, codes(x, at), n);
  }
  return buffer;
}

// As read, but never they themselves.
float* copy(const Kept& x, int64_t at, int64_t n, float* buffer) {
  if (x.type != ScalarType::Float) return read(x, at, n, buffer);
  std::copy_n(floats(x, at), n, buffer);
  return buffer;
}

// What was read and changed.
void write(const Kept& x, const Place& place, int64_t at, int64_t n, const float* values) {
  if (x.type == ScalarType::Float) return;
  const bool half = x.type == ScalarType::Half;
  if (x.low != nullptr) {
    (half ? divide<HalfCompensated> : divide<BFloat16Compensated>)(codes(x, at), x.low + at, values, n);
  } else if (!x.random) {
    (half ? round_nearest<HalfNearest> : round_nearest<BFloat16Nearest>)(codes(x, at), values, n);
  } else {
    while (n > 0) {  // row by row of the place, so that the inner loop counts in ones
      const auto i = static_cast<uint64_t>(at);
      const auto count = static_cast<int64_t>(std::min(static_cast<uint64_t>(n), place.width - i % place.width));
      (half ? round_random<Half> : round_random<BFloat16>)(codes(x, at), values, count, x.key, place.index(i));
      at += count, values += count, n -= count;
    }
  }
}

struct Buffers {
  alignas(64) float w[TILE], g[TILE], m[TILE], v[TILE], u[TILE];
};

// U of one tile, or the step of its weights; the moments after it are written, or with `dry` forgotten.
template <bool step>
void take(const Operand& x, int64_t at, int64_t n, float* out, Buffers& b, bool dry, float factor) {
  const float* g = read(x.g, at, n, b.g);
  if (x.m.data == nullptr) return plain_tile<step>(out, g, n, x.sign, x.momentum, factor, x.lr);
  float* m = (dry ? copy : read)(x.m, at, n, b.m);
  if (x.v.data == nullptr) {
    (x.nesterov ? momentum_tile<true, step> : momentum_tile<false, step>)(
        out, g, m, n, x.sign, x.momentum, factor, x.lr);
  } else {
    float* v = (dry ? copy : read)(x.v, at, n, b.v);
    (x.nesterov ? adam_tile<true, step> : adam_tile<false, step>)(out, g, m, v, n, x.sign, x.adam, factor, x.lr);
    if (!dry) write(x.v, x.place, at, n, v);
  }
  if (!dry) write(x.m, x.place, at, n, m);
}

int64_t units_of(int64_t columns) { return (columns + UNIT - 1) / UNIT; }

template <typename F>
void tiles(int64_t begin, int64_t end, F f) {
  for (int64_t at = begin; at < end; at += TILE) f(at, std::min(TILE, end - at));
}

// Calls f(unit, begin, end) for all units of all rows.
template <typename F>
void for_units(int64_t rows, int64_t columns, F f) {
  const int64_t units = units_of(columns), grain = std::max<int64_t>(1, GRAIN / std::clamp<int64_t>(columns, 1, UNIT));
  torch::stable::parallel_for(0, rows * units, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / units, begin = i % units * UNIT;
      f(i, row * columns + begin, row * columns + std::min(begin + UNIT, columns));
    }
  });
}

// The moments and the weight after this step, each row's own length changed by its factor, or all by one.
void step_all(const Operand& x, const float* factors, float factor) {
  const bool flat = factors == nullptr;
  for_units(flat ? 1 : x.rows, flat ? x.rows * x.columns : x.columns, [&](int64_t unit, int64_t begin, int64_t end) {
    Buffers b;
    const float f = flat ? factor : factors[unit / units_of(x.columns)];
    tiles(begin, end, [&](int64_t at, int64_t n) {
      float* w = read(x.w, at, n, b.w);
      take<true>(x, at, n, w, b, false, f);
      write(x.w, x.place, at, n, w);
    });
  });
}

// The sums over each unit of `count` dot products; f adds those of a tile.
template <typename F>
std::vector<double> unit_sums(const Operand& x, int64_t count, F f) {
  std::vector<double> sums(count * x.rows * std::max<int64_t>(1, units_of(x.columns)));
  for_units(x.rows, x.columns, [&](int64_t unit, int64_t begin, int64_t end) {
    Buffers b;
    tiles(begin, end, [&](int64_t at, int64_t n) { f(&sums[count * unit], at, n, b); });
  });
  const int64_t units = units_of(x.columns);  // to rows, in place
  for (int64_t i = 0; i < x.rows; ++i) {
    for (int64_t j = 0; j < count; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < units; ++k) sum += sums[count * (i * units + k) + j];
      sums[count * i + j] = sum;
    }
  }
  sums.resize(count * x.rows);
  return sums;
}

// Of each row, <w, u>; moments stay what they are.
std::vector<double> radial_sums(const Operand& x) {
  return unit_sums(x, 1, [&](double* of_unit, int64_t at, int64_t n, Buffers& b) {
    take<false>(x, at, n, b.u, b, true, 1);
    add_dot(of_unit, read(x.w, at, n, b.w), b.u, n);
  });
}

Dots rounded(const double* sums) {
  return {static_cast<float>(sums[0]), static_cast<float>(sums[1]), static_cast<float>(sums[2])};
}

// One row, which is a unit, whose radial part is found and taken out while it is in the cache.
void step_tangent(const Operand& x, const View& view, const Factor& factor, int64_t begin, int64_t end, float ww) {
  Buffers b;
  alignas(64) float u[UNIT];
  double radial = 0;
  tiles(begin, end, [&](int64_t at, int64_t n) {
    take<false>(x, at, n, u + (at - begin), b, false, 1);
    add_dot(&radial, read(x.w, at, n, b.w), u + (at - begin), n);
  });
  const float f = factor.fired(view.multiple(ww, static_cast<float>(radial)));
  tiles(begin, end, [&](int64_t at, int64_t n) {
    float* w = read(x.w, at, n, b.w);
    step_tile(w, u + (at - begin), n, f, x.lr);
    write(x.w, x.place, at, n, w);
  });
}

void decide_and_step(
    const Operand& x, double eps, double delta, bool layer_view, const Factor& factor) {
  const auto dots = unit_sums(x, 3, [&](double* of_unit, int64_t at, int64_t n, Buffers& b) {
    add_dots(of_unit, read(x.w, at, n, b.w), read(x.g, at, n, b.g), n);
  });
  const View channel(eps, delta, static_cast<double>(x.columns));
  bool all = true, any = false;
  double whole[3] = {};
  for (int64_t i = 0; i < x.rows; ++i) {
    const Dots row = rounded(&dots[3 * i]);
    all = all && channel.orthogonal(row);
    any = any || channel.seen(row);
    for (int j = 0; j < 3; ++j) whole[j] += dots[3 * i + j];
  }
  if (all && any) {
    if (units_of(x.columns) == 1) {
      for_units(x.rows, x.columns, [&](int64_t row, int64_t begin, int64_t end) {
        step_tangent(x, channel, factor, begin, end, static_cast<float>(dots[3 * row + 2]));
      });
      return;
    }
    const auto radial = radial_sums(x);
    std::vector<float> factors(x.rows);
    for (int64_t i = 0; i < x.rows; ++i) {
      factors[i] =
          factor.fired(channel.multiple(static_cast<float>(dots[3 * i + 2]), static_cast<float>(radial[i])));
    }
    return step_all(x, factors.data(), 0);
  }
  const View layer(eps, delta, static_cast<double>(x.rows * x.columns));
  const Dots sums = rounded(whole);
  if (!(layer_view && layer.orthogonal(sums) && layer.seen(sums))) return step_all(x, nullptr, factor.plain);
  const auto radial = radial_sums(x);
  double sum = 0;
  for (const double row : radial) sum += row;
  step_all(x, nullptr, factor.fired(layer.multiple(sums.ww, static_cast<float>(sum))));
}

// ------------------------------------------------------------------------------------------------------- the ops

void tangent_dots_(
    Tensors dots, Tensors weights, Tensors grads, Tensors firsts, Tensors seconds, Tensors lows,
    std::vector<double> ages, double rate1, double rate2, double eps, bool nesterov, bool maximize) {
  const char* op = "tangent_dots_";
  const Numbers numbers{0, 0, rate1, rate2, eps, 1, 1, nesterov, true, maximize, false};
  const auto all = operands(op, weights, grads, firsts, seconds, lows, {}, {}, ages, numbers);
  STD_TORCH_CHECK(dots.size() == all.size(), op, ": one tensor of dots for each weight");
  for (size_t i = 0; i < all.size(); ++i) {
    const Operand& x = all[i];
    float* out = of_rows(op, dots[i], x, 4);
    const auto sums = unit_sums(x, 4, [&](double* of_unit, int64_t at, int64_t n, Buffers& b) {
      const float* w = read(x.w, at, n, b.w);
      take<false>(x, at, n, b.u, b, true, 1);
      add_dots(of_unit, w, read(x.g, at, n, b.g), n);
      add_dot(of_unit + 3, w, b.u, n);
    });
    for (int64_t row = 0; row < x.rows; ++row) {
      for (int64_t j = 0; j < 4; ++j) out[j * x.rows + row] = static_cast<float>(sums[4 * row + j]);
    }
  }
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
  const Factor factor(lr, decay, wd_ratio);
  for (size_t i = 0; i < all.size(); ++i) {
    const Operand& x = all[i];
    if (x.rows * x.columns == 0) continue;
    if (!factors.empty()) {
      step_all(x, of_rows(op, factors[i], x, 1), 0);
    } else if (x.tested) {
      decide_and_step(x, eps, delta, layer_view, factor);
    } else {
      step_all(x, nullptr, factor.plain);
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CPU, m) {
  m.impl("tangent_dots_", TORCH_BOX(&tangent_dots_));
  m.impl("tangent_step_", TORCH_BOX(&tangent_step_));
}
