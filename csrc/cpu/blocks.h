// Blocks of 8-bit codes: what kernels that update moments in place read and write them by.
#pragma once
#include <cstdint>

#include "codes.h"
#include "cpu/companded.h"

namespace slimstate {

// A block whose codes are to be read: x_i <- the value of code i, without the scale.
struct Lookup {
  float* x = nullptr;
  const uint8_t* codes = nullptr;
  int64_t n = 0;
};

// Of dynamic codes what the functions below do of any. Reading them keeps other parts of a processor busy than finding
// them: where there is a next block, both at once take little longer than one.
void look_up_dynamic(const Lookup& block, bool with_sign);
void encode_dynamic(uint8_t* codes, const float* x, float divisor, int64_t n, bool with_sign, const Lookup& next);
void encode_dynamic_each(uint8_t* codes, const float* x, const float* divisor, int64_t n, bool with_sign);

static inline void look_up(const Lookup& block, CodeKind kind) {
  if (!kind.companded) return look_up_dynamic(block, kind.with_sign);
  const auto* codes = reinterpret_cast<const int8_t*>(block.codes);
  kind.with_sign ? expand<true>(block.x, codes, block.n) : expand<false>(block.x, codes, block.n);
}

// Codes of x_i in a block of this scale (`scale_of`), n <= 256; and looks the next block up.
static inline void encode_block(uint8_t* codes, const float* x, float scale, int64_t n, CodeKind kind,
                                const Lookup& next = {}) {
  const float factor = factor_of(scale, kind);
  if (!kind.companded) return encode_dynamic(codes, x, factor, n, kind.with_sign, next);
  look_up(next, kind);
  auto* own = reinterpret_cast<int8_t*>(codes);
  kind.with_sign ? compand<true, false>(own, x, &factor, n) : compand<false, false>(own, x, &factor, n);
}

// Likewise with a factor (`factor_of`) for each.
static inline void encode_each(uint8_t* codes, const float* x, const float* factor, int64_t n, CodeKind kind) {
  if (!kind.companded) return encode_dynamic_each(codes, x, factor, n, kind.with_sign);
  auto* own = reinterpret_cast<int8_t*>(codes);
  kind.with_sign ? compand<true, true>(own, x, factor, n) : compand<false, true>(own, x, factor, n);
}

// The largest magnitude; NaN if any is.
float largest(const float* x, int64_t n);

}  // namespace slimstate
