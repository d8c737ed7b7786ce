// Blocks of 8-bit codes: what kernels that update moments in place read and write them by.
#pragma once
#include <cstdint>

#include "codes.h"

namespace slimstate {

// A block whose codes are to be read: x_i <- the value of code i, without the scale.
struct Lookup {
  float* x = nullptr;
  const uint8_t* codes = nullptr;
  int64_t n = 0;
};

void look_up(const Lookup& block, bool with_sign);

// Codes of x_i / scale, where scale is the largest magnitude among them (`largest`), n <= 256. Reading codes keeps other
// parts of a processor busy than finding them: where there is a next block, both at once take little longer than one.
void encode_block(uint8_t* codes, const float* x, float scale, int64_t n, bool with_sign, const Lookup& next = {});

// Likewise with a divisor for each: largest magnitudes, and 1 in the place of 0.
void encode_each(uint8_t* codes, const float* x, const float* divisor, int64_t n, bool with_sign);

// The largest magnitude; NaN if any is.
float largest(const float* x, int64_t n);

}  // namespace slimstate
