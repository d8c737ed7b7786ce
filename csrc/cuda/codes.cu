#include "cuda/codes.cuh"

#include <torch/csrc/stable/library.h>

#include "adamw.h"

using slimstate::code_block;
using slimstate::CodeRuns;
using torch::stable::Tensor;

namespace {

using namespace slimstate::cuda;

// Of runs that are contiguous: a warp for each block.

template <typename Codes>
__global__ void encode_runs(typename Codes::Bits* codes, float* scale, const float* x, int64_t blocks, int64_t length,
                            bool with_sign) {
  __shared__ typename Codes::Room room;
  const Codes how(room, with_sign);
  const bool wide = aligned(codes, x) && length % lane_elements == 0;
  for (int64_t i = 0; i < warp_blocks; ++i) {
    const int64_t block = blockIdx.x * cta_blocks + i * (threads / 32) + threadIdx.x / 32;
    if (block >= blocks) break;  // the whole warp
    const LanePack own(block, length);
    const auto values = load<lane_elements>(x + own.start, own.left, wide);
    const float own_scale = slimstate::scale_of(warp_largest(values), Codes::kind(with_sign));
    if (threadIdx.x % 32 == 0) scale[block] = own_scale;
    const float factor = slimstate::factor_of(own_scale, Codes::kind(with_sign));
    store(codes + own.start, encode_pack(values, factor, how), own.left, wide);
  }
}

template <typename Codes>
__global__ void decode_runs(float* x, const typename Codes::Bits* codes, const float* scale, int64_t blocks,
                            int64_t length, bool with_sign) {
  __shared__ typename Codes::Room room;
  const Codes how(room, with_sign);
  const bool wide = aligned(codes, x) && length % lane_elements == 0;
  for (int64_t i = 0; i < warp_blocks; ++i) {
    const int64_t block = blockIdx.x * cta_blocks + i * (threads / 32) + threadIdx.x / 32;
    if (block >= blocks) break;
    const LanePack own(block, length);
    const auto found = load<lane_elements>(codes + own.start, own.left, wide);
    store(x + own.start, decode_pack(found, scale[block], how), own.left, wide);
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

template <typename Codes>
__global__ void encode_columns(typename Codes::Bits* codes, float* scale, const float* x, CodeRuns runs,
                               bool with_sign) {
  __shared__ typename Codes::Room room;
  __shared__ float most[threads / 32][32];
  const Codes how(room, with_sign);
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
  const float own_scale = slimstate::scale_of(all, Codes::kind(with_sign));
  if (tile.inside && warp == 0) scale[tile.at] = own_scale;
  const float factor = slimstate::factor_of(own_scale, Codes::kind(with_sign));
  for (int row = warp; tile.inside && row < tile.rows; row += threads / 32) {
    const int64_t i = tile.first + row * runs.inner;
    codes[i] = how.code(x[i], factor);
  }
}

template <typename Codes>
__global__ void decode_columns(float* x, const typename Codes::Bits* codes, const float* scale, CodeRuns runs,
                               bool with_sign) {
  __shared__ typename Codes::Room room;
  const Codes how(room, with_sign);
  const Tile tile(runs);
  const float own_scale = tile.inside ? scale[tile.at] : 0;
  for (int row = threadIdx.x / 32; tile.inside && row < tile.rows; row += threads / 32) {
    const int64_t i = tile.first + row * runs.inner;
    x[i] = how.value(codes[i]) * own_scale;
  }
}

int64_t tiles(const CodeRuns& runs) {
  return runs.outer * slimstate::blocks_of_run(runs.length) * ((runs.inner + 31) / 32);
}

// Calls f(what finds and reads these codes).
template <typename F>
void with_codes(const Tensor& codes, const F& f) {
  slimstate::is_companded(codes) ? f(static_cast<Companding*>(nullptr)) : f(static_cast<Dynamic*>(nullptr));
}

void encode_(Tensor codes, Tensor scale, Tensor x, bool with_sign, bool columns) {
  const CodeRuns runs = slimstate::check_codes("encode_", codes, scale, x, columns);
  with_codes(codes, [&]<typename Codes>(Codes*) {
    auto* target = static_cast<typename Codes::Bits*>(codes.mutable_data_ptr());
    auto* scales = static_cast<float*>(scale.mutable_data_ptr());
    const auto* source = static_cast<const float*>(x.const_data_ptr());
    if (runs.inner == 1) {
      const int64_t blocks = runs.outer * slimstate::blocks_of_run(runs.length), ctas = blocks_of(blocks, cta_blocks);
      launch(x, ctas, encode_runs<Codes>, target, scales, source, blocks, runs.length, with_sign);
    } else {
      launch(x, tiles(runs), encode_columns<Codes>, target, scales, source, runs, with_sign);
    }
  });
}

void decode_(Tensor x, Tensor codes, Tensor scale, bool with_sign, bool columns) {
  const CodeRuns runs = slimstate::check_codes("decode_", codes, scale, x, columns);
  with_codes(codes, [&]<typename Codes>(Codes*) {
    auto* target = static_cast<float*>(x.mutable_data_ptr());
    const auto* source = static_cast<const typename Codes::Bits*>(codes.const_data_ptr());
    const auto* scales = static_cast<const float*>(scale.const_data_ptr());
    if (runs.inner == 1) {
      const int64_t blocks = runs.outer * slimstate::blocks_of_run(runs.length), ctas = blocks_of(blocks, cta_blocks);
      launch(x, ctas, decode_runs<Codes>, target, source, scales, blocks, runs.length, with_sign);
    } else {
      launch(x, tiles(runs), decode_columns<Codes>, target, source, scales, runs, with_sign);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CUDA, m) {
  m.impl("encode_", TORCH_BOX(&encode_));
  m.impl("decode_", TORCH_BOX(&decode_));
}
