#include "version.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/version.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace mixhead {

const char* version() { return MIXHEAD_VERSION; }

const char* torch_version() { return TORCH_VERSION; }

namespace {

// Major and minor version: the upper two bytes of the number LibTorch reports.
constexpr int kMinorShift = 48;

// LibTorch keeps its C++ interface within a minor version only. Runs before every static
// registration of this library, which would already call that interface; an exception could not
// leave the loader. Python and CMake compare the versions earlier and can say so politely.
[[gnu::constructor(101)]] void check_torch_version() {
  const uint64_t loaded = aoti_torch_abi_version();
  if (loaded >> kMinorShift == TORCH_ABI_VERSION >> kMinorShift) {
    return;
  }
  std::fprintf(
      stderr,
      "mixhead %s was built with LibTorch %s but is loaded beside LibTorch %d.%d: build it again "
      "with the LibTorch at hand, or run the program with LibTorch %d.%d.\n",
      MIXHEAD_VERSION, TORCH_VERSION, static_cast<int>(loaded >> 56),
      static_cast<int>(loaded >> kMinorShift & 0xff), TORCH_VERSION_MAJOR, TORCH_VERSION_MINOR);
  std::abort();
}

}  // namespace

}  // namespace mixhead
