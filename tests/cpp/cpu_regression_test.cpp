// Kernel regression of the CPU engine on plain pointers, for every instruction set that this
// processor has, against loops in double written apart from it.
#include <cpu/regression.h>
#include <cpu/regression_schedule.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cpu_testing.h"

namespace {

using namespace mixhead::cpu;
using cpu_testing::Doubles;
using cpu_testing::expect_near;
using mixhead::Kernel;

struct Case {
  const char* name;
  int64_t batch, key_heads, groups, rows, keys, channels, value_channels;
  bool shared = false, causal = false, exclude_self = false, normalize = true;
  int64_t heads() const { return key_heads * groups; }
};

const Case kCases[] = {
    {"subtracted", 2, 2, 1, 70, 130, 3, 2},
    {"multiplied", 2, 1, 1, 70, 130, 13, 11},
    {"grouped, shared", 3, 1, 2, 21, 90, 12, 5, true},
    {"causal", 1, 1, 1, 37, 61, 3, 17, false, true},
    {"leave-one-out", 1, 2, 1, 90, 90, 9, 3, false, false, true},
    {"sum", 1, 1, 1, 20, 60, 2, 1, false, false, false, false},
    {"one row", 1, 1, 1, 1, 20000, 10, 3},
};

/// K and dK/dt of t = u, or of the product for dot.
struct Value {
  double kernel, slope;
};
struct Named {
  const char* name;
  Kernel kernel;
  std::function<Value(double)> of;
};
const double r3 = std::sqrt(3.0), r5 = std::sqrt(5.0);
const Named kKernels[] = {
    {"dot", Kernel::dot, [](double t) { return Value{std::exp(t), std::exp(t)}; }},
    {"gaussian", Kernel::gaussian,
     [](double u) { return Value{std::exp(-u * u / 2), -u * std::exp(-u * u / 2)}; }},
    {"laplacian", Kernel::laplacian,
     [](double u) { return Value{std::exp(-u), u == 0 ? 0.0 : -std::exp(-u)}; }},
    {"matern32", Kernel::matern32,
     [](double u) { return Value{(1 + r3 * u) * std::exp(-r3 * u), -3 * u * std::exp(-r3 * u)}; }},
    {"matern52", Kernel::matern52,
     [](double u) {
       return Value{
           (1 + r5 * u + 5 * u * u / 3) * std::exp(-r5 * u),
           -5.0 / 3 * u * (1 + r5 * u) * std::exp(-r5 * u)};
     }},
    {"cauchy", Kernel::cauchy,
     [](double u) { return Value{1 / (1 + u * u), -2 * u / std::pow(1 + u * u, 2)}; }},
    {"epanechnikov", Kernel::epanechnikov,
     [](double u) { return u < 1 ? Value{1 - u * u, -2 * u} : Value{0, 0}; }},
    {"tricube", Kernel::tricube,
     [](double u) {
       const double rest = 1 - u * u * u;
       return u < 1 ? Value{rest * rest * rest, -9 * u * u * rest * rest} : Value{0, 0};
     }},
};

struct Arrays {
  Doubles query, key, value, inverse, grad, grad_mass;
};
struct Results {
  Doubles output, mass, grad_query, grad_key, grad_value, grad_bandwidth;
};

Arrays draw(const Case& c, bool in_float) {
  std::mt19937 random(11);
  std::normal_distribution<double> normal;
  const auto numbers = [&](int64_t count, double scale) {
    Doubles result(count);
    for (auto& x : result) {
      x = scale * normal(random);
      if (in_float) x = static_cast<float>(x);
    }
    return result;
  };
  const int64_t all = c.batch * c.heads() * c.rows;
  const int64_t points = (c.shared ? 1 : c.batch) * c.key_heads * c.keys;
  const double scale = 1 / std::sqrt(static_cast<double>(c.channels));
  Arrays a{numbers(all * c.channels, scale),      numbers(points * c.channels, scale),
           numbers(points * c.value_channels, 1), numbers(c.heads() * c.channels, 0.1),
           numbers(all * c.value_channels, 1),    numbers(all, 1)};
  for (auto& x : a.inverse) x = in_float ? static_cast<float>(0.8 + x) : 0.8 + x;
  return a;
}

/// The operator's formulas, one query after the other.
Results reference(const Case& c, const Named& named, const Arrays& a) {
  const int64_t d = c.channels, w = c.value_channels;
  Results r;
  r.output.assign(a.grad.size(), 0.0);
  r.mass.assign(a.grad_mass.size(), -cpu_testing::kInf);
  r.grad_query.assign(a.query.size(), 0.0);
  r.grad_key.assign(a.key.size(), 0.0);
  r.grad_value.assign(a.value.size(), 0.0);
  r.grad_bandwidth.assign(a.inverse.size(), 0.0);
  for (int64_t row = 0; row < static_cast<int64_t>(a.grad_mass.size()); ++row) {
    const int64_t i = row % c.rows, head = row / c.rows % c.heads();
    const int64_t batch = c.shared ? 0 : row / c.rows / c.heads();
    const int64_t unit = batch * c.key_heads + head / c.groups;
    const double *q = &a.query[row * d], *inverse = &a.inverse[head * d];
    const double* grad = &a.grad[row * w];
    std::vector<Value> kernel(c.keys, Value{0, 0});
    Doubles t(c.keys, 0.0);
    double sum = 0;
    for (int64_t k = 0; k < c.keys; ++k) {
      if (c.causal && k > c.keys - c.rows + i) continue;
      if (c.exclude_self && k == i) continue;
      const double* key = &a.key[(unit * c.keys + k) * d];
      for (int64_t x = 0; x < d; ++x) {
        const double h2 = inverse[x] * inverse[x];
        t[k] += named.kernel == Kernel::dot ? q[x] * key[x] * h2
                                            : (q[x] - key[x]) * (q[x] - key[x]) * h2;
      }
      if (named.kernel != Kernel::dot) t[k] = std::sqrt(t[k]);
      kernel[k] = named.of(t[k]);
      sum += kernel[k].kernel;
    }
    if (sum == 0) continue;
    r.mass[row] = std::log(sum);
    const double divisor = c.normalize ? sum : 1.0;
    double product = 0;
    for (int64_t k = 0; k < c.keys; ++k) {
      for (int64_t x = 0; x < w; ++x) {
        r.output[row * w + x] += kernel[k].kernel * a.value[(unit * c.keys + k) * w + x] / divisor;
      }
    }
    for (int64_t x = 0; x < w; ++x) product += grad[x] * r.output[row * w + x];
    for (int64_t k = 0; k < c.keys; ++k) {
      const int64_t at = unit * c.keys + k;
      double of_kernel = a.grad_mass[row] / sum;
      for (int64_t x = 0; x < w; ++x) {
        of_kernel += grad[x] * a.value[at * w + x] / divisor;
        r.grad_value[at * w + x] += grad[x] * kernel[k].kernel / divisor;
      }
      if (c.normalize) of_kernel -= product / sum;
      for (int64_t x = 0; x < d; ++x) {
        const double key = a.key[at * d + x], h2 = inverse[x] * inverse[x];
        double &to_query = r.grad_query[row * d + x], &to_key = r.grad_key[at * d + x];
        double& to_bandwidth = r.grad_bandwidth[head * d + x];
        const double slope = of_kernel * kernel[k].slope;
        if (named.kernel == Kernel::dot) {
          to_query += slope * key * h2;
          to_key += slope * q[x] * h2;
          to_bandwidth -= 2 * slope * q[x] * key * h2 * inverse[x];
        } else if (t[k] > 0) {
          const double difference = q[x] - key;
          to_query += slope * difference * h2 / t[k];
          to_key -= slope * difference * h2 / t[k];
          to_bandwidth -= slope * difference * difference * h2 * inverse[x] / t[k];
        }
      }
    }
  }
  return r;
}

/// Runs the engine's items one after the other, as if on `threads` threads; `in_parts` makes waves
/// and chunks of what would be one.
template <class T>
class Engine {
 public:
  Engine(
      const Case& c, Kernel kernel, const Arrays& a, const RegressionKernels& functions,
      int64_t threads, bool in_parts)
      : c_(c),
        f_(functions),
        threads_(threads),
        query_(narrow(a.query)),
        key_(narrow(a.key)),
        value_(narrow(a.value)),
        inverse_(narrow(a.inverse)),
        grad_(narrow(a.grad)),
        grad_mass_(narrow(a.grad_mass)),
        kernels_(c.heads(), kernel) {
    for (int64_t b = 0; b < c.batch; ++b) {
      const int64_t rows = b * c.heads() * c.rows, keys = c.shared ? 0 : b * c.key_heads * c.keys;
      query_batch_.push_back(rows * c.channels);
      grad_batch_.push_back(rows * c.value_channels);
      row_batch_.push_back(rows);
      key_batch_.push_back(keys * c.channels);
      value_batch_.push_back(keys * c.value_channels);
    }
    auto& p = r_.problem;
    p.type = sizeof(T) == 8 ? Type::float64 : Type::float32;
    p.batch = c.batch;
    p.key_heads = c.key_heads;
    p.groups = c.groups;
    p.rows = c.rows;
    p.channels = c.channels;
    p.value_channels = c.value_channels;
    p.query = {query_.data(), query_batch_.data(), c.rows * c.channels, c.channels, 1};
    auto& source = p.source[0];
    source.key = {key_.data(), key_batch_.data(), c.keys * c.channels, c.channels, 1};
    source.value = {
        value_.data(), value_batch_.data(), c.keys * c.value_channels, c.value_channels, 1};
    source.keys = source.slots = c.keys;
    source.shared = c.shared;
    source.causal = c.causal;
    const int64_t units = key_units(p);
    r_.kernel = kernels_.data();
    r_.inverse_bandwidth = inverse_.data();
    for (int64_t head = 0; head < c.heads(); ++head) {
      precision_.push_back(std::pow(static_cast<double>(inverse_[head * c.channels]), 2));
    }
    r_.precision = precision_.data();
    r_.box_keys = regression_block(f_);
    centre_.resize(units * c.channels);
    boxes_.resize(units * (c.keys / r_.box_keys + 1) * 2 * c.channels);
    r_.centre = centre_.data();
    r_.boxes = boxes_.data();
    r_.normalize = c.normalize;
    r_.exclude_self = c.exclude_self;
    std::vector<char> scratch(f_.summarise_scratch(r_));
    for (int64_t unit = 0; unit < units; ++unit) f_.summarise(r_, unit, scratch.data());
    forward();
    backward(in_parts);
  }

  Results results() const {
    return {wide(output_),   wide(mass_),       wide(grad_query_),
            wide(grad_key_), wide(grad_value_), grad_bandwidth_};
  }

 private:
  using Numbers = std::vector<T>;
  static Numbers narrow(const Doubles& from) { return Numbers(from.begin(), from.end()); }
  static Doubles wide(const Numbers& from) { return Doubles(from.begin(), from.end()); }

  void forward() {
    const int64_t all = c_.batch * c_.heads() * c_.rows;
    output_.resize(grad_.size());
    mass_.resize(all);
    RegressionForward work{};
    work.regression = r_;
    work.output = output_.data();
    work.log_mass = mass_.data();
    const auto items = split_regression(f_, threads_, work);
    Numbers part(work.key_splits * all * (c_.value_channels + 1));
    work.part = part.data();
    work.part_mass = part.data() + work.key_splits * all * c_.value_channels;
    std::vector<char> scratch(f_.forward_scratch(work));
    for (int64_t i = 0; i < items.count; ++i) f_.forward_item(work, i, scratch.data());
    if (work.key_splits > 1) f_.merge(work, 0, all);
  }

  void backward(bool in_parts) {
    grad_query_.resize(query_.size());
    grad_key_.resize(key_.size());
    grad_value_.resize(value_.size());
    grad_bandwidth_.assign(inverse_.size(), 0.0);
    RegressionBackward work{};
    work.regression = r_;
    work.grad_output = {
        grad_.data(), grad_batch_.data(), c_.rows * c_.value_channels, c_.value_channels, 1};
    work.output = work.grad_output;
    work.output.data = output_.data();
    work.log_mass = {mass_.data(), row_batch_.data(), c_.rows, 1, 0};
    work.grad_log_mass = work.log_mass;
    work.grad_log_mass.data = grad_mass_.data();
    work.grad_query = grad_query_.data();
    work.grad_key = grad_key_.data();
    work.grad_value = grad_value_.data();
    auto schedule = schedule_regression(r_.problem, f_, threads_);
    if (in_parts) {
      schedule.wave_units = 1;
      schedule.chunk_rows = c_.rows / 2 + 1;
    }
    const int64_t units = key_units(r_.problem);
    for (int64_t unit = 0; unit < units; unit += schedule.wave_units) {
      work.first_unit = unit;
      work.units = std::min(schedule.wave_units, units - unit);
      Numbers keys(work.units * c_.keys * c_.channels);
      Numbers values(work.units * c_.keys * c_.value_channels);
      work.key_store = keys.data();
      work.value_store = values.data();
      for (int64_t row = 0; row < c_.rows; row += schedule.chunk_rows) {
        work.chunk = {row, std::min(schedule.chunk_rows, c_.rows - row)};
        work.first_chunk = row == 0;
        work.last_chunk = row + work.chunk.rows == c_.rows;
        chunk(schedule, work);
      }
    }
  }

  void chunk(const RegressionSchedule& schedule, RegressionBackward& work) {
    const int64_t items = split_regression_backward(schedule, threads_, work);
    std::vector<char> part(regression_part_bytes(f_, work));
    Doubles bandwidth(items * c_.groups * c_.channels, 0.0);
    work.part = part.data();
    work.grad_bandwidth = bandwidth.data();
    std::vector<char> scratch(f_.backward_scratch(work));
    for (int64_t i = 0; i < items; ++i) f_.backward_item(work, i, scratch.data());
    const int64_t width = c_.groups * c_.channels;
    for (int64_t item = 0; item < items; ++item) {
      const int64_t head = (work.first_unit + item / work.key_splits) % c_.key_heads;
      for (int64_t i = 0; i < width; ++i) {
        grad_bandwidth_[head * width + i] += bandwidth[item * width + i];
      }
    }
    f_.reduce(work, 0, work.units * c_.groups * work.unit_rows, scratch.data());
  }

  const Case& c_;
  const RegressionKernels& f_;
  int64_t threads_;
  Numbers query_, key_, value_, inverse_, grad_, grad_mass_;
  std::vector<Kernel> kernels_;
  std::vector<int64_t> query_batch_, grad_batch_, row_batch_, key_batch_, value_batch_;
  Regression r_{};
  Numbers centre_, boxes_, output_, mass_, grad_query_, grad_key_, grad_value_;
  Doubles precision_, grad_bandwidth_;
};

class RegressionTest : public testing::TestWithParam<const char*> {};

TEST_P(RegressionTest, EqualsTheFormulas) {
  for (const auto type : {Type::float32, Type::float64}) {
    const auto* functions = regression_kernels_of(GetParam(), type);
    if (!functions) GTEST_SKIP() << "this processor has no " << GetParam();
    for (const auto& c : kCases) {
      const auto inputs = draw(c, type == Type::float32);
      for (const auto& named : kKernels) {
        const auto wanted = reference(c, named, inputs);
        for (const bool in_parts : {false, true}) {
          const int64_t threads = in_parts ? 4 : 1;
          Results found;
          if (type == Type::float64) {
            found =
                Engine<double>(c, named.kernel, inputs, *functions, threads, in_parts).results();
          } else {
            found = Engine<float>(c, named.kernel, inputs, *functions, threads, in_parts).results();
          }
          const double tolerance = type == Type::float64 ? 1e-12 : 1e-5;
          const std::string what = std::string(c.name) + ", " + named.name + ": ";
          expect_near(found.output, wanted.output, tolerance, what + "output");
          expect_near(found.mass, wanted.mass, tolerance, what + "log mass");
          expect_near(found.grad_query, wanted.grad_query, tolerance * 4, what + "query");
          expect_near(found.grad_key, wanted.grad_key, tolerance * 4, what + "key");
          expect_near(found.grad_value, wanted.grad_value, tolerance * 4, what + "value");
          expect_near(
              found.grad_bandwidth, wanted.grad_bandwidth, tolerance * 4, what + "bandwidth");
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Sets, RegressionTest, testing::Values("default", "avx2", "avx512"),
    [](const auto& info) { return std::string(info.param); });

}  // namespace
