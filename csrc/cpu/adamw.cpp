// AdamW on dense parameters: each piece of 256 elements is widened, stepped and stored again while it is in the first
// cache.
#include "adamw.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/blocks.h"
#include "cpu/clones.h"
#include "cpu/runs.h"

using slimstate::code_block;
using slimstate::Dense;
using slimstate::DenseKind;
using slimstate::DenseNumbers;
using slimstate::Format;
using slimstate::Key;
using torch::stable::Tensor;

namespace {

constexpr int64_t JOB = 1 << 15;  // elements

SLIMSTATE_CLONES void update(float* w, const float* g, float* m, float* v, int64_t n, DenseNumbers numbers,
                             slimstate::Bias bias) {
  for (int64_t i = 0; i < n; ++i) w[i] = slimstate::adamw(numbers, bias, w[i], g[i], m[i], v[i]);
}

template <typename Kept>
SLIMSTATE_CLONES void widen(float* x, const typename Kept::Bits* kept, const int16_t* low, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = Kept::widen(kept[i], Kept::low ? low[i] : int16_t{});
}

template <typename Kept>
SLIMSTATE_CLONES void narrow(typename Kept::Bits* kept, int16_t* low, const float* x, int64_t n, Key key,
                             uint64_t index) {
  const auto above = static_cast<uint32_t>(index >> 32), below = static_cast<uint32_t>(index);
  for (int64_t i = 0; i < n; ++i) {
    int16_t rest = 0;
    const uint32_t bits = Kept::random ? slimstate::random_bits(key, above, below + static_cast<uint32_t>(i)) : 0;
    kept[i] = Kept::narrow(x[i], bits, rest);
    if constexpr (Kept::low) low[i] = rest;
  }
}

// Elements [begin, begin + n) of something kept in a format, as float32 numbers: where they are that, in their place.
class Numbers {
 public:
  Numbers(Format format, void* kept, int16_t* low, int64_t begin, int64_t n)
      : format_(format), kept_(kept), low_(low == nullptr ? nullptr : low + begin), begin_(begin), n_(n) {
    if (format == Format::float32) {
      wide_ = static_cast<float*>(kept) + begin;
      return;
    }
    slimstate::with_format(format, [&](auto how) {
      using Kept = decltype(how);
      auto* first = static_cast<typename Kept::Bits*>(kept) + begin;
      kept_ = first;
      if constexpr (!std::is_same_v<typename Kept::Bits, float>) widen<Kept>(wide_ = buffer_, first, low_, n);
    });
  }

  float* wide() { return wide_; }

  void store(Key key, const slimstate::Place& place) {
    if (format_ == Format::float32) return;
    slimstate::with_format(format_, [&](auto how) {
      using Kept = decltype(how);
      auto* kept = static_cast<typename Kept::Bits*>(kept_);
      if constexpr (Kept::random) {
        slimstate::stretches(place, static_cast<uint64_t>(begin_), n_, [&](int64_t at, int64_t own, uint64_t index) {
          const auto first = std::min<int64_t>(own, (int64_t{1} << 32) - static_cast<uint32_t>(index));
          narrow<Kept>(kept + at, nullptr, wide_ + at, first, key, index);
          if (first < own) {
            narrow<Kept>(kept + at + first, nullptr, wide_ + at + first, own - first, key,
                         index + static_cast<uint64_t>(first));
          }
        });
      } else if constexpr (!std::is_same_v<typename Kept::Bits, float>) {
        narrow<Kept>(kept, low_, wide_, n_, key, 0);
      }
    });
  }

 private:
  Format format_;
  void* kept_;
  int16_t* low_;
  int64_t begin_, n_;
  float* wide_;
  alignas(32) float buffer_[code_block];
};

void step(const Dense& x, const DenseKind& kind, const DenseNumbers& numbers, int64_t begin, int64_t n) {
  Numbers w(kind.weight, x.p, x.low, begin, n);
  Numbers g(kind.grad, const_cast<void*>(x.grad), nullptr, begin, n);
  Numbers m(kind.moment, x.first, nullptr, begin, n), v(kind.moment, x.second, nullptr, begin, n);
  update(w.wide(), g.wide(), m.wide(), v.wide(), n, numbers, x.bias);
  w.store(x.weight_key, x.place);
  m.store(x.first_key, x.place);
  v.store(x.second_key, x.place);
}

// The values of codes as M and V, stepped; returns the largest magnitude in each.
struct Largest {
  float first, second;
};

SLIMSTATE_CLONES Largest update_coded(float* __restrict w, const float* __restrict g, float* __restrict m,
                                      float* __restrict v, int64_t n, DenseNumbers numbers, slimstate::Bias bias,
                                      float first_scale, float second_scale) {
  uint32_t first = 0, second = 0;  // of magnitudes the bits are in the order of the numbers, and NaN is above them
  for (int64_t i = 0; i < n; ++i) {
    float mean = m[i] * first_scale, square = v[i] * second_scale;
    w[i] = slimstate::adamw(numbers, bias, w[i], g[i], mean, square);
    m[i] = mean;
    v[i] = square;
    first = std::max(first, slimstate::float_bits(mean) & 0x7fffffffU);
    second = std::max(second, slimstate::float_bits(square));
  }
  return {slimstate::bits_float(first), slimstate::bits_float(second)};
}

// Blocks [from, to) of codes; those of the next block are looked up while the last one's are found.
template <bool companded>
void step_coded(const Dense& x, const DenseKind& kind, const DenseNumbers& numbers, int64_t from, int64_t to) {
  constexpr slimstate::CodeKind signed_kind{companded, true}, unsigned_kind{companded, false};
  alignas(32) float first[2][code_block], second[2][code_block];
  const int64_t in_run = slimstate::blocks_of_run(x.length);
  struct Piece {
    int64_t begin, n;
  };
  const auto piece = [&](int64_t block) -> Piece {
    const int64_t at = block % in_run * code_block;
    return {block / in_run * x.length + at, std::min(code_block, x.length - at)};
  };
  const auto codes = [](void* moment, int64_t begin) { return static_cast<uint8_t*>(moment) + begin; };
  Piece own = piece(from);
  slimstate::look_up({first[from % 2], codes(x.first, own.begin), own.n}, signed_kind);
  slimstate::look_up({second[from % 2], codes(x.second, own.begin), own.n}, unsigned_kind);
  for (int64_t block = from; block < to; ++block) {
    float *m = first[block % 2], *v = second[block % 2];
    const Piece next = block + 1 < to ? piece(block + 1) : Piece{0, 0};
    Numbers w(kind.weight, x.p, x.low, own.begin, own.n);
    Numbers g(kind.grad, const_cast<void*>(x.grad), nullptr, own.begin, own.n);
    const Largest scale = update_coded(w.wide(), g.wide(), m, v, own.n, numbers, x.bias, x.first_scale[block],
                                       x.second_scale[block]);
    w.store(x.weight_key, x.place);
    x.first_scale[block] = slimstate::scale_of(scale.first, signed_kind);
    x.second_scale[block] = slimstate::scale_of(scale.second, unsigned_kind);
    slimstate::encode_block(codes(x.first, own.begin), m, x.first_scale[block], own.n, signed_kind,
                            {first[(block + 1) % 2], codes(x.first, next.begin), next.n});
    slimstate::encode_block(codes(x.second, own.begin), v, x.second_scale[block], own.n, unsigned_kind,
                            {second[(block + 1) % 2], codes(x.second, next.begin), next.n});
    own = next;
  }
}

void adamw_step_(std::vector<Tensor> ps, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                 std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> scales, std::vector<Tensor> lows,
                 std::vector<double> biases, std::vector<int64_t> keys, std::vector<int64_t> places, bool stochastic,
                 double decay, double lr, double beta1, double beta2, double eps, bool maximize) {
  const auto list = slimstate::check_adamw(ps, grads, exp_avgs, exp_avg_sqs, scales, lows, biases, keys, places,
                                           stochastic, lr);
  const DenseNumbers numbers(beta1, beta2, eps, decay, maximize);
  struct Job {
    const Dense* x;
    int64_t begin, end;  // pieces
  };
  std::vector<Job> jobs;
  for (const Dense& x : list.items) {
    const int64_t pieces = x.rows * slimstate::blocks_of_run(x.length);
    constexpr int64_t each = JOB / code_block;
    for (int64_t at = 0; at < pieces; at += each) jobs.push_back({&x, at, std::min(pieces, at + each)});
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(jobs.size()), 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const Dense& x = *jobs[i].x;
      if (list.kind.coded) {
        (list.kind.companded ? step_coded<true> : step_coded<false>)(x, list.kind, numbers, jobs[i].begin, jobs[i].end);
        continue;
      }
      for (int64_t piece = jobs[i].begin; piece < jobs[i].end; ++piece) {
        const int64_t begin = piece * code_block;
        step(x, list.kind, numbers, begin, std::min(code_block, x.length - begin));
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CPU, m) { m.impl("adamw_step_", TORCH_BOX(&adamw_step_)); }
