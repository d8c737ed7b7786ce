// Companded codes of many numbers. Every file that includes this has functions of its own, since those for several levels
// of processors (`SLIMSTATE_CLONES`) cannot be merged when files are linked.
#pragma once
#include "codes.h"
#include "cpu/avx2.h"

namespace slimstate {
namespace {

template <bool with_sign>
SLIMSTATE_CLONES void expand_some(float* x, const int8_t* codes, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = Companded<with_sign>::value(codes[i]);
}

template <bool with_sign, bool each>
SLIMSTATE_CLONES void compand_some(int8_t* codes, const float* x, const float* factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) codes[i] = Companded<with_sign>::code(x[i] * factor[each ? i : 0]);
}

#ifdef SLIMSTATE_AVX2

// A root times the number of levels is the exponent's business.
template <bool with_sign>
constexpr int about_in_levels = Companded<with_sign>::about + ((with_sign ? 7 : 8) << 23);

template <bool with_sign>
AVX2_FUNCTION void expand_avx2(float* x, const int8_t* codes, int64_t n) {
  using Codes = Companded<with_sign>;
  const __m256i about = _mm256_set1_epi32(about_in_levels<with_sign>);
  const __m256i sign = _mm256_set1_epi32(INT32_MIN), first = _mm256_set1_epi32(Codes::first);
  for (int64_t i = 0; i < n; i += 8) {
    const __m256i own = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
    const __m256i level = with_sign ? _mm256_abs_epi32(own) : _mm256_add_epi32(own, first);
    const __m256i bits = _mm256_castps_si256(_mm256_cvtepi32_ps(level));
    // Of 0 it is the upper half that stays 0; the lower one of `about` is 0.
    __m256i value = _mm256_slli_epi32(_mm256_subs_epu16(bits, about), Codes::halvings);
    if (with_sign) value = _mm256_or_si256(value, _mm256_and_si256(own, sign));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x + i), value);
  }
}

template <bool with_sign, bool each>
AVX2_FUNCTION void compand_avx2(int8_t* codes, const float* x, const float* factor, int64_t n) {
  using Codes = Companded<with_sign>;
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(INT32_MAX)), all = _mm256_set1_ps(factor[0]);
  const __m256i about = _mm256_set1_epi32(about_in_levels<with_sign>), first = _mm256_set1_epi16(Codes::first);
  const __m256i lanes = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t i = 0; i < n; i += 32) {
    __m256i level[4];
    for (int k = 0; k < 4; ++k) {
      const __m256 own = _mm256_loadu_ps(x + i + 8 * k);
      const __m256 by = each ? _mm256_loadu_ps(factor + i + 8 * k) : all;
      const __m256i bits = _mm256_castps_si256(_mm256_mul_ps(_mm256_and_ps(own, magnitude), by));
      const __m256i root = _mm256_add_epi32(_mm256_srli_epi32(bits, Codes::halvings), about);
      level[k] = _mm256_cvtps_epi32(_mm256_castsi256_ps(root));
      if (with_sign) level[k] = _mm256_sign_epi32(level[k], _mm256_castps_si256(own));
    }
    // Where there is no level 0, packing makes it the first one.
    const __m256i low = _mm256_sub_epi16(_mm256_packs_epi32(level[0], level[1]), first);
    const __m256i high = _mm256_sub_epi16(_mm256_packs_epi32(level[2], level[3]), first);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), lanes);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), bytes);
  }
}

#endif

// x_i <- the value of code i, without the scale.
template <bool with_sign>
void expand(float* x, const int8_t* codes, int64_t n) {
  int64_t done = 0;
#ifdef SLIMSTATE_AVX2
  if (has_avx2()) expand_avx2<with_sign>(x, codes, done = n - n % 8);
#endif
  expand_some<with_sign>(x + done, codes + done, n - done);
}

// Codes of x_i, with the factor of its block (`factor_of`), or one for each.
template <bool with_sign, bool each>
void compand(int8_t* codes, const float* x, const float* factor, int64_t n) {
  int64_t done = 0;
#ifdef SLIMSTATE_AVX2
  if (has_avx2()) compand_avx2<with_sign, each>(codes, x, factor, done = n - n % 32);
#endif
  compand_some<with_sign, each>(codes + done, x + done, factor + (each ? done : 0), n - done);
}

}  // namespace
}  // namespace slimstate
