// Low-rank Adam: projected gradients R into their moments, and U over R, for a list of matrices.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "adam.h"
#include "checks.h"
#include "cpu/clones.h"
#include "cpu/runs.h"

using torch::stable::Tensor;

namespace {

constexpr int64_t JOB = 1 << 14;  // elements

struct Matrix {
  float* r;
  void *m, *v;
  const int32_t* ages;  // of each row; null where all have the same
  int64_t rows, columns;
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

void adam_directions_(std::vector<Tensor> rs, std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                      std::vector<Tensor> ages, std::vector<double> biases, std::vector<int64_t> keys,
                      std::vector<int64_t> places, double beta1, double beta2, double eps, bool maximize) {
  const bool low = slimstate::check_directions(rs, exp_avgs, exp_avg_sqs, ages, biases, keys, places);
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
    if (low) {
      x.first = slimstate::expand_key(static_cast<uint64_t>(keys[2 * i]));
      x.second = slimstate::expand_key(static_cast<uint64_t>(keys[2 * i + 1]));
      x.place = {static_cast<uint64_t>(places[3 * i]), static_cast<uint64_t>(places[3 * i + 1]),
                 static_cast<uint64_t>(places[3 * i + 2])};
    }
    const int64_t length =
        ages.empty() ? JOB : std::max<int64_t>(1, JOB / std::max<int64_t>(1, x.columns)) * x.columns;
    for (int64_t at = 0; at < numel; at += length) {
      jobs.push_back({static_cast<int64_t>(i), at, std::min(numel, at + length)});
    }
    matrices.push_back(x);
  }
  const auto all = low ? step_all<slimstate::BFloat16Moment> : step_all<slimstate::Float32Moment>;
  all(matrices, jobs, beta1, beta2, eps, maximize);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slimstate, CPU, m) { m.impl("adam_directions_", TORCH_BOX(&adam_directions_)); }
