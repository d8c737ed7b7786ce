// 8-bit codes in kernels: the maps in shared memory, and a warp for each block of 256 elements.
#pragma once
#include "codes.h"
#include "cuda/launch.cuh"

namespace slimstate::cuda {

__device__ const CodeMap code_maps[2] = {make_code_map(false), make_code_map(true)};

constexpr int lane_elements = code_block / 32;
constexpr int64_t warp_blocks = 4;  // that one warp goes through
constexpr int64_t cta_blocks = warp_blocks * (threads / 32);

__device__ inline void stage_map(CodeMap& target, bool with_sign) {
  for (int i = threadIdx.x; i < 256; i += threads) {
    target.value[i] = code_maps[with_sign].value[i];
    target.between[i] = code_maps[with_sign].between[i];
  }
  __syncthreads();
}

// The largest magnitude among a warp's elements; NaN if any is.
__device__ inline float warp_largest(const Pack<float, lane_elements>& x) {
  float most = 0;
#pragma unroll
  for (int k = 0; k < lane_elements; ++k) most = Max{}(fabsf(x[k]), most);
  return warp_reduce(most, Max{});
}

// What finds and reads codes, of numbers with a sign or of others; dynamic ones need room for a map.

class Dynamic {
 public:
  using Bits = uint8_t;
  using Room = CodeMap;

  // All threads of the block come here.
  __device__ Dynamic(Room& room, bool with_sign) : map_(room) { stage_map(room, with_sign); }

  static constexpr CodeKind kind(bool with_sign) { return {false, with_sign}; }
  __device__ float value(uint8_t code) const { return map_.value[code]; }
  __device__ uint8_t code(float x, float factor) const { return nearest_code(x / factor, map_); }

 private:
  const CodeMap& map_;
};

class Companding {
 public:
  using Bits = int8_t;
  struct Room {};

  __device__ Companding(Room&, bool with_sign) : with_sign_(with_sign) {}

  static constexpr CodeKind kind(bool with_sign) { return {true, with_sign}; }
  __device__ float value(int8_t code) const {
    return with_sign_ ? Companded<true>::value(code) : Companded<false>::value(code);
  }
  __device__ int8_t code(float x, float factor) const {
    return with_sign_ ? Companded<true>::code(x * factor) : Companded<false>::code(x * factor);
  }

 private:
  bool with_sign_;
};

template <typename Codes>
__device__ Pack<typename Codes::Bits, lane_elements> encode_pack(const Pack<float, lane_elements>& x, float factor,
                                                                 const Codes& how) {
  Pack<typename Codes::Bits, lane_elements> codes;
#pragma unroll
  for (int k = 0; k < lane_elements; ++k) codes[k] = how.code(x[k], factor);
  return codes;
}

template <typename Codes>
__device__ Pack<float, lane_elements> decode_pack(const Pack<typename Codes::Bits, lane_elements>& codes, float scale,
                                                  const Codes& how) {
  Pack<float, lane_elements> x;
#pragma unroll
  for (int k = 0; k < lane_elements; ++k) x[k] = how.value(codes[k]) * scale;
  return x;
}

// Where the elements of a thread in a block of codes lie.
struct LanePack {
  int64_t start, left;  // of them `left` are there, 0 or less if none is

  __device__ LanePack(int64_t block, int64_t length) {
    const int64_t in_run = (length + code_block - 1) / code_block;
    const int64_t at = block % in_run * code_block + threadIdx.x % 32 * lane_elements;
    start = block / in_run * length + at;
    left = length - at;
  }
};

}  // namespace slimstate::cuda
