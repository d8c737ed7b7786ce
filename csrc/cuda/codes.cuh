// 8-bit codes in kernels: the maps in shared memory, and a warp for each block of 256 elements.
#pragma once
#include "codes.h"
#include "cuda/launch.cuh"

namespace slimstate::cuda {

__device__ const CodeMap code_maps[2] = {make_code_map(false), make_code_map(true)};

constexpr int lane_elements = code_block / 32;
constexpr int64_t warp_blocks = 4;  // that one warp goes through
constexpr int64_t cta_blocks = warp_blocks * (threads / 32);

// Copies a map; all threads of the block come here.
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

__device__ inline Pack<uint8_t, lane_elements> encode_pack(const Pack<float, lane_elements>& x, float scale,
                                                           const CodeMap& map) {
  Pack<uint8_t, lane_elements> codes;
  const float divisor = scale == 0 ? 1 : scale;
#pragma unroll
  for (int k = 0; k < lane_elements; ++k) codes[k] = nearest_code(x[k] / divisor, map);
  return codes;
}

__device__ inline Pack<float, lane_elements> decode_pack(const Pack<uint8_t, lane_elements>& codes, float scale,
                                                         const CodeMap& map) {
  Pack<float, lane_elements> x;
#pragma unroll
  for (int k = 0; k < lane_elements; ++k) x[k] = map.value[codes[k]] * scale;
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
