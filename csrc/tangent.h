// The arithmetic of AdamP and SGDP, for the CPU loops and the CUDA kernels alike; equations in optim/adamp.py.
#pragma once
#include <cmath>

#include "rounding.h"

namespace slimstate {

// (1 - weight) a + weight b, from the nearer end.
struct Lerp {
  float coefficient = 0;
  bool far = false;

  Lerp() = default;
  explicit Lerp(double weight)
      : coefficient(static_cast<float>(weight) - (static_cast<float>(weight) < 0.5f ? 0.0f : 1.0f)),
        far(!(static_cast<float>(weight) < 0.5f)) {}

  SLIMSTATE_HD float operator()(float a, float b) const { return (far ? b : a) + coefficient * (b - a); }
};

// U of AdamP: takes an entry of the gradient into its moments.
struct Adam {
  Lerp first, second;
  float scale1 = 1, scale2 = 1, eps = 0;

  Adam() = default;
  Adam(double beta1, double beta2, double eps, double age)
      : first(1 - beta1),
        second(1 - beta2),
        scale1(static_cast<float>(1 / (1 - std::pow(beta1, age)))),
        scale2(static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, age)))),
        eps(static_cast<float>(eps)) {}

  template <bool nesterov>
  SLIMSTATE_HD float take(float g, float& m, float& v) const {
    m = first(m, g);
    v = second(v, g * g);
    return (nesterov ? first(m, g) : m) * scale1 / (sqrtf(v) * scale2 + eps);
  }
};

// U of SGDP, with and without a moment.
struct Momentum {
  float momentum = 0, share = 1;

  Momentum() = default;
  Momentum(double momentum, double dampening)
      : momentum(static_cast<float>(momentum)), share(static_cast<float>(1 - dampening)) {}

  template <bool nesterov>
  SLIMSTATE_HD float take(float g, float& m) const {
    m = momentum * m + share * g;
    return nesterov ? g + momentum * m : m;
  }

  SLIMSTATE_HD float take(float g) const { return share * g; }
};

// What the test goes by, of a row or of all: <w, g>, |g|^2 and |w|^2.
struct Dots {
  float wg, gg, ww;
};

// What a view is tried with; `threshold` is delta / sqrt(length of a row).
struct View {
  float eps = 0, floor = 0, threshold = 0;

  View() = default;
  View(double eps, double delta, double length)
      : eps(static_cast<float>(eps)),
        floor(static_cast<float>(eps) > 0x1p-126f ? static_cast<float>(eps) : 0x1p-126f),
        threshold(static_cast<float>(delta / std::sqrt(length))) {}

  // Every comparison with a NaN is false, so that one of them keeps the view from firing.
  SLIMSTATE_HD bool orthogonal(Dots x) const {
    const float g = sqrtf(x.gg), w = sqrtf(x.ww);
    return fabsf(x.wg) / (g < floor ? floor : g) / (w < floor ? floor : w) < threshold;
  }

  SLIMSTATE_HD bool seen(Dots x) const { return sqrtf(x.gg) > eps && sqrtf(x.ww) > eps; }

  // The multiple of the row that is its step's radial part.
  SLIMSTATE_HD float multiple(float ww, float wu) const {
    const float length = sqrtf(ww) + eps, square = length * length;
    return wu / (square < 0x1p-126f ? 0x1p-126f : square);
  }
};

// The factor of a row: its decay, and its step's radial part.
struct Factor {
  float plain = 1, decay = 0, lr = 0;

  Factor() = default;
  Factor(double lr, double decay, double wd_ratio)
      : plain(static_cast<float>(1 - lr * decay)),
        decay(static_cast<float>(lr * decay) * static_cast<float>(wd_ratio)),
        lr(static_cast<float>(lr)) {}

  SLIMSTATE_HD float fired(float radial) const { return 1 - decay + lr * radial; }
};

}  // namespace slimstate
