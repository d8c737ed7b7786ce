// Kernels that show what csrc/cuda/launch.cuh does, and faults that the emulator must see.
#include "cuda/launch.cuh"

#include <torch/csrc/stable/library.h>

using torch::stable::Tensor;

namespace {

using namespace slimstate::cuda;

// The example of launch.cuh.
struct Decay {
  float* p;
  int64_t numel;
  float factor;
};

__global__ void decay(const __grid_constant__ Batch<Decay> batch, float shift) {
  const auto [tensor, block] = batch.find(blockIdx.x);
  const bool wide = aligned(tensor.p);
  for (Packs<4> i(tensor.numel, block); i.inside(); i.next()) {
    auto p = load<4>(tensor.p + i.start, i.left(), wide);
    for (int k = 0; k < 4; ++k) p[k] = p[k] * tensor.factor + shift;
    store(tensor.p + i.start, p, i.left(), wide);
  }
}

// p[i] is multiplied by i, of all tensors.
void decay_(std::vector<Tensor> tensors, double shift) {
  std::vector<Decay> items;
  for (const Tensor& p : tensors) {
    items.push_back({static_cast<float*>(p.mutable_data_ptr()), p.numel(), static_cast<float>(items.size())});
  }
  if (tensors.empty()) return;
  launch_each(
      items, [](const Decay& d) { return blocks_of(d.numel); }, tensors[0], decay, static_cast<float>(shift));
}

// The sum and the largest of each row, a block for a row.
__global__ void rows(const float* x, float* sums, float* largest, int64_t width) {
  x += blockIdx.x * width;
  float sum = 0, most = -INFINITY;
  for (int64_t i = threadIdx.x; i < width; i += threads) {
    sum += x[i];
    most = Max()(most, x[i]);
  }
  sum = block_reduce(sum, 0.0F, Sum());
  most = block_reduce(most, -INFINITY, Max());
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
    largest[blockIdx.x] = most;
  }
}

void rows_(Tensor x, Tensor sums, Tensor largest) {
  launch(x, x.size(0), rows, static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(sums.mutable_data_ptr()),
         static_cast<float*>(largest.mutable_data_ptr()), x.size(1));
}

// ---------------------------------------------------------------------------------------------------- faults

__global__ void shift_without_barrier(float* x) {
  __shared__ float shared[threads];
  shared[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = shared[(threadIdx.x + 1) % threads];
}

__global__ void misaligned(float* x) {
  if (threadIdx.x == 3) store(x + 1, Pack<float, 4>{}, 4, true);
}

__global__ void missed_barrier(float*) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void two_barriers(float*) {
  if (threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void part_of_a_warp(float* x) {
  if (threadIdx.x % 32 < 16) x[threadIdx.x] = __shfl_xor_sync(0xffffU, x[threadIdx.x], 1);
}

__global__ void past_the_end(float* x) { x[threadIdx.x + 1] = 0; }

__global__ void past_shared_memory(float* x) {
  __shared__ float shared[threads];
  shared[threadIdx.x + static_cast<int>(x[0])] = 0;  // x[0] is 1 there
}

void fault(Tensor x, std::string which) {
  STD_TORCH_CHECK(x.numel() == threads, "one block of elements");
  const auto kernel = which == "shift without barrier" ? shift_without_barrier
                      : which == "misaligned"          ? misaligned
                      : which == "missed barrier"      ? missed_barrier
                      : which == "two barriers"        ? two_barriers
                      : which == "part of a warp"      ? part_of_a_warp
                      : which == "past the end"        ? past_the_end
                                                       : past_shared_memory;
  launch(x, 1, kernel, static_cast<float*>(x.mutable_data_ptr()));
}

}  // namespace

STABLE_TORCH_LIBRARY(slimstate, m) {
  m.def("decay_(Tensor(a!)[] tensors, float shift) -> ()");
  m.def("rows_(Tensor x, Tensor(a!) sums, Tensor(b!) largest) -> ()");
  m.def("fault(Tensor(a!) x, str which) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(slimstate, CUDA, m) {
  m.impl("decay_", TORCH_BOX(&decay_));
  m.impl("rows_", TORCH_BOX(&rows_));
  m.impl("fault", TORCH_BOX(&fault));
}
