// The moments of local-linear regression and their gradients on plain pointers, for every
// instruction set that this processor has: against sums in double, and their differences.
#include <cpu/local_moments.h>
#include <cpu/regression_schedule.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cpu_testing.h"

namespace {

using namespace mixhead::cpu;
using cpu_testing::Doubles;
using cpu_testing::expect_near;
using mixhead::Kernel;

constexpr int64_t kHeads = 2, kRows = 150, kKeys = 130, kChannels = 3, kWide = 5;
constexpr int64_t kSecond = kChannels * kWide;

/// Queries, data rows (key, value) and 1 / h, heads outermost; and the loss's weights of the
/// moments.
struct Arrays {
  Doubles query, data, inverse, by_mean, by_second, by_log_mass;
};
struct Moments {
  Doubles mean, second, log_mass;
};
struct Gradients {
  Doubles query, data, inverse;
};

Arrays draw(bool in_float) {
  std::mt19937 random(5);
  std::normal_distribution<double> normal;
  const auto numbers = [&](int64_t count, double centre, double scale) {
    Doubles result(count);
    for (auto& x : result) {
      x = centre + scale * normal(random);
      if (in_float) x = static_cast<float>(x);
    }
    return result;
  };
  constexpr int64_t all = kHeads * kRows;
  return {numbers(all * kChannels, 0, 0.5),       numbers(kHeads * kKeys * kWide, 0, 1),
          numbers(kHeads * kChannels, 0.5, 0.05), numbers(all * kWide, 0, 1),
          numbers(all * kSecond, 0, 1),           numbers(all, 0, 1)};
}

double kernel_of(Kernel kernel, double u) {
  if (kernel == Kernel::gaussian) return std::exp(-u * u / 2);
  return u < 1 ? std::pow(1 - u * u * u, 3) : 0.0;  // tricube
}

Moments reference(Kernel kernel, const Arrays& a) {
  Moments m;
  for (int64_t row = 0; row < kHeads * kRows; ++row) {
    const int64_t head = row / kRows;
    const double *query = &a.query[row * kChannels], *inverse = &a.inverse[head * kChannels];
    const double* data = &a.data[head * kKeys * kWide];
    Doubles weight(kKeys), mean(kWide), second(kSecond);
    double mass = 0;
    for (int64_t k = 0; k < kKeys; ++k) {
      double u2 = 0;
      for (int64_t c = 0; c < kChannels; ++c) {
        u2 += std::pow((data[k * kWide + c] - query[c]) * inverse[c], 2);
      }
      weight[k] = kernel_of(kernel, std::sqrt(u2));
      mass += weight[k];
    }
    m.log_mass.push_back(std::log(mass));
    for (int64_t k = 0; k < kKeys && mass > 0; ++k) {
      for (int64_t e = 0; e < kWide; ++e) mean[e] += weight[k] / mass * data[k * kWide + e];
    }
    for (int64_t k = 0; k < kKeys && mass > 0; ++k) {
      const double* x = data + k * kWide;
      for (int64_t i = 0; i < kSecond; ++i) {
        const int64_t c = i / kWide, e = i % kWide;
        second[i] += weight[k] / mass * (x[c] - mean[c]) * (x[e] - mean[e]);
      }
    }
    for (int64_t c = 0; c < kChannels && mass > 0; ++c) mean[c] -= query[c];
    m.mean.insert(m.mean.end(), mean.begin(), mean.end());
    m.second.insert(m.second.end(), second.begin(), second.end());
  }
  return m;
}

/// The loss of one head: what its moments weigh together.
double loss_of(Kernel kernel, const Arrays& a, int64_t head) {
  const auto m = reference(kernel, a);
  double loss = 0;
  for (int64_t row = head * kRows; row < (head + 1) * kRows; ++row) {
    if (std::isinf(m.log_mass[row])) continue;
    loss += a.by_log_mass[row] * m.log_mass[row];
    for (int64_t e = 0; e < kWide; ++e)
      loss += a.by_mean[row * kWide + e] * m.mean[row * kWide + e];
    for (int64_t i = row * kSecond; i < (row + 1) * kSecond; ++i)
      loss += a.by_second[i] * m.second[i];
  }
  return loss;
}

/// Runs the engine's items one after the other, cut as for `threads` threads.
template <class T>
class Engine {
 public:
  Engine(Kernel kernel, const Arrays& a, const RegressionKernels& functions, int64_t threads)
      : f_(functions),
        query_(narrow(a.query)),
        data_(narrow(a.data)),
        inverse_(narrow(a.inverse)),
        kernels_(kHeads, kernel) {
    auto& p = regression_.problem;
    p.type = sizeof(T) == 8 ? Type::float64 : Type::float32;
    p.batch = p.groups = 1;
    p.key_heads = kHeads;
    p.rows = kRows;
    p.channels = kChannels;
    p.value_channels = kWide;
    p.query = {query_.data(), &zero_, kRows * kChannels, kChannels, 1};
    auto& source = p.source[0];
    source.key = source.value = {data_.data(), &zero_, kKeys * kWide, kWide, 1};
    source.keys = source.slots = kKeys;
    regression_.kernel = kernels_.data();
    regression_.inverse_bandwidth = inverse_.data();
    for (int64_t head = 0; head < kHeads; ++head) {
      precision_.push_back(std::pow(static_cast<double>(inverse_[head * kChannels]), 2));
    }
    regression_.precision = precision_.data();
    regression_.box_keys = regression_block(f_);
    centre_.resize(kHeads * kChannels);
    boxes_.resize(kHeads * (kKeys / regression_.box_keys + 1) * 2 * kChannels);
    regression_.centre = centre_.data();
    regression_.boxes = boxes_.data();
    regression_.normalize = true;
    std::vector<char> scratch(f_.summarise_scratch(regression_));
    for (int64_t unit = 0; unit < kHeads; ++unit) {
      f_.summarise(regression_, unit, scratch.data());
    }
    forward_.regression = regression_;
    split_local(f_, threads, kRows, forward_);
    find_moments();
    find_gradients(a);
  }

  Moments moments() const { return {wide(mean_), wide(second_), wide(log_mass_)}; }
  Gradients gradients() const { return {wide(by_query_), wide(by_data_), by_inverse_}; }

 private:
  using Numbers = std::vector<T>;
  static Numbers narrow(const Doubles& from) { return Numbers(from.begin(), from.end()); }
  static Doubles wide(const Numbers& from) { return Doubles(from.begin(), from.end()); }

  void find_moments() {
    constexpr int64_t all = kHeads * kRows;
    mean_.resize(all * kWide);
    second_.resize(all * kSecond);
    log_mass_.resize(all);
    const LocalMoments work{forward_, {0, kRows}, mean_.data(), second_.data(), log_mass_.data()};
    std::vector<char> scratch(f_.local_moments_scratch(work));
    for (int64_t i = 0; i < forward_.units * forward_.row_blocks; ++i) {
      f_.local_moments_item(work, i, scratch.data());
    }
  }

  void find_gradients(const Arrays& a) {
    Numbers linear = narrow(a.by_mean), quadratic = narrow(a.by_second), delta;
    for (int64_t row = 0; row < kHeads * kRows; ++row) {
      double product = -a.by_log_mass[row];
      for (int64_t i = 0; i < kSecond; ++i) {
        const int64_t at = row * kSecond + i, c = i / kWide, e = i % kWide;
        product += a.by_second[at] * static_cast<double>(second_[at]);
        if (e < kChannels)
          quadratic[at] += static_cast<T>(a.by_second[row * kSecond + e * kWide + c]);
      }
      delta.push_back(static_cast<T>(product));
    }
    LocalGradient work{};
    work.forward = forward_;
    work.chunk = {0, kRows};
    work.row_splits = forward_.row_blocks;
    work.mean = mean_.data();
    work.log_mass = log_mass_.data();
    work.linear = linear.data();
    work.quadratic = quadratic.data();
    work.delta = delta.data();
    const int64_t items = kHeads * work.row_splits;
    Numbers copies(work.row_splits * data_.size());
    Doubles bandwidth(items * kChannels);
    by_query_.resize(query_.size());
    work.grad_query = by_query_.data();
    work.grad_data = copies.data();
    work.grad_bandwidth = bandwidth.data();
    std::vector<char> scratch(f_.local_gradient_scratch(work));
    for (int64_t i = 0; i < items; ++i) f_.local_gradient_item(work, i, scratch.data());
    by_data_.resize(data_.size());
    for (size_t i = 0; i < copies.size(); ++i) by_data_[i % data_.size()] += copies[i];
    by_inverse_.resize(kHeads * kChannels);
    for (int64_t i = 0; i < items * kChannels; ++i) {
      const int64_t head = i / kChannels / work.row_splits, at = head * kChannels + i % kChannels;
      // dh = -dh^-1 / h^-2
      by_inverse_[at] -= bandwidth[i] / std::pow(static_cast<double>(inverse_[at]), 2);
    }
  }

  const RegressionKernels& f_;
  const int64_t zero_ = 0;
  Numbers query_, data_, inverse_;
  std::vector<Kernel> kernels_;
  Regression regression_{};
  RegressionForward forward_{};
  Numbers centre_, boxes_, mean_, second_, log_mass_, by_query_, by_data_;
  Doubles precision_, by_inverse_;
};

/// Some gradients by a difference of the loss of the head they belong to.
void expect_differences(
    Kernel kernel, Arrays& a, const Gradients& found, double tolerance, const std::string& what) {
  const auto check = [&](Doubles& numbers, const Doubles& gradient, const char* name) {
    const auto size = static_cast<int64_t>(numbers.size());
    Doubles wanted, chosen;
    for (int64_t at = 0; at < size; at += size / 5 + 1) {
      constexpr double step = 1e-5;
      const int64_t head = at / (size / kHeads);
      const double before = numbers[at];
      numbers[at] = before + step;
      const double above = loss_of(kernel, a, head);
      numbers[at] = before - step;
      wanted.push_back((above - loss_of(kernel, a, head)) / (2 * step));
      numbers[at] = before;
      chosen.push_back(gradient[at]);
    }
    expect_near(chosen, wanted, tolerance, what + name);
  };
  check(a.query, found.query, "query");
  check(a.data, found.data, "data");
  check(a.inverse, found.inverse, "bandwidth");
}

class LocalMomentsTest : public testing::TestWithParam<const char*> {};

TEST_P(LocalMomentsTest, EqualSumsAndTheirDifferences) {
  for (const auto type : {Type::float32, Type::float64}) {
    const auto* functions = regression_kernels_of(GetParam(), type);
    if (!functions) GTEST_SKIP() << "this processor has no " << GetParam();
    for (const auto kernel : {Kernel::gaussian, Kernel::tricube}) {
      for (const int64_t threads : {1, 4}) {
        auto arrays = draw(type == Type::float32);
        const auto run = [&]<class T>(T) {
          const Engine<T> engine(kernel, arrays, *functions, threads);
          return std::make_pair(engine.moments(), engine.gradients());
        };
        const auto [moments, gradients] = type == Type::float64 ? run(double{}) : run(float{});
        const auto wanted = reference(kernel, arrays);
        const bool exact = type == Type::float64;
        const std::string what = kernel == Kernel::gaussian ? "gaussian, " : "tricube, ";
        expect_near(moments.mean, wanted.mean, exact ? 1e-13 : 2e-6, what + "mean");
        expect_near(moments.second, wanted.second, exact ? 1e-13 : 2e-6, what + "second");
        expect_near(moments.log_mass, wanted.log_mass, exact ? 1e-13 : 2e-6, what + "log mass");
        expect_differences(kernel, arrays, gradients, exact ? 1e-7 : 2e-5, what);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Sets, LocalMomentsTest, testing::Values("default", "avx2", "avx512"),
    [](const auto& info) { return std::string(info.param); });

}  // namespace
