// Learns to match jobs to candidates by two criteria, from Hungarian answers alone: what run.py
// does, trained and run without Python. The matching is mixhead::matching_attention.

#include <mixhead/mixhead.h>
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t kSkills = 6, kLocation = 2;
constexpr double kLocationWeight = 3.0;
constexpr const char* kUsage =
    "usage: matching [--jobs N] [--steps N] [--batch N] [--tests N] [--seed N]\n"
    "\n"
    "Trains a matching of N jobs to N candidates and prints how many rows of it equal the\n"
    "Hungarian answer, before and after.\n";

/// The candidate of each job in the cheapest matching of cost (n, n): shortest augmenting paths
/// with potentials (Jonker & Volgenant 1987). Row and column 0 stand for "none".
Tensor hungarian(const Tensor& cost) {
  const auto n = cost.size(0);
  const auto matrix = cost.to(at::kDouble).contiguous();
  const auto costs = matrix.accessor<double, 2>();
  std::vector<double> row_potential(n + 1), column_potential(n + 1);
  std::vector<int64_t> row_of(n + 1), previous(n + 1);
  for (int64_t row = 1; row <= n; ++row) {
    std::vector<double> distance(n + 1, std::numeric_limits<double>::infinity());
    std::vector<bool> visited(n + 1);
    int64_t column = 0;
    row_of[0] = row;
    do {
      visited[column] = true;
      const auto from = row_of[column];
      int64_t nearest = 0;
      double step = std::numeric_limits<double>::infinity();
      for (int64_t j = 1; j <= n; ++j) {
        if (visited[j]) continue;
        const auto reduced = costs[from - 1][j - 1] - row_potential[from] - column_potential[j];
        if (reduced < distance[j]) distance[j] = reduced, previous[j] = column;
        if (distance[j] < step) step = distance[j], nearest = j;
      }
      for (int64_t j = 0; j <= n; ++j) {
        if (visited[j]) {
          row_potential[row_of[j]] += step;
          column_potential[j] -= step;
        } else {
          distance[j] -= step;
        }
      }
      column = nearest;
    } while (row_of[column] != 0);
    for (; column != 0; column = previous[column]) row_of[column] = row_of[previous[column]];
  }
  const auto matched = at::empty({n}, at::kLong);
  for (int64_t j = 1; j <= n; ++j) matched[row_of[j] - 1] = j - 1;
  return matched;
}

Tensor hungarian_of_each(const Tensor& costs) {
  std::vector<Tensor> each;
  for (const auto& cost : costs.unbind()) each.push_back(hungarian(cost));
  return at::stack(each);
}

/// Features (count, size, skills + location) of both sides, and the answers (count, size).
struct Instances {
  Tensor jobs, candidates, answers;
};

/// A job describes skills in other terms than a candidate: `terms` is the hidden dictionary.
Instances draw(int64_t count, int64_t size, const Tensor& terms) {
  const auto wanted = at::randn({count, size, kSkills}), skills = at::randn_like(wanted);
  const auto there = at::randn({count, size, kLocation}), here = at::randn_like(there);
  const auto cost =
      at::cdist(wanted, skills).square() + kLocationWeight * at::cdist(there, here).square();
  return {
      at::cat({at::matmul(wanted, terms), there}, -1), at::cat({skills, here}, -1),
      hungarian_of_each(cost)};
}

/// One head a criterion: its projections of both sides and its weight.
struct MatcherImpl : torch::nn::Module {
  MatcherImpl() {
    const auto projection = [&](const char* name, int64_t features) {
      return register_module(
          name, torch::nn::Linear(torch::nn::LinearOptions(features, kSkills).bias(false)));
    };
    job_skills = projection("job_skills", kSkills);
    job_location = projection("job_location", kLocation);
    candidate_skills = projection("candidate_skills", kSkills);
    candidate_location = projection("candidate_location", kLocation);
    log_weight = register_parameter("log_weight", at::zeros({2}));
  }

  /// log P of every pair, (count, size, size).
  Tensor forward(const Tensor& jobs, const Tensor& candidates) {
    const auto query = both(job_skills, job_location, jobs);
    const auto key = both(candidate_skills, candidate_location, candidates);
    const auto bandwidth = (-0.5 * log_weight).exp().repeat_interleave(kSkills).unsqueeze(0);
    const auto [output, row, column] = mixhead::matching_attention(
        query.unsqueeze(1), key.unsqueeze(1), key.unsqueeze(1), bandwidth, {"gaussian"});
    const auto difference = (query.unsqueeze(2) - key.unsqueeze(1)) / bandwidth;
    return row.transpose(1, 2) - 0.5 * difference.square().sum(-1) + column;
  }

  static Tensor both(torch::nn::Linear& skills, torch::nn::Linear& location, const Tensor& x) {
    return at::cat(
        {skills(x.narrow(-1, 0, kSkills)), location(x.narrow(-1, kSkills, kLocation))}, -1);
  }

  torch::nn::Linear job_skills = nullptr, job_location = nullptr;
  torch::nn::Linear candidate_skills = nullptr, candidate_location = nullptr;
  Tensor log_weight;
};
TORCH_MODULE(Matcher);

double rows_right(Matcher& matcher, const Instances& test) {
  const torch::NoGradGuard no_grad;
  const auto plan = matcher(test.jobs, test.candidates).exp();
  return hungarian_of_each(-plan).eq(test.answers).to(at::kDouble).mean().item<double>();
}

void train(Matcher& matcher, int64_t steps, int64_t batch, int64_t size, const Tensor& terms) {
  torch::optim::Adam optimizer(matcher->parameters(), torch::optim::AdamOptions(0.03));
  for (int64_t step = 0; step < steps; ++step) {
    const auto instances = draw(batch, size, terms);
    const auto log_plan = matcher(instances.jobs, instances.candidates);
    const auto loss = -log_plan.gather(-1, instances.answers.unsqueeze(-1)).mean();
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    if (step % 50 == 0 || step + 1 == steps) {
      std::printf(
          "step %lld: -log P of the Hungarian answer %.3f\n", static_cast<long long>(step),
          loss.item<double>());
      std::fflush(stdout);
    }
  }
}

std::map<std::string, int64_t> options(int argc, char** argv) {
  std::map<std::string, int64_t> found{
      {"--jobs", 12}, {"--steps", 100}, {"--batch", 32}, {"--tests", 200}, {"--seed", 0}};
  for (int i = 1; i < argc; i += 2) {
    char* end = nullptr;
    const auto option = found.find(argv[i]);
    if (option == found.end() || i + 1 == argc) throw std::invalid_argument(kUsage);
    option->second = std::strtoll(argv[i + 1], &end, 10);
    const bool too_small = option->second < (option->first == "--seed" ? 0 : 1);
    if (*end != '\0' || too_small) throw std::invalid_argument(kUsage);
  }
  return found;
}

void run(int argc, char** argv) {
  const auto option = options(argc, argv);
  torch::manual_seed(option.at("--seed"));
  const auto size = option.at("--jobs");
  const auto terms = std::get<0>(at::linalg_qr(at::randn({kSkills, kSkills})));
  Matcher matcher;
  const auto test = draw(option.at("--tests"), size, terms);
  const auto before = rows_right(matcher, test);
  train(matcher, option.at("--steps"), option.at("--batch"), size, terms);
  std::printf(
      "rows equal to the Hungarian answer: %.3f before training, %.3f after\n", before,
      rows_right(matcher, test));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(argc, argv);
  } catch (const std::invalid_argument& error) {
    std::fputs(error.what(), stderr);
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
