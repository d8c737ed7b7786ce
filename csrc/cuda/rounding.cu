#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "checks.h"
#include "rounding.h"

using torch::stable::Tensor;

namespace {

template <typename Format>
__global__ void round_all(
    uint16_t* out, const float* x, int64_t numel, slimstate::Key key, uint64_t offset, slimstate::Place place) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < numel; i += stride) {
    out[i] = Format::round(x[i], slimstate::random_bits(key, place.index(offset + static_cast<uint64_t>(i))));
  }
}

void stochastic_round_(
    Tensor out, Tensor x, int64_t key, int64_t offset, int64_t start, int64_t width, int64_t pitch) {
  slimstate::check_stochastic_round(out, x, width);
  if (x.numel() == 0) return;  // an empty grid is a launch error
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));

  constexpr int64_t threads = 256, most_blocks = 1 << 14;
  const auto blocks = static_cast<unsigned>(std::min((x.numel() + threads - 1) / threads, most_blocks));
  const bool half = out.scalar_type() == torch::headeronly::ScalarType::Half;
  const auto kernel = half ? round_all<slimstate::Half> : round_all<slimstate::BFloat16>;
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<uint16_t*>(out.mutable_data_ptr()), static_cast<const float*>(x.const_data_ptr()), x.numel(),
      slimstate::expand_key(static_cast<uint64_t>(key)), static_cast<uint64_t>(offset),
      slimstate::Place{static_cast<uint64_t>(start), static_cast<uint64_t>(width), static_cast<uint64_t>(pitch)});
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CUDA, m) { m.impl("stochastic_round_", TORCH_BOX(&stochastic_round_)); }
