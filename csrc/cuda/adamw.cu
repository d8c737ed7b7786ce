#include "adamw.h"

#include <torch/csrc/stable/library.h>

#include "cuda/codes.cuh"

using slimstate::code_block;
using slimstate::Dense;
using slimstate::DenseKind;
using slimstate::DenseNumbers;
using slimstate::Format;
using slimstate::Key;
using torch::stable::Tensor;

namespace {

using namespace slimstate::cuda;

// Elements of a thread as float32 numbers, from how they are kept, and back.

template <typename Kept, int count>
__device__ Pack<float, count> widened(const void* kept, const int16_t* low, int64_t start, int64_t left, bool wide) {
  const auto codes = load<count>(static_cast<const typename Kept::Bits*>(kept) + start, left, wide);
  Pack<int16_t, count> rests{};
  if constexpr (Kept::low) rests = load<count>(low + start, left, wide);
  Pack<float, count> x;
#pragma unroll
  for (int k = 0; k < count; ++k) x[k] = Kept::widen(codes[k], rests[k]);
  return x;
}

template <typename Kept, int count>
__device__ void narrow(void* kept, int16_t* low, const Pack<float, count>& x, Key key, const slimstate::Place& place,
                       int64_t start, int64_t left, bool wide) {
  Pack<typename Kept::Bits, count> codes;
  Pack<int16_t, count> rests{};
#pragma unroll
  for (int k = 0; k < count; ++k) {
    uint32_t random = 0;
    if constexpr (Kept::random) random = slimstate::random_bits(key, place.index(static_cast<uint64_t>(start + k)));
    codes[k] = Kept::narrow(x[k], random, rests[k]);
  }
  store(static_cast<typename Kept::Bits*>(kept) + start, codes, left, wide);
  if constexpr (Kept::low) store(low + start, rests, left, wide);
}

template <int count>
__device__ Pack<float, count> read(Format format, const void* kept, int64_t start, int64_t left, bool wide) {
  return slimstate::with_format(format, [&](auto how) {
    using Kept = decltype(how);
    if constexpr (Kept::low) return Pack<float, count>{};  // neither gradients nor moments are
    else return widened<Kept, count>(kept, nullptr, start, left, wide);
  });
}

template <int count>
__device__ void write(Format format, void* kept, const Pack<float, count>& x, Key key, const slimstate::Place& place,
                      int64_t start, int64_t left, bool wide) {
  slimstate::with_format(format, [&](auto how) {
    using Kept = decltype(how);
    if constexpr (!Kept::low) narrow<Kept, count>(kept, nullptr, x, key, place, start, left, wide);
  });
}

template <typename Weight, int count>
__device__ void step(const Dense& x, const DenseKind& kind, const DenseNumbers& numbers, Pack<float, count>& m,
                     Pack<float, count>& v, int64_t start, int64_t left, bool wide) {
  auto w = widened<Weight, count>(x.p, x.low, start, left, wide);
  const auto g = read<count>(kind.grad, x.grad, start, left, wide);
#pragma unroll
  for (int k = 0; k < count; ++k) w[k] = slimstate::adamw(numbers, x.bias, w[k], g[k], m[k], v[k]);
  narrow<Weight, count>(x.p, x.low, w, x.weight_key, x.place, start, left, wide);
}

__device__ bool all_aligned(const Dense& x) {
  const auto bytes = [](const void* pointer) { return static_cast<const char*>(pointer); };
  return aligned(bytes(x.p), bytes(x.grad), bytes(x.first), bytes(x.second), bytes(x.low));
}

template <typename Weight>
__global__ void step_all(const __grid_constant__ Batch<Dense> batch, DenseKind kind, DenseNumbers numbers) {
  const auto [x, block] = batch.find(blockIdx.x);
  const bool wide = all_aligned(x);
  for (Packs<4> i(x.length, block); i.inside(); i.next()) {
    auto m = read<4>(kind.moment, x.first, i.start, i.left(), wide);
    auto v = read<4>(kind.moment, x.second, i.start, i.left(), wide);
    step<Weight, 4>(x, kind, numbers, m, v, i.start, i.left(), wide);
    write<4>(kind.moment, x.first, m, x.first_key, x.place, i.start, i.left(), wide);
    write<4>(kind.moment, x.second, v, x.second_key, x.place, i.start, i.left(), wide);
  }
}

template <typename Weight, typename Codes>
__global__ void step_coded(const __grid_constant__ Batch<Dense> batch, DenseKind kind, DenseNumbers numbers) {
  using Bits = typename Codes::Bits;
  __shared__ typename Codes::Room rooms[2];
  const Codes first_codes(rooms[0], true), second_codes(rooms[1], false);
  const auto [x, cta] = batch.find(blockIdx.x);
  const bool wide = all_aligned(x) && x.length % lane_elements == 0;
  const int64_t blocks = x.rows * ((x.length + code_block - 1) / code_block);
  auto* first = static_cast<Bits*>(x.first);
  auto* second = static_cast<Bits*>(x.second);
  for (int64_t i = 0; i < warp_blocks; ++i) {
    const int64_t block = cta * cta_blocks + i * (threads / 32) + threadIdx.x / 32;
    if (block >= blocks) break;  // the whole warp
    const LanePack own(block, x.length);
    auto m = decode_pack(load<lane_elements>(first + own.start, own.left, wide), x.first_scale[block], first_codes);
    auto v = decode_pack(load<lane_elements>(second + own.start, own.left, wide), x.second_scale[block], second_codes);
    step<Weight, lane_elements>(x, kind, numbers, m, v, own.start, own.left, wide);
#pragma unroll
    for (int k = 0; k < lane_elements; ++k) {  // what lies past the end decides nothing
      m[k] = k < own.left ? m[k] : 0;
      v[k] = k < own.left ? v[k] : 0;
    }
    // After all lanes have read the old ones.
    const float m_scale = slimstate::scale_of(warp_largest(m), Codes::kind(true));
    const float v_scale = slimstate::scale_of(warp_largest(v), Codes::kind(false));
    if (threadIdx.x % 32 == 0) {
      x.first_scale[block] = m_scale;
      x.second_scale[block] = v_scale;
    }
    const float m_factor = slimstate::factor_of(m_scale, Codes::kind(true));
    const float v_factor = slimstate::factor_of(v_scale, Codes::kind(false));
    store(first + own.start, encode_pack(m, m_factor, first_codes), own.left, wide);
    store(second + own.start, encode_pack(v, v_factor, second_codes), own.left, wide);
  }
}

void adamw_step_(std::vector<Tensor> ps, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                 std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> scales, std::vector<Tensor> lows,
                 std::vector<double> biases, std::vector<int64_t> keys, std::vector<int64_t> places, bool stochastic,
                 double decay, double lr, double beta1, double beta2, double eps, bool maximize) {
  const auto list = slimstate::check_adamw(ps, grads, exp_avgs, exp_avg_sqs, scales, lows, biases, keys, places,
                                           stochastic, lr);
  if (list.items.empty()) return;
  const DenseNumbers numbers(beta1, beta2, eps, decay, maximize);
  slimstate::with_format(list.kind.weight, [&](auto how) {
    using Weight = decltype(how);
    if (list.kind.coded) {
      const auto ctas = [](const Dense& x) {
        return blocks_of(x.rows * slimstate::blocks_of_run(x.length), cta_blocks);
      };
      const auto step = list.kind.companded ? step_coded<Weight, Companding> : step_coded<Weight, Dynamic>;
      launch_each(list.items, ctas, ps[0], step, list.kind, numbers);
    } else {
      const auto ctas = [](const Dense& x) { return blocks_of(x.length); };
      launch_each(list.items, ctas, ps[0], step_all<Weight>, list.kind, numbers);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CUDA, m) { m.impl("adamw_step_", TORCH_BOX(&adamw_step_)); }
