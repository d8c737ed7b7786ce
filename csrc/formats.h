// bfloat16 and float16 as float32 and back: to nearest, and with the 16 bits that rounding takes away. The same bits as
// projections/_rounding.py.
#pragma once
#include <torch/headeronly/util/Half.h>

#include "rounding.h"

namespace slimstate {

SLIMSTATE_HD float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

SLIMSTATE_HD float value(BFloat16, uint16_t code) { return bits_float(static_cast<uint32_t>(code) << 16); }
SLIMSTATE_HD float value(Half, uint16_t code) { return torch::headeronly::detail::fp16_ieee_to_fp32_value(code); }

SLIMSTATE_HD uint16_t nearest(BFloat16, float x) {
  const uint32_t bits = float_bits(x);
  const bool nan = (bits & 0x7fffffffU) > 0x7f800000U;
  return nan ? 0x7fc0U : static_cast<uint16_t>((bits + 0x7fffU + (bits >> 16 & 1U)) >> 16);
}

SLIMSTATE_HD uint16_t nearest(Half, float x) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000U, a = bits & 0x7fffffffU;
  // As in Half::round, but ties go to the even neighbour; what is shifted out below is far from a tie.
  const uint32_t exponent = a >> 23, scale = exponent > 113 ? exponent : 113, shift = 13 + scale - exponent;
  const uint64_t fixed = static_cast<uint64_t>((a & 0x7fffffU) | 0x800000U) << 32 >> (shift < 63 ? shift : 63);
  const uint64_t up = 0x7fffffffU + (fixed >> 32 & 1U);
  uint32_t rounded = ((scale - 113) << 10) + static_cast<uint32_t>((fixed + up) >> 32);
  if (a >= 0x477ff000U) rounded = 0x7c00U;
  if (a > 0x7f800000U) rounded = 0x7e00U;
  return static_cast<uint16_t>(sign | rounded);
}

// A float32 number as a code and what the code leaves of it.
struct Split {
  uint16_t code;
  int16_t low;
};

SLIMSTATE_HD float joined(BFloat16, Split x) {
  return bits_float((static_cast<uint32_t>(x.code) << 16) + static_cast<uint32_t>(static_cast<int32_t>(x.low)));
}

SLIMSTATE_HD Split split(BFloat16, float x) {
  uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffU) > 0x7f800000U) bits = 0x7fc00000U;
  const uint32_t high = (bits + 0x8000U) >> 16;
  return {static_cast<uint16_t>(high), static_cast<int16_t>(static_cast<uint16_t>(bits - (high << 16)))};
}

// The exponent, as float32 has it, of 2^-16 of a float16's unit in the last place.
SLIMSTATE_HD uint32_t unit_exponent(uint16_t code) {
  const uint32_t exponent = code >> 10 & 31U;
  return (exponent > 1 ? exponent : 1) + 127 - 41;
}

SLIMSTATE_HD float joined(Half, Split x) {
  return value(Half{}, x.code) + static_cast<float>(x.low) * bits_float(unit_exponent(x.code) << 23);
}

SLIMSTATE_HD Split split(Half, float x) {
  const uint16_t code = nearest(Half{}, x);
  float rest = (x - value(Half{}, code)) * bits_float((254 - unit_exponent(code)) << 23);
  if (!(rest > -65536.0f && rest < 65536.0f)) rest = 0;  // of an infinity or NaN nothing is left
  rest = (rest + 12582912.0f) - 12582912.0f;             // 3 * 2^22: rounds to an integer, ties to even
  rest = rest < -32768.0f ? -32768.0f : rest > 32767.0f ? 32767.0f : rest;
  return {code, static_cast<int16_t>(static_cast<int32_t>(rest))};
}

}  // namespace slimstate
