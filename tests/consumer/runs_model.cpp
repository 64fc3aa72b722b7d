// Runs a scripted model that was saved with its expected output; names no symbol of mixhead.
#include <torch/script.h>

#include <cstdio>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: runs_model model.pt\n");
    return 2;
  }
  auto model = torch::jit::load(argv[1]);
  const auto output = model.forward({}).toTensor();
  const double error = (output - model.attr("expected").toTensor()).abs().max().item<double>();
  std::printf("error %.1e\n", error);
  return error <= 1e-12 ? 0 : 1;
}
