// Runs csrc/cuda/*.cu on a CPU, for tests: it stands in for CUDA's header of the same name, so that a C++ compiler can
// build the kernels, and registers them for CPU tensors under torch.ops.slimstate_emulated. tests/cuda/emulator.py
// builds it, and the pytest fixture `emulated` gives that namespace:
//
//   def test_equals_the_reference(emulated):
//       emulated.stochastic_round_(out, x, key, 0, *WHOLE)
//
// Samples that a module of slimstate.ops lists are run in it without further ado (tests/cuda/test_emulated.py).
//
// The threads of a block are fibers of one OS thread. Each runs until it waits for others, and they go on in turn, from
// the first to the last or the other way round (`emulated_backwards`): a missing __syncthreads() shows up as results
// that differ between the two. Misaligned accesses, barriers that some threads miss, other kinds of launches than
// csrc/cuda/launch.cuh makes and too much shared memory are errors; built with the address sanitizer it also sees
// accesses out of bounds.
// It cannot show races between blocks or between threads that no order of turns decides, the memory model, what a
// device's own mathematics rounds differently, or anything about speed.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

// A CPU has no other device to go to.
inline AOTITorchError emulated_device_guard(int32_t, DeviceGuardHandle*) { return 0; }
inline AOTITorchError emulated_delete_device_guard(DeviceGuardHandle) { return 0; }
#define aoti_torch_create_device_guard emulated_device_guard
#define aoti_torch_delete_device_guard emulated_delete_device_guard

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static const
#define __shared__ static  // blocks run one after the other

// ---------------------------------------------------------------------------------------------------- types

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// clang-format off
#define EMULATED_VECTORS(type, name) \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; }; \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATED_VECTORS(float, float) EMULATED_VECTORS(int32_t, int) EMULATED_VECTORS(uint32_t, uint)
EMULATED_VECTORS(int16_t, short) EMULATED_VECTORS(uint16_t, ushort) EMULATED_VECTORS(int8_t, char)
EMULATED_VECTORS(uint8_t, uchar)
// clang-format on

// ---------------------------------------------------------------------------------------------------- the machine

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulated {

using Where = std::source_location;

struct Fiber {
  static constexpr size_t stack_size = 128 * 1024;

  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_size]};  // of which only what is used becomes memory
  unsigned index = 0;
  bool done = false, waits_for_block = false, waits_for_warp = false;
  Where where;             // of what it waits at
  uint64_t slots[2] = {};  // what it gives to its warp; two, so that none is overwritten before all have read it
  unsigned exchanges = 0;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline Fiber* current = nullptr;
inline std::string failure;
inline void (*entry)(void*) = nullptr;
inline void* entry_argument = nullptr;

inline void yield() { swapcontext(&current->context, &scheduler); }

// Ends the launch: the scheduler never comes back here.
[[noreturn]] inline void fail(const std::string& message) {
  if (current == nullptr) {
    std::fprintf(stderr, "%s\n", message.c_str());
    std::abort();
  }
  if (failure.empty()) {
    failure = message + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(current->index) + ")";
  }
  for (;;) yield();
}

inline std::string line(const Where& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

inline void run_thread() {
  entry(entry_argument);
  current->done = true;
  for (;;) yield();
}

// Lets fibers [begin, end) go on if all of them wait for each other, at one place.
inline bool release(size_t begin, size_t end, bool Fiber::*waits) {
  const Fiber& first = fibers[begin];
  for (size_t i = begin; i < end; ++i) {
    if (!(fibers[i].*waits)) return false;
    if (fibers[i].where.line() != first.where.line() || fibers[i].where.column() != first.where.column()) {
      failure = "threads " + std::to_string(begin) + " and " + std::to_string(i) + " of a block wait at " +
                line(first.where) + " and " + line(fibers[i].where);
      return false;
    }
  }
  for (size_t i = begin; i < end; ++i) fibers[i].*waits = false;
  return true;
}

inline void run_block(bool backwards) {
  const size_t count = fibers.size();
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::stack_size;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_thread, 0);
    fiber.done = fiber.waits_for_block = fiber.waits_for_warp = false;
    fiber.exchanges = 0;
  }
  size_t done = 0;
  while (done < count) {
    bool ran = false;
    for (size_t turn = 0; turn < count; ++turn) {
      Fiber& fiber = fibers[backwards ? count - 1 - turn : turn];
      if (fiber.done || fiber.waits_for_block || fiber.waits_for_warp) continue;
      ran = true;
      current = &fiber;
      threadIdx.x = fiber.index;
      swapcontext(&scheduler, &fiber.context);
      current = nullptr;
      done += fiber.done;
      if (!failure.empty()) return;
    }
    for (size_t warp = 0; warp < count; warp += 32) ran |= release(warp, warp + 32, &Fiber::waits_for_warp);
    ran |= release(0, count, &Fiber::waits_for_block);
    if (!failure.empty()) return;
    if (!ran && done < count) {
      for (const Fiber& fiber : fibers) {
        if (fiber.done) continue;
        failure = "thread " + std::to_string(fiber.index) + " of a block waits at " + line(fiber.where) +
                  " for threads that do not come there";
        return;
      }
    }
  }
}

// 64 bits of each lane for all lanes of the warp.
template <typename T>
const Fiber* exchange(unsigned mask, T value, unsigned& slot, const Where& where) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  if (mask != 0xffffffffU) fail("a warp's exchange without some of its threads, at " + line(where));
  slot = current->exchanges++ % 2;
  std::memcpy(&current->slots[slot], &value, sizeof value);
  current->where = where;
  current->waits_for_warp = true;
  yield();
  return &fibers[current->index / 32 * 32];
}

template <typename T>
T from_lane(unsigned mask, T value, unsigned lane, const Where& where) {
  unsigned slot = 0;
  const Fiber* lanes = exchange(mask, value, slot, where);
  std::memcpy(&value, &lanes[lane % 32].slots[slot], sizeof value);
  return value;
}

}  // namespace emulated

extern "C" {
inline int emulated_backwards = 0;
}

// ---------------------------------------------------------------------------------------------------- CUDA's functions

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096 - 8 * sizeof...(Parameters), "arguments of a kernel: 4 KiB");
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "arguments of a kernel are copied as bytes");
  const unsigned threads = config->blockDim.x, blocks = config->gridDim.x;
  if (threads == 0 || threads > 1024 || threads % 32 != 0 || blocks == 0 || config->blockDim.y != 1 ||
      config->blockDim.z != 1 || config->gridDim.y != 1 || config->gridDim.z != 1 || config->dynamicSmemBytes != 0) {
    throw std::runtime_error("the emulator has no such launch");
  }
  auto call = [&] { kernel(static_cast<Parameters>(arguments)...); };
  emulated::entry = [](void* argument) { (*static_cast<decltype(call)*>(argument))(); };
  emulated::entry_argument = &call;
  emulated::failure.clear();
  emulated::fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) emulated::fibers[i].index = i;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (unsigned i = 0; i < blocks && emulated::failure.empty(); ++i) {
    blockIdx.x = emulated_backwards ? blocks - 1 - i : i;
    emulated::run_block(emulated_backwards != 0);
  }
  if (!emulated::failure.empty()) throw std::runtime_error("emulated CUDA kernel: " + emulated::failure);
  return cudaSuccess;
}

inline void __syncthreads(emulated::Where where = emulated::Where::current()) {
  emulated::current->where = where;
  emulated::current->waits_for_block = true;
  emulated::yield();
}

inline void __syncwarp(unsigned mask = 0xffffffffU, emulated::Where where = emulated::Where::current()) {
  emulated::from_lane(mask, 0, 0, where);
}

inline unsigned emulated_lane() { return emulated::current->index % 32; }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, emulated::Where where = emulated::Where::current()) {
  return emulated::from_lane(mask, value, static_cast<unsigned>(lane), where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, emulated::Where where = emulated::Where::current()) {
  return emulated::from_lane(mask, value, emulated_lane() ^ static_cast<unsigned>(lanes), where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, emulated::Where where = emulated::Where::current()) {
  const unsigned own = emulated_lane();
  return emulated::from_lane(mask, value, own + lanes < 32 ? own + lanes : own, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, emulated::Where where = emulated::Where::current()) {
  const unsigned own = emulated_lane();
  return emulated::from_lane(mask, value, own >= lanes ? own - lanes : own, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, emulated::Where where = emulated::Where::current()) {
  unsigned slot = 0, votes = 0;
  const emulated::Fiber* lanes = emulated::exchange(mask, uint64_t{predicate != 0}, slot, where);
  for (unsigned i = 0; i < 32; ++i) votes |= static_cast<unsigned>(lanes[i].slots[slot]) << i;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, emulated::Where where = emulated::Where::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulated::Where where = emulated::Where::current()) {
  return __ballot_sync(mask, predicate, where) == 0xffffffffU;
}

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
template <typename T>
T atomicOr(T* address, T value) {
  const T old = *address;
  *address = old | value;
  return old;
}
inline void __threadfence() {}

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }

// As CUDA's: of mixed integers too.
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

// ---------------------------------------------------------------------------------------------------- torch

inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) { return 0; }
inline AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char**) { return 0; }
inline void torch_c10_cuda_free_error_msg(char*) {}
#undef STABLE_TORCH_LIBRARY
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY(space, m) _STABLE_TORCH_LIBRARY_FRAGMENT(slimstate_emulated, m, C10_UID)
#define STABLE_TORCH_LIBRARY_IMPL(space, device, m) _STABLE_TORCH_LIBRARY_IMPL(slimstate_emulated, CPU, m, C10_UID)

// ---------------------------------------------------------------------------------------------------- alignment

#ifdef EMULATED_ALIGNMENT
// The compiler calls this (-fsanitize=alignment) where a reference or pointer is not aligned as its type.
struct EmulatedMismatch {
  const char* file;
  uint32_t line, column;
};
extern "C" inline __attribute__((used)) void __ubsan_handle_type_mismatch_v1(EmulatedMismatch* found, void*) {
  emulated::fail("misaligned access at " + std::string(found->file) + ":" + std::to_string(found->line));
}
#endif
