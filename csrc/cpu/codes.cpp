#include "cpu/blocks.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>

#include "adamw.h"
#include "cpu/avx2.h"
#include "cpu/clones.h"

using torch::stable::Tensor;

namespace slimstate {
namespace {

constexpr CodeMap maps[2] = {make_code_map(false), make_code_map(true)};

void nearest_codes(uint8_t* codes, const float* x, const float* divisor, int64_t stride, int64_t n, bool with_sign) {
  for (int64_t i = 0; i < n; ++i) codes[i] = nearest_code(x[i] / divisor[i * stride], maps[with_sign]);
}

// One by one: compilers make vectors of these, element by element, in twice the time.
template <int64_t count>
inline void look_up_some(float* x, const uint8_t* codes, const float* values) {
#ifdef __GNUC__
#pragma GCC unroll 16
#endif
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits = float_bits(values[codes[i]]);
#ifdef __GNUC__
    asm("" : "+r"(bits));
#endif
    memcpy(x + i, &bits, sizeof bits);
  }
}

#ifdef SLIMSTATE_AVX2

// Positions among the magnitudes, 0 for 0, are linear within a decade: eight lines, in the order of magnitude, with
// what lies above `above[i]` on line i + 1 or higher. The eighth is the value 1 alone. Lines begin lower by `origin`,
// so that the code is what stands before the point: of the position without a sign, of 127.5 +- it with one.
struct Lines {
  float above[8], slope[8], start[8];
};

constexpr float unit = 1 << 16;  // fixed point: positions have 16 bits behind the point
constexpr int uncertain = 6;     // of these units positions may be off, by rounding here and in the map

constexpr double origin(bool with_sign) { return with_sign ? 0.5 : 1; }

constexpr Lines make_lines(bool with_sign) {
  Lines lines{};
  const CodeMap& map = maps[with_sign];
  const int zero = with_sign ? 127 : 0, first = with_sign ? 1 : 2;  // so that a decade begins at a power of two
  double scale = 1e-6;
  for (int i = 0; i < code_decades; ++i, scale *= 10) {
    const int parts = parts_of_decade(i, with_sign);
    double slope = parts / (0.9 * scale), start = parts * 8 / 9.0;
    if (i == 0) {  // its first value ends half way to zero, not where the decade does
      const double low = map.between[zero], high = map.between[zero + 1];
      slope = with_sign ? 0.3 / low : 1 / (high - low);
      start = first - slope * low;
    }
    lines.above[i] = map.between[zero + 2 * parts - 1 - (first - 1)];
    lines.slope[i] = static_cast<float>(slope * unit);
    lines.start[i] = static_cast<float>((start - origin(with_sign)) * unit + uncertain);
  }
  lines.above[7] = std::numeric_limits<float>::infinity();
  lines.start[7] = static_cast<float>(((with_sign ? 128.5 : 256.5) - origin(with_sign)) * unit);
  return lines;
}

constexpr Lines all_lines[2] = {make_lines(false), make_lines(true)};

// Codes of 32 numbers that may be one too high or too low.
void correct_codes(uint8_t* codes, const float* x, const float* divisor, int64_t stride, bool with_sign) {
  const float* between = maps[with_sign].between;
  for (int64_t i = 0; i < 32; ++i) {
    const float quotient = x[i] / divisor[i * stride];
    const int code = codes[i];
    const int higher = quotient > between[code], lower = code > 0 && !(quotient > between[code - 1]);
    codes[i] = static_cast<uint8_t>(code + higher - lower);
  }
}

// Codes of 32 numbers at a time, four vectors in step. Where a position comes so close to the next one that rounding
// could tell, all 32 are compared with what lies between the values, too. With `ahead` as many codes of the next block
// are looked up.
template <bool with_sign, bool each, bool ahead>
AVX2_FUNCTION void encode_avx2(uint8_t* codes, const float* x, const float* divisor, int64_t n, const Lookup& next) {
  constexpr int half = 1 << 15;
  const float* values = maps[with_sign].value;
  const Lines& lines = all_lines[with_sign];
  const __m256 above = _mm256_loadu_ps(lines.above), slope = _mm256_loadu_ps(lines.slope);
  const __m256 start = _mm256_loadu_ps(lines.start), one = _mm256_set1_ps(divisor[0]);
  // A decade's last value goes on into the next: from 8/9 of its parts a position ends just below twice as many.
  const __m256 ends = _mm256_set1_ps(2.248F);
  const __m256 beyond = _mm256_set1_ps(static_cast<float>(1.248 * unit * origin(with_sign)));
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const __m256i in_lane = _mm256_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15,  //
                                           0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const __m256i lanes = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  // Behind the point, in the lower word, two values are equally near at 0, or with a sign at a half, the
  // least number of 16 bits either way.
  const __m256i close = _mm256_set1_epi32(with_sign ? -half * 0xffff + 2 * uncertain + 1 : 2 * uncertain + 1);
  for (int64_t i = 0; i < n; i += 32) {
    __m256 a[4], from[4], y[4];
    __m256i at[4];
    for (int k = 0; k < 4; ++k) {
      a[k] = _mm256_and_ps(_mm256_loadu_ps(x + i + 8 * k), magnitude);
      a[k] = _mm256_div_ps(a[k], each ? _mm256_loadu_ps(divisor + i + 8 * k) : one);
    }
    // The upper half of a number's bits is close enough to its logarithm for the line, or the one below it.
    for (int k = 0; k < 4; k += 2) {
      const __m256i lower = _mm256_srli_epi32(_mm256_castps_si256(a[k]), 16);
      const __m256i bits = _mm256_blend_epi16(lower, _mm256_castps_si256(a[k + 1]), 0xaa);
      at[k] = _mm256_mulhi_epu16(_mm256_subs_epu16(bits, _mm256_set1_epi16(0x3500)), _mm256_set1_epi16(159));
      at[k + 1] = _mm256_srli_epi32(at[k], 16);
    }
    if constexpr (ahead) look_up_some<16>(next.x + i, next.codes + i, values);
    for (int k = 0; k < 4; ++k) {
      const __m256 higher = _mm256_cmp_ps(a[k], _mm256_permutevar8x32_ps(above, at[k]), _CMP_GT_OQ);
      at[k] = _mm256_sub_epi32(at[k], _mm256_castps_si256(higher));
    }
    for (int k = 0; k < 4; ++k) {
      from[k] = _mm256_permutevar8x32_ps(start, at[k]);
      y[k] = _mm256_fmadd_ps(a[k], _mm256_permutevar8x32_ps(slope, at[k]), from[k]);
    }
    for (int k = 0; k < 4; ++k) at[k] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_fmadd_ps(from[k], ends, beyond), y[k]));
    if constexpr (ahead) look_up_some<16>(next.x + i + 16, next.codes + i + 16, values);
    __m256i rest = at[0];
    for (int k = 1; k < 4; ++k) rest = with_sign ? _mm256_min_epi16(rest, at[k]) : _mm256_min_epu16(rest, at[k]);
    if (with_sign) {
      for (int k = 0; k < 4; ++k) {
        const __m256i sign = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i + 8 * k));
        at[k] = _mm256_add_epi32(_mm256_sign_epi32(at[k], sign), _mm256_set1_epi32(255 * half));
      }
    }
    const __m256i low = _mm256_blend_epi16(_mm256_srli_epi32(at[0], 16), at[1], 0xaa);
    const __m256i high = _mm256_blend_epi16(_mm256_srli_epi32(at[2], 16), at[3], 0xaa);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_packus_epi16(low, high), in_lane);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), _mm256_permutevar8x32_epi32(bytes, lanes));
    const __m256i most = with_sign ? _mm256_max_epi16(rest, close) : _mm256_max_epu16(rest, close);
    if (_mm256_movemask_epi8(_mm256_cmpeq_epi16(most, rest)) != -1) {
      correct_codes(codes + i, x + i, divisor + (each ? i : 0), each, with_sign);
    }
  }
}

#endif

template <bool with_sign, bool each>
void encode(uint8_t* codes, const float* x, const float* divisor, int64_t n, const Lookup& next) {
  int64_t done = 0, looked_up = 0;
#ifdef SLIMSTATE_AVX2
  if (has_avx2()) {
    done = n - n % 32;
    if (!each && done <= next.n) {
      encode_avx2<with_sign, false, true>(codes, x, divisor, done, next);
      looked_up = done;
    } else {
      encode_avx2<with_sign, each, false>(codes, x, divisor, done, next);
    }
  }
#endif
  nearest_codes(codes + done, x + done, divisor + (each ? done : 0), each, n - done, with_sign);
  look_up_dynamic({next.x + looked_up, next.codes + looked_up, next.n - looked_up}, with_sign);
}

}  // namespace

SLIMSTATE_CLONES float largest(const float* x, int64_t n) {
  uint32_t most = 0;  // of magnitudes the bits are in the order of the numbers, and NaN is above them
  for (int64_t i = 0; i < n; ++i) most = std::max(most, float_bits(x[i]) & 0x7fffffffU);
  return std::bit_cast<float>(most);
}

void look_up_dynamic(const Lookup& block, bool with_sign) {
  const float* values = maps[with_sign].value;
  int64_t i = 0;
  for (; i + 16 <= block.n; i += 16) look_up_some<16>(block.x + i, block.codes + i, values);
  for (; i < block.n; ++i) block.x[i] = values[block.codes[i]];
}

void encode_dynamic(uint8_t* codes, const float* x, float divisor, int64_t n, bool with_sign, const Lookup& next) {
  with_sign ? encode<true, false>(codes, x, &divisor, n, next) : encode<false, false>(codes, x, &divisor, n, next);
}

void encode_dynamic_each(uint8_t* codes, const float* x, const float* divisor, int64_t n, bool with_sign) {
  with_sign ? encode<true, true>(codes, x, divisor, n, {}) : encode<false, true>(codes, x, divisor, n, {});
}

}  // namespace slimstate

namespace {

using slimstate::code_block;
using slimstate::CodeKind;
using slimstate::CodeRuns;

SLIMSTATE_CLONES void larger_of_each(float* most, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t a = slimstate::float_bits(most[i]), b = slimstate::float_bits(x[i]) & 0x7fffffffU;
    most[i] = std::bit_cast<float>(std::max(a, b));
  }
}

SLIMSTATE_CLONES void times(float* x, float scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= scale;
}

SLIMSTATE_CLONES void times_each(float* x, const float* scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= scale[i];
}

// Calls step(first element, how many along the run, scale, how many beside it) for pieces of the tensor: a block of a
// run, or 256 neighbouring blocks of as many runs.
template <typename Step>
void for_each_piece(const CodeRuns& runs, const Step& step) {
  const int64_t blocks = slimstate::blocks_of_run(runs.length);
  const int64_t beside = (runs.inner + code_block - 1) / code_block;
  torch::stable::parallel_for(0, runs.outer * blocks * beside, 64, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t column = piece % beside * code_block, block = piece / beside % blocks;
      const int64_t outer = piece / beside / blocks, row = block * code_block;
      step((outer * runs.length + row) * runs.inner + column, std::min(code_block, runs.length - row),
           (outer * blocks + block) * runs.inner + column, std::min(code_block, runs.inner - column));
    }
  });
}

void encode_(Tensor codes, Tensor scale, Tensor x, bool with_sign, bool columns) {
  const CodeRuns runs = slimstate::check_codes("encode_", codes, scale, x, columns);
  const CodeKind kind = slimstate::code_kind(codes, with_sign);
  auto* target = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* scales = static_cast<float*>(scale.mutable_data_ptr());
  const auto* source = static_cast<const float*>(x.const_data_ptr());
  for_each_piece(runs, [&](int64_t first, int64_t rows, int64_t at, int64_t width) {
    if (runs.inner == 1) {
      scales[at] = slimstate::scale_of(slimstate::largest(source + first, rows), kind);
      slimstate::encode_block(target + first, source + first, scales[at], rows, kind);
      return;
    }
    float most[code_block] = {}, factors[code_block];
    for (int64_t i = 0; i < rows; ++i) larger_of_each(most, source + first + i * runs.inner, width);
    for (int64_t j = 0; j < width; ++j) {
      scales[at + j] = slimstate::scale_of(most[j], kind);
      factors[j] = slimstate::factor_of(scales[at + j], kind);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = first + i * runs.inner;
      slimstate::encode_each(target + row, source + row, factors, width, kind);
    }
  });
}

void decode_(Tensor x, Tensor codes, Tensor scale, bool with_sign, bool columns) {
  const CodeRuns runs = slimstate::check_codes("decode_", codes, scale, x, columns);
  const CodeKind kind = slimstate::code_kind(codes, with_sign);
  const auto* source = static_cast<const uint8_t*>(codes.const_data_ptr());
  const auto* scales = static_cast<const float*>(scale.const_data_ptr());
  auto* target = static_cast<float*>(x.mutable_data_ptr());
  for_each_piece(runs, [&](int64_t first, int64_t rows, int64_t at, int64_t width) {
    if (runs.inner == 1) {
      slimstate::look_up({target + first, source + first, rows}, kind);
      times(target + first, scales[at], rows);
      return;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = first + i * runs.inner;
      slimstate::look_up({target + row, source + row, width}, kind);
      times_each(target + row, scales + at, width);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CPU, m) {
  m.impl("encode_", TORCH_BOX(&encode_));
  m.impl("decode_", TORCH_BOX(&decode_));
}
