// 8-bit codes of one number, dynamic (Dettmers et al., 2022) or companded, for the CPU and CUDA alike: see
// python/ops/codes.py.
#pragma once
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

#include "rounding.h"

namespace slimstate {

constexpr int64_t code_block = 256;  // elements that share a scale

// Which numbers the 256 codes stand for: of which format, and of either sign or none below 0.
struct CodeKind {
  bool companded, with_sign;
};

// Dynamic codes.

constexpr int code_decades = 7;

// How many equal parts of [0.1, 1] have their middles, times 10^(decade - 6), in the map; with a sign in both halves.
constexpr int parts_of_decade(int decade, bool with_sign) { return with_sign ? 1 << decade : 2 << decade; }

struct CodeMap {
  float value[256];    // ascending
  float between[256];  // the code of x is the number of these below x; the last is infinite
};

constexpr CodeMap make_code_map(bool with_sign) {
  CodeMap map{};
  constexpr double tenths[code_decades] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
  const int zero = with_sign ? 127 : 0;
  int code = zero;
  map.value[code++] = 0;
  for (int decade = 0; decade < code_decades; ++decade) {
    const int parts = parts_of_decade(decade, with_sign);
    const double low = 0.1F, width = (1.0F - 0.1F) / static_cast<float>(parts);
    float edge = 0.1F;
    for (int j = 1; j <= parts; ++j) {  // torch.linspace, which rounds once, and counts from the nearer end
      const float next = static_cast<float>(j < (parts + 1) / 2 ? low + width * j : 1 - width * (parts - j));
      map.value[code++] = (next + edge) / 2 * static_cast<float>(tenths[decade]);
      edge = next;
    }
  }
  map.value[code] = 1;
  for (int c = 0; c < zero; ++c) map.value[c] = -map.value[2 * zero - c];
  for (int c = 0; c < 255; ++c) {
    map.between[c] = (map.value[c + 1] + map.value[c]) / 2;
    // Half way between two negative numbers, too, it is the one of smaller magnitude.
    if (map.between[c] < 0) map.between[c] = std::bit_cast<float>(std::bit_cast<uint32_t>(map.between[c]) + 1);
  }
  map.between[255] = std::numeric_limits<float>::infinity();
  return map;
}

// The code of the value that is nearest to x.
SLIMSTATE_HD uint8_t nearest_code(float x, const CodeMap& map) {
  int code = 0;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int step = 128; step > 0; step /= 2) code += x > map.between[code + step - 1] ? step : 0;
  return static_cast<uint8_t>(code);
}

// Companded codes: linear in the square root of a magnitude, without a sign in its fourth root. Between powers of four
// straight lines stand for the root: half of the bits of a float, about those of 1.

template <bool with_sign>
struct Companded {
  static constexpr int halvings = with_sign ? 1 : 2;
  static constexpr float levels = with_sign ? 128 : 256;
  static constexpr float largest = with_sign ? 63.0F / 64 : 1;  // value of the last code, 127 levels or 256
  static constexpr int first = with_sign ? 0 : 129;             // levels of the code 0
  static constexpr uint32_t one = 127U << 23, about = one - (one >> halvings);

  static SLIMSTATE_HD float value(int8_t code) {
    const int level = code + first;
    const float root = static_cast<float>(with_sign && level < 0 ? -level : level) * (1 / levels);
    const float magnitude = level == 0 ? 0 : bits_float((float_bits(root) - about) << halvings);
    return level < 0 ? -magnitude : magnitude;
  }

  // Of x at most `largest` in magnitude. A second moment that is not zero must never become it.
  static SLIMSTATE_HD int8_t code(float x) {
    constexpr float to_integer = 3 << 22;  // of what is added to it the last bits are the nearest integer
    const float level = bits_float((float_bits(fabsf(x)) >> halvings) + about) * levels;
    const float own = with_sign ? copysignf(level, x) : level > 1 ? level : 1;
    return static_cast<int8_t>(float_bits(own + to_integer) - first);
  }
};

// A block's scale, and what its numbers are multiplied by before codes are found (companded) or divided by.

SLIMSTATE_HD float scale_of(float largest, CodeKind kind) {
  if (!kind.companded) return largest;
  return largest < FLT_MIN ? 0 : largest / (kind.with_sign ? Companded<true>::largest : Companded<false>::largest);
}

SLIMSTATE_HD float factor_of(float scale, CodeKind kind) {
  if (scale == 0) return kind.companded ? 0 : 1;
  return kind.companded ? 1 / scale : scale;
}

}  // namespace slimstate
