// Blocks of 8-bit codes: what kernels that update moments in place read and write them by.
#pragma once
#include <cstdint>

#include "codes.h"

namespace slimstate {

// x_i <- scale times the value of code i, n <= 256.
void decode_block(float* x, const uint8_t* codes, float scale, int64_t n, bool with_sign);

// Codes of x_i / scale, where scale is the largest magnitude among them (`largest`).
void encode_block(uint8_t* codes, const float* x, float scale, int64_t n, bool with_sign);

// Likewise with a divisor for each: largest magnitudes, and 1 in the place of 0.
void encode_each(uint8_t* codes, const float* x, const float* divisor, int64_t n, bool with_sign);

// The largest magnitude; NaN if any is.
float largest(const float* x, int64_t n);

}  // namespace slimstate
