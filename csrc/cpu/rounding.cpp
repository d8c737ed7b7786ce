#include "rounding.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "checks.h"
#include "cpu/clones.h"

using torch::stable::Tensor;

namespace {

template <typename Format>
SLIMSTATE_CLONES void round_range(uint16_t* out, const float* x, int64_t numel, slimstate::Key key, uint64_t offset) {
  for (int64_t i = 0; i < numel; ++i) {
    out[i] = Format::round(x[i], slimstate::random_bits(key, offset + static_cast<uint64_t>(i)));
  }
}

template <typename Format>
void round_all(const Tensor& out, const Tensor& x, slimstate::Key key, uint64_t offset, slimstate::Place place) {
  const auto* source = static_cast<const float*>(x.const_data_ptr());
  auto* target = static_cast<uint16_t*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, x.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    while (begin < end) {  // row by row, so that the inner loop counts in ones
      const uint64_t i = offset + static_cast<uint64_t>(begin);
      const auto count =
          static_cast<int64_t>(std::min(static_cast<uint64_t>(end - begin), place.width - i % place.width));
      round_range<Format>(target + begin, source + begin, count, key, place.index(i));
      begin += count;
    }
  });
}

void stochastic_round_(
    Tensor out, Tensor x, int64_t key, int64_t offset, int64_t start, int64_t width, int64_t pitch) {
  slimstate::check_stochastic_round(out, x, width);
  const bool half = out.scalar_type() == torch::headeronly::ScalarType::Half;
  const auto round = half ? round_all<slimstate::Half> : round_all<slimstate::BFloat16>;
  const slimstate::Place place{
      static_cast<uint64_t>(start), static_cast<uint64_t>(width), static_cast<uint64_t>(pitch)};
  round(out, x, slimstate::expand_key(static_cast<uint64_t>(key)), static_cast<uint64_t>(offset), place);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CPU, m) { m.impl("stochastic_round_", TORCH_BOX(&stochastic_round_)); }
