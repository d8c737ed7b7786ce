// Low-rank Adam: projected gradients R into their moments, and U over R, for a list of matrices.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <memory>
#include <vector>

#include "adam.h"
#include "checks.h"
#include "cpu/blocks.h"
#include "cpu/clones.h"
#include "cpu/runs.h"

using torch::stable::Tensor;

namespace {

constexpr int64_t JOB = 1 << 14;   // elements
constexpr int64_t BESIDE = 64;     // columns of which a block of codes is read, changed and stored together

struct Matrix {
  float* r;
  void *m, *v;
  const int32_t* ages;  // of each row; null where all have the same
  float *m_scale, *v_scale;
  int64_t rows, columns;  // a row has an age; where none has, all is one
  int64_t length;         // of a column of codes
  slimstate::Bias bias;
  slimstate::Key first, second;
  slimstate::Place place;
};

template <typename Moment>
SLIMSTATE_CLONES void step(float* r, typename Moment::Bits* m, typename Moment::Bits* v, int64_t count,
                           slimstate::Adam adam, slimstate::Bias bias, slimstate::Key first, slimstate::Key second,
                           uint64_t index) {
  for (int64_t i = 0; i < count; ++i) {
    float mean = Moment::widen(m[i]), square = Moment::widen(v[i]);
    r[i] = slimstate::adam_direction(adam, bias, r[i], mean, square);
    const uint64_t place = index + static_cast<uint64_t>(i);
    m[i] = Moment::narrow(mean, Moment::random ? slimstate::random_bits(first, place) : 0);
    v[i] = Moment::narrow(square, Moment::random ? slimstate::random_bits(second, place) : 0);
  }
}

template <typename Moment>
void step_run(const Matrix& x, int64_t begin, int64_t count, const slimstate::Adam& adam, slimstate::Bias bias) {
  auto* m = static_cast<typename Moment::Bits*>(x.m) + begin;
  auto* v = static_cast<typename Moment::Bits*>(x.v) + begin;
  if constexpr (!Moment::random) {
    step<Moment>(x.r + begin, m, v, count, adam, bias, x.first, x.second, 0);
  } else {
    slimstate::stretches(x.place, static_cast<uint64_t>(begin), count, [&](int64_t at, int64_t own, uint64_t index) {
      step<Moment>(x.r + begin + at, m + at, v + at, own, adam, bias, x.first, x.second, index);
    });
  }
}

// A part of the work: elements [begin, end) of one matrix, whole rows where these have ages.
struct Job {
  int64_t matrix, begin, end;
};

template <typename Moment>
void step_all(const std::vector<Matrix>& matrices, const std::vector<Job>& jobs, double beta1, double beta2, double eps,
              bool maximize) {
  const slimstate::Adam adam(beta1, beta2, eps);
  torch::stable::parallel_for(0, static_cast<int64_t>(jobs.size()), 1, [&](int64_t from, int64_t to) {
    int32_t age = -1;
    slimstate::Bias bias{};
    for (int64_t i = from; i < to; ++i) {
      const Job& job = jobs[i];
      const Matrix& x = matrices[job.matrix];
      if (x.ages == nullptr) {
        step_run<Moment>(x, job.begin, job.end - job.begin, adam, x.bias);
        continue;
      }
      for (int64_t at = job.begin; at < job.end; at += x.columns) {
        const int32_t own = x.ages[at / x.columns];
        if (own != age) bias = slimstate::bias_of(age = own, beta1, beta2, maximize);
        step_run<Moment>(x, at, x.columns, adam, bias);
      }
    }
  });
}

SLIMSTATE_CLONES void scaled(float* x, const float* scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= scale[i];
}

// Adam for a row of decoded moments; and the largest magnitudes of columns so far.
SLIMSTATE_CLONES void step_decoded(float* __restrict r, float* __restrict m, float* __restrict v,
                                   float* __restrict largest_m, float* __restrict largest_v, int64_t n,
                                   slimstate::Adam adam, slimstate::Bias bias) {
  for (int64_t i = 0; i < n; ++i) {
    float mean = m[i], square = v[i];
    r[i] = slimstate::adam_direction(adam, bias, r[i], mean, square);
    m[i] = mean;
    v[i] = square;
    // Of magnitudes the bits are in the order of the numbers, and NaN is above them.
    const uint32_t a = slimstate::float_bits(mean) & 0x7fffffffU, b = slimstate::float_bits(square) & 0x7fffffffU;
    largest_m[i] = slimstate::bits_float(std::max(slimstate::float_bits(largest_m[i]), a));
    largest_v[i] = slimstate::bits_float(std::max(slimstate::float_bits(largest_v[i]), b));
  }
}

// Codes: of each matrix the work is blocks of 256 rows and BESIDE columns, which job.begin counts.
template <bool companded>
void step_codes(const std::vector<Matrix>& matrices, const std::vector<Job>& jobs, double beta1, double beta2,
                double eps, bool maximize) {
  using slimstate::code_block;
  constexpr slimstate::CodeKind kinds[] = {{companded, true}, {companded, false}};
  const slimstate::Adam adam(beta1, beta2, eps);
  torch::stable::parallel_for(0, static_cast<int64_t>(jobs.size()), 1, [&](int64_t from, int64_t to) {
    const std::unique_ptr<float[]> room(new float[2 * code_block * BESIDE]);
    int32_t age = -1;
    slimstate::Bias bias{};
    for (int64_t i = from; i < to; ++i) {
      const Matrix& x = matrices[jobs[i].matrix];
      const int64_t beside = (x.columns + BESIDE - 1) / BESIDE, blocks = (x.length + code_block - 1) / code_block;
      const int64_t column = jobs[i].begin % beside * BESIDE, block = jobs[i].begin / beside % blocks;
      const int64_t member = jobs[i].begin / beside / blocks, width = std::min(BESIDE, x.columns - column);
      const int64_t first = member * x.length + block * code_block;
      const int64_t height = std::min(code_block, x.length - block * code_block);
      float* scales[] = {x.m_scale + (member * blocks + block) * x.columns + column,
                         x.v_scale + (member * blocks + block) * x.columns + column};
      uint8_t* codes[] = {static_cast<uint8_t*>(x.m), static_cast<uint8_t*>(x.v)};
      float* wide[] = {room.get(), room.get() + code_block * BESIDE};
      float largest[2][BESIDE] = {}, factors[BESIDE];
      for (int64_t t = 0; t < height; ++t) {
        const int64_t at = (first + t) * x.columns + column;
        for (int k = 0; k < 2; ++k) {
          slimstate::look_up({wide[k] + t * BESIDE, codes[k] + at, width}, kinds[k]);
          scaled(wide[k] + t * BESIDE, scales[k], width);
        }
        if (x.ages != nullptr && x.ages[first + t] != age) {
          bias = slimstate::bias_of(age = x.ages[first + t], beta1, beta2, maximize);
        }
        step_decoded(x.r + at, wide[0] + t * BESIDE, wide[1] + t * BESIDE, largest[0], largest[1], width, adam,
                     x.ages == nullptr ? x.bias : bias);
      }
      for (int k = 0; k < 2; ++k) {
        for (int64_t j = 0; j < width; ++j) {
          scales[k][j] = slimstate::scale_of(largest[k][j], kinds[k]);
          factors[j] = slimstate::factor_of(scales[k][j], kinds[k]);
        }
        for (int64_t t = 0; t < height; ++t) {
          const int64_t at = (first + t) * x.columns + column;
          slimstate::encode_each(codes[k] + at, wide[k] + t * BESIDE, factors, width, kinds[k]);
        }
      }
    }
  });
}

void adam_directions_(std::vector<Tensor> rs, std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                      std::vector<Tensor> scales, std::vector<Tensor> ages, std::vector<double> biases, std::vector<int64_t> keys,
                      std::vector<int64_t> places, double beta1, double beta2, double eps, bool maximize) {
  using slimstate::Moments;
  const Moments kept = slimstate::check_directions(rs, exp_avgs, exp_avg_sqs, scales, ages, biases, keys, places);
  std::vector<Matrix> matrices;
  std::vector<Job> jobs;
  for (size_t i = 0; i < rs.size(); ++i) {
    Matrix x{};
    const int64_t numel = rs[i].numel();
    x.r = static_cast<float*>(rs[i].mutable_data_ptr());
    x.m = exp_avgs[i].mutable_data_ptr();
    x.v = exp_avg_sqs[i].mutable_data_ptr();
    x.rows = ages.empty() ? 1 : ages[i].numel();
    x.columns = x.rows == 0 ? 0 : numel / x.rows;
    if (ages.empty()) {
      x.bias = {static_cast<float>(biases[2 * i]), static_cast<float>(biases[2 * i + 1])};
    } else {
      x.ages = static_cast<const int32_t*>(ages[i].const_data_ptr());
    }
    if (kept == Moments::BFLOAT16) {
      x.first = slimstate::expand_key(static_cast<uint64_t>(keys[2 * i]));
      x.second = slimstate::expand_key(static_cast<uint64_t>(keys[2 * i + 1]));
      x.place = {static_cast<uint64_t>(places[3 * i]), static_cast<uint64_t>(places[3 * i + 1]),
                 static_cast<uint64_t>(places[3 * i + 2])};
    }
    if (slimstate::are_codes(kept)) {
      x.m_scale = static_cast<float*>(scales[2 * i].mutable_data_ptr());
      x.v_scale = static_cast<float*>(scales[2 * i + 1].mutable_data_ptr());
      x.length = rs[i].size(rs[i].dim() - 2);
      x.columns = rs[i].size(rs[i].dim() - 1);
      const int64_t beside = (x.columns + BESIDE - 1) / BESIDE;
      const int64_t blocks = (x.length + slimstate::code_block - 1) / slimstate::code_block;
      const int64_t count = numel == 0 ? 0 : numel / x.length / x.columns * blocks * beside;
      for (int64_t at = 0; at < count; ++at) jobs.push_back({static_cast<int64_t>(i), at, at + 1});
      matrices.push_back(x);
      continue;
    }
    const int64_t length =
        ages.empty() ? JOB : std::max<int64_t>(1, JOB / std::max<int64_t>(1, x.columns)) * x.columns;
    for (int64_t at = 0; at < numel; at += length) {
      jobs.push_back({static_cast<int64_t>(i), at, std::min(numel, at + length)});
    }
    matrices.push_back(x);
  }
  const auto all = kept == Moments::CODES       ? step_codes<false>
                   : kept == Moments::COMPANDED ? step_codes<true>
                   : kept == Moments::BFLOAT16  ? step_all<slimstate::BFloat16Moment>
                                                : step_all<slimstate::Float32Moment>;
  all(matrices, jobs, beta1, beta2, eps, maximize);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CPU, m) { m.impl("adam_directions_", TORCH_BOX(&adam_directions_)); }
