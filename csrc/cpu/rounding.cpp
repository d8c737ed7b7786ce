#include "rounding.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"

using torch::stable::Tensor;

// The loader picks the widest version that the machine runs, twice as fast as the baseline that a wheel must assume.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define SLIMSTATE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SLIMSTATE_CLONES
#endif

namespace {

template <typename Format>
SLIMSTATE_CLONES void round_range(uint16_t* out, const float* x, int64_t numel, slimstate::Key key, uint64_t offset) {
  for (int64_t i = 0; i < numel; ++i) {
    out[i] = Format::round(x[i], slimstate::random_bits(key, offset + static_cast<uint64_t>(i)));
  }
}

template <typename Format>
void round_all(const Tensor& out, const Tensor& x, slimstate::Key key, uint64_t offset) {
  const auto* source = static_cast<const float*>(x.const_data_ptr());
  auto* target = static_cast<uint16_t*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, x.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    round_range<Format>(target + begin, source + begin, end - begin, key, offset + static_cast<uint64_t>(begin));
  });
}

void stochastic_round_(Tensor out, Tensor x, int64_t key, int64_t offset) {
  slimstate::check_stochastic_round(out, x);
  const bool half = out.scalar_type() == torch::headeronly::ScalarType::Half;
  const auto round = half ? round_all<slimstate::Half> : round_all<slimstate::BFloat16>;
  round(out, x, slimstate::expand_key(static_cast<uint64_t>(key)), static_cast<uint64_t>(offset));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CPU, m) { m.impl("stochastic_round_", TORCH_BOX(&stochastic_round_)); }
