#include "rounding.h"

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cuda/launch.cuh"

using torch::stable::Tensor;

namespace {

using namespace slimstate::cuda;

template <typename Format>
__global__ void round_all(
    uint16_t* out, const float* x, int64_t numel, slimstate::Key key, uint64_t offset, slimstate::Place place) {
  const bool wide = aligned(out, x);
  for (Packs<8> i(numel, blockIdx.x); i.inside(); i.next()) {
    const auto values = load<8>(x + i.start, i.left(), wide);
    Pack<uint16_t, 8> rounded;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const uint64_t index = place.index(offset + static_cast<uint64_t>(i.start + k));
      rounded[k] = Format::round(values[k], slimstate::random_bits(key, index));
    }
    store(out + i.start, rounded, i.left(), wide);
  }
}

void stochastic_round_(
    Tensor out, Tensor x, int64_t key, int64_t offset, int64_t start, int64_t width, int64_t pitch) {
  slimstate::check_stochastic_round(out, x, width);
  const bool half = out.scalar_type() == torch::headeronly::ScalarType::Half;
  launch(x, blocks_of(x.numel()), half ? round_all<slimstate::Half> : round_all<slimstate::BFloat16>,
         static_cast<uint16_t*>(out.mutable_data_ptr()), static_cast<const float*>(x.const_data_ptr()), x.numel(),
         slimstate::expand_key(static_cast<uint64_t>(key)), static_cast<uint64_t>(offset),
         slimstate::Place{static_cast<uint64_t>(start), static_cast<uint64_t>(width), static_cast<uint64_t>(pitch)});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CUDA, m) { m.impl("stochastic_round_", TORCH_BOX(&stochastic_round_)); }
