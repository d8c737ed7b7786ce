// What every CUDA kernel shares: launches on the current stream, one launch for many tensors, 16-byte accesses, and
// reductions over a warp or a block.
//
// A kernel over many tensors describes one tensor by a plain struct, and cuts it into as many blocks of threads as it
// likes. `launch_each` packs the structs into the kernel's argument (which a captured graph keeps; nothing is
// allocated, copied or waited for), starts as few kernels as hold them all, and each block finds what it works on:
//
//   struct Decay { float* p; int64_t numel; float factor; };             // all that differs from tensor to tensor
//
//   __global__ void decay(const __grid_constant__ Batch<Decay> batch, float shift) {
//     const auto [tensor, block] = batch.find(blockIdx.x);               // a reference, and which of its blocks
//     const bool wide = aligned(tensor.p);                               // every pointer that is read or written
//     for (Packs<4> i(tensor.numel, block); i.inside(); i.next()) {      // four elements for each thread at a time
//       auto p = load<4>(tensor.p + i.start, i.left(), wide);            // 16 bytes at once, or one by one
//       for (int k = 0; k < 4; ++k) p[k] = p[k] * tensor.factor + shift; // past the end: zeros, which are not stored
//       store(tensor.p + i.start, p, i.left(), wide);
//     }
//   }
//
//   std::vector<Decay> items;                                            // tensors without elements may be among them
//   launch_each(items, [](const Decay& d) { return blocks_of(d.numel); }, tensors[0], decay, shift);
//
// A kernel over one tensor takes plain arguments: launch(tensor, blocks, decay_one, p, numel). Blocks have `threads`
// threads. What holds for all kernels: 1-D blocks and grids; shared memory is static; no thread returns before a
// __syncthreads() or a warp's exchange that others wait at; constants and sums are float, never double; pointers count
// elements in int64. tests/cuda/cuda_runtime.h runs all of this on a CPU.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "rounding.h"  // SLIMSTATE_HD

namespace slimstate::cuda {

constexpr int threads = 256;

// ---------------------------------------------------------------------------------------------------- launches

// Starts a kernel on the current stream of the device of `where`.
template <typename... Parameters, typename... Arguments>
void launch(const torch::stable::Tensor& where, int64_t blocks, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  if (blocks == 0) return;  // an empty grid is a launch error
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "slimstate: ", blocks, " blocks are more than a grid holds");
  const torch::stable::accelerator::DeviceGuard guard(where.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(where.get_device_index(), &stream));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

// Descriptions of several tensors, as one argument of a kernel.
template <typename Item>
struct Batch {
  // A kernel's arguments may have 4 KiB on every architecture; 256 bytes are left to the other ones.
  static constexpr int capacity = (4096 - 256 - 8) / (sizeof(Item) + sizeof(uint32_t));
  static_assert(capacity >= 8, "one tensor's description should be pointers and numbers only");

  Item items[capacity];
  uint32_t end[capacity];  // end[i] blocks belong to items 0 to i
  int32_t size = 0;

  struct Found {
    const Item& item;
    int64_t block;  // counted from the item's first
  };

  __device__ Found find(uint32_t block) const {
    int low = 0, high = size - 1;  // the first item that ends after the block
    while (low < high) {
      const int middle = (low + high) / 2;
      if (block < end[middle]) high = middle;
      else low = middle + 1;
    }
    return {items[low], static_cast<int64_t>(block - (low == 0 ? 0 : end[low - 1]))};
  }
};

// Starts `kernel(batch, arguments...)` for all items, `blocks(item)` blocks for each.
template <typename Item, typename Blocks, typename... Parameters, typename... Arguments>
void launch_each(const std::vector<Item>& items, const Blocks& blocks, const torch::stable::Tensor& where,
                 void (*kernel)(Batch<Item>, Parameters...), const Arguments&... arguments) {
  constexpr int64_t most = (int64_t{1} << 31) - 1;
  Batch<Item> batch;
  int64_t total = 0;
  const auto flush = [&] {
    launch(where, total, kernel, batch, arguments...);
    batch.size = 0;
    total = 0;
  };
  for (const Item& item : items) {
    const int64_t count = blocks(item);
    if (count == 0) continue;
    if (batch.size == Batch<Item>::capacity || total + count > most) flush();
    total += count;
    batch.items[batch.size] = item;
    batch.end[batch.size++] = static_cast<uint32_t>(total);
  }
  flush();
}

// ---------------------------------------------------------------------------------------------------- elements

constexpr int64_t block_elements = 8192;  // of one tensor, in an element-wise kernel

inline int64_t blocks_of(int64_t numel, int64_t elements = block_elements) { return (numel + elements - 1) / elements; }

// A thread's way through its block's share of a tensor, `count` elements at a time; neighbouring threads take
// neighbouring packs.
template <int count>
struct Packs {
  int64_t start, stop, numel;

  __device__ Packs(int64_t numel, int64_t block, int64_t elements = block_elements)
      : start(block * elements + threadIdx.x * int64_t{count}),
        stop(min((block + 1) * elements, numel)),
        numel(numel) {}
  __device__ bool inside() const { return start < stop; }
  __device__ void next() { start += int64_t{threads} * count; }
  __device__ int64_t left() const { return numel - start; }
};

// Consecutive elements in registers.
template <typename T, int count>
struct alignas(sizeof(T) * count < 16 ? sizeof(T) * count : 16) Pack {
  T at[count];

  SLIMSTATE_HD T& operator[](int i) { return at[i]; }
  SLIMSTATE_HD const T& operator[](int i) const { return at[i]; }
};

// Whether 16 bytes may be read at once from each of them.
template <typename... T>
__device__ bool aligned(const T*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

// `count` elements from `source` on, of which `left` are there; the others are zeros.
template <int count, typename T>
__device__ Pack<T, count> load(const T* source, int64_t left, bool wide) {
  if (wide && left >= count) return *reinterpret_cast<const Pack<T, count>*>(source);
  Pack<T, count> values;
#pragma unroll
  for (int i = 0; i < count; ++i) values[i] = i < left ? source[i] : T{};
  return values;
}

template <int count, typename T>
__device__ void store(T* target, const Pack<T, count>& values, int64_t left, bool wide) {
  if (wide && left >= count) {
    *reinterpret_cast<Pack<T, count>*>(target) = values;
    return;
  }
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (i < left) target[i] = values[i];
  }
}

// ---------------------------------------------------------------------------------------------------- reductions

struct Sum {
  template <typename T>
  SLIMSTATE_HD T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {  // NaN wins, as in torch.amax
  template <typename T>
  SLIMSTATE_HD T operator()(T a, T b) const {
    return a > b || a != a ? a : b;
  }
};

// Over the 32 threads of a warp. All of them get the same bits, and so they do in every run.
template <typename T, typename Combine>
__device__ T warp_reduce(T x, Combine combine) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x = combine(x, __shfl_xor_sync(0xffffffffU, x, lane));
  return x;
}

// Over a block; likewise. `none` is what does not change the result: 0 of a sum.
template <typename T, typename Combine>
__device__ T block_reduce(T x, T none, Combine combine) {
  __shared__ T partial[threads / 32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  x = warp_reduce(x, combine);
  __syncthreads();  // the last call's results have been read
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  return warp_reduce(lane < threads / 32 ? partial[lane] : none, combine);
}

}  // namespace slimstate::cuda
