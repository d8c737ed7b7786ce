#include "cuda/codes.cuh"

#include <torch/csrc/stable/library.h>

#include "adamw.h"

using slimstate::code_block;
using slimstate::CodeMap;
using slimstate::CodeRuns;
using torch::stable::Tensor;

namespace {

using namespace slimstate::cuda;

// Of runs that are contiguous: a warp for each block.

__global__ void encode_runs(uint8_t* codes, float* scale, const float* x, int64_t blocks, int64_t length,
                            bool with_sign) {
  __shared__ CodeMap map;
  stage_map(map, with_sign);
  const bool wide = aligned(codes, x) && length % lane_elements == 0;
  for (int64_t i = 0; i < warp_blocks; ++i) {
    const int64_t block = blockIdx.x * cta_blocks + i * (threads / 32) + threadIdx.x / 32;
    if (block >= blocks) break;  // the whole warp
    const LanePack own(block, length);
    const auto values = load<lane_elements>(x + own.start, own.left, wide);
    const float most = warp_largest(values);
    if (threadIdx.x % 32 == 0) scale[block] = most;
    store(codes + own.start, encode_pack(values, most, map), own.left, wide);
  }
}

__global__ void decode_runs(float* x, const uint8_t* codes, const float* scale, int64_t blocks, int64_t length,
                            bool with_sign) {
  __shared__ CodeMap map;
  stage_map(map, with_sign);
  const bool wide = aligned(codes, x) && length % lane_elements == 0;
  for (int64_t i = 0; i < warp_blocks; ++i) {
    const int64_t block = blockIdx.x * cta_blocks + i * (threads / 32) + threadIdx.x / 32;
    if (block >= blocks) break;
    const LanePack own(block, length);
    const auto found = load<lane_elements>(codes + own.start, own.left, wide);
    store(x + own.start, decode_pack(found, scale[block], map), own.left, wide);
  }
}

// Of runs beside each other: a block of threads for 256 rows of 32 columns, a warp for 32 rows at a time.

struct Tile {
  int64_t first, at;  // the first element, and its scale
  int rows;
  bool inside;

  __device__ Tile(const CodeRuns& runs) {
    const int64_t beside = (runs.inner + 31) / 32, in_run = (runs.length + code_block - 1) / code_block;
    const int64_t column = blockIdx.x % beside * 32 + threadIdx.x % 32, block = blockIdx.x / beside;
    const int64_t row = block % in_run * code_block;
    first = (block / in_run * runs.length + row) * runs.inner + column;
    at = block * runs.inner + column;
    rows = static_cast<int>(min(code_block, runs.length - row));
    inside = column < runs.inner;
  }
};

__global__ void encode_columns(uint8_t* codes, float* scale, const float* x, CodeRuns runs, bool with_sign) {
  __shared__ CodeMap map;
  __shared__ float most[threads / 32][32];
  stage_map(map, with_sign);
  const Tile tile(runs);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float own = 0;
  for (int row = warp; tile.inside && row < tile.rows; row += threads / 32) {
    own = Max{}(fabsf(x[tile.first + row * runs.inner]), own);
  }
  most[warp][lane] = own;
  __syncthreads();
  float all = 0;
#pragma unroll
  for (int i = 0; i < threads / 32; ++i) all = Max{}(most[i][lane], all);
  if (tile.inside && warp == 0) scale[tile.at] = all;
  const float divisor = all == 0 ? 1 : all;
  for (int row = warp; tile.inside && row < tile.rows; row += threads / 32) {
    const int64_t i = tile.first + row * runs.inner;
    codes[i] = slimstate::nearest_code(x[i] / divisor, map);
  }
}

__global__ void decode_columns(float* x, const uint8_t* codes, const float* scale, CodeRuns runs, bool with_sign) {
  __shared__ CodeMap map;
  stage_map(map, with_sign);
  const Tile tile(runs);
  const float factor = tile.inside ? scale[tile.at] : 0;
  for (int row = threadIdx.x / 32; tile.inside && row < tile.rows; row += threads / 32) {
    const int64_t i = tile.first + row * runs.inner;
    x[i] = map.value[codes[i]] * factor;
  }
}

int64_t tiles(const CodeRuns& runs) {
  return runs.outer * slimstate::blocks_of_run(runs.length) * ((runs.inner + 31) / 32);
}

void encode_(Tensor codes, Tensor scale, Tensor x, bool with_sign, bool columns) {
  const CodeRuns runs = slimstate::check_codes("encode_", codes, scale, x, columns);
  auto* target = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* scales = static_cast<float*>(scale.mutable_data_ptr());
  const auto* source = static_cast<const float*>(x.const_data_ptr());
  if (runs.inner == 1) {
    const int64_t blocks = runs.outer * slimstate::blocks_of_run(runs.length);
    launch(x, blocks_of(blocks, cta_blocks), encode_runs, target, scales, source, blocks, runs.length, with_sign);
  } else {
    launch(x, tiles(runs), encode_columns, target, scales, source, runs, with_sign);
  }
}

void decode_(Tensor x, Tensor codes, Tensor scale, bool with_sign, bool columns) {
  const CodeRuns runs = slimstate::check_codes("decode_", codes, scale, x, columns);
  auto* target = static_cast<float*>(x.mutable_data_ptr());
  const auto* source = static_cast<const uint8_t*>(codes.const_data_ptr());
  const auto* scales = static_cast<const float*>(scale.const_data_ptr());
  if (runs.inner == 1) {
    const int64_t blocks = runs.outer * slimstate::blocks_of_run(runs.length);
    launch(x, blocks_of(blocks, cta_blocks), decode_runs, target, source, scales, blocks, runs.length, with_sign);
  } else {
    launch(x, tiles(runs), decode_columns, target, source, scales, runs, with_sign);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CUDA, m) {
  m.impl("encode_", TORCH_BOX(&encode_));
  m.impl("decode_", TORCH_BOX(&decode_));
}
