// How weights of each format are read into float32 arithmetic and written back, as csrc/python/ops/weights.py states it:
// to nearest, stochastically, or with what rounding took away kept beside them ("low", 16 bits).
#pragma once
#include "rounding.h"

namespace slimstate {

SLIMSTATE_HD float widen_bfloat16(uint16_t w) { return bits_float(static_cast<uint32_t>(w) << 16); }

SLIMSTATE_HD uint16_t nearest_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffU) > 0x7f800000U) return 0x7fc0U;
  return static_cast<uint16_t>((bits + 0x7fffU + (bits >> 16 & 1U)) >> 16);
}

SLIMSTATE_HD float widen_half(uint16_t w) {
  const uint32_t sign = static_cast<uint32_t>(w & 0x8000U) << 16, a = static_cast<uint32_t>(w & 0x7fffU) << 13;
  uint32_t bits = a + 0x38000000U;            // the exponent's other bias, 127 - 15
  if (a >= 0x0f800000U) bits += 0x38000000U;  // infinities and NaN
  // Below 2^-14: the significand as a normal number less its hidden bit, which needs no subnormal float32.
  if (a < 0x00800000U) bits = float_bits(bits_float(bits + 0x00800000U) - bits_float(0x38800000U));
  return bits_float(bits | sign);
}

SLIMSTATE_HD uint16_t nearest_half(float x) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000U, a = bits & 0x7fffffffU;
  uint32_t rounded = (a - 0x38000000U + 0xfffU + (a >> 13 & 1U)) >> 13;
  if (a < 0x38800000U) rounded = float_bits(bits_float(a) + 0.5F) - 0x3f000000U;  // 0.5 counts in units of 2^-24
  if (a >= 0x477ff000U) rounded = 0x7c00U;
  if (a > 0x7f800000U) rounded = 0x7e00U;
  return static_cast<uint16_t>(sign | rounded);
}

// One format each: `Bits` is how it is stored, and `random`, `low` say what else reading and writing go by.

struct Float32Weight {
  using Bits = float;
  static constexpr bool random = false, low = false;
  static SLIMSTATE_HD float widen(float w, int16_t) { return w; }
  static SLIMSTATE_HD float narrow(float x, uint32_t, int16_t&) { return x; }
};

struct BFloat16Nearest {
  using Bits = uint16_t;
  static constexpr bool random = false, low = false;
  static SLIMSTATE_HD float widen(uint16_t w, int16_t) { return widen_bfloat16(w); }
  static SLIMSTATE_HD uint16_t narrow(float x, uint32_t, int16_t&) { return nearest_bfloat16(x); }
};

struct BFloat16Stochastic : BFloat16Nearest {
  static constexpr bool random = true;
  static SLIMSTATE_HD uint16_t narrow(float x, uint32_t bits, int16_t&) { return BFloat16::round(x, bits); }
};

struct BFloat16Compensated {
  using Bits = uint16_t;
  static constexpr bool random = false, low = true;
  static SLIMSTATE_HD float widen(uint16_t w, int16_t rest) {
    return bits_float((static_cast<uint32_t>(w) << 16) + static_cast<uint32_t>(static_cast<int32_t>(rest)));
  }
  static SLIMSTATE_HD uint16_t narrow(float x, uint32_t, int16_t& rest) {
    uint32_t bits = float_bits(x);
    if ((bits & 0x7fffffffU) > 0x7f800000U) bits = 0x7fc00000U;
    const uint32_t high = (bits + 0x8000U) >> 16;
    rest = static_cast<int16_t>(bits - (high << 16));
    return static_cast<uint16_t>(high);
  }
};

struct HalfNearest {
  using Bits = uint16_t;
  static constexpr bool random = false, low = false;
  static SLIMSTATE_HD float widen(uint16_t w, int16_t) { return widen_half(w); }
  static SLIMSTATE_HD uint16_t narrow(float x, uint32_t, int16_t&) { return nearest_half(x); }
};

struct HalfStochastic : HalfNearest {
  static constexpr bool random = true;
  static SLIMSTATE_HD uint16_t narrow(float x, uint32_t bits, int16_t&) { return Half::round(x, bits); }
};

struct HalfCompensated {
  using Bits = uint16_t;
  static constexpr bool random = false, low = true;
  // The exponent (of 2^-14 at least) of a float16 number, in a float32's field. Its rest counts in units of 2^-26 of it.
  static SLIMSTATE_HD uint32_t exponent(float w) {
    const uint32_t field = float_bits(w) >> 23 & 0xffU;
    return field > 113U ? field : 113U;
  }
  static SLIMSTATE_HD float widen(uint16_t w, int16_t rest) {
    const float x = widen_half(w);
    return x + static_cast<float>(rest) * bits_float((exponent(x) - 26U) << 23);
  }
  static SLIMSTATE_HD uint16_t narrow(float x, uint32_t, int16_t& rest) {
    const uint16_t w = nearest_half(x);
    const float wide = widen_half(w);
    float units = (x - wide) * bits_float((254U + 26U - exponent(wide)) << 23);
    if (!(units > -3.4e38F && units < 3.4e38F)) units = 0.0F;
    units = units < -32768.0F ? -32768.0F : units > 32767.0F ? 32767.0F : units;
    rest = static_cast<int16_t>(static_cast<int32_t>((units + 12582912.0F) - 12582912.0F));  // ties to even
    return w;
  }
};

}  // namespace slimstate
