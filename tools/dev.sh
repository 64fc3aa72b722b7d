#!/usr/bin/env bash
# What the Makefile runs: tools/dev.sh setup|build|install|test|demo|bench|lint|docs|gallery|clean
# (bench passes what follows to benchmarks/run.py)
#
#   PYTHON  the Python to use; its torch is taken where it has one of 2.11 to 2.15
#   TORCH   a version of torch to use instead (2.11.0); each has an environment and a build folder
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-}
DEFAULT_TORCH=2.15.0

say() { printf '\033[1m== %s\033[0m\n' "$*"; }
fail() {
  printf 'mixhead: %s\n' "$*" >&2
  exit 1
}

# ---- what must be there before anything can be installed ------------------------------------------

check_prerequisites() {
  command -v "$PYTHON" >/dev/null ||
    fail "'$PYTHON' is not here; mixhead needs Python 3.10 or newer: sudo apt install python3 python3-venv"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$PYTHON is $("$PYTHON" --version), older than Python 3.10: sudo apt install python3.11 python3.11-venv, then make PYTHON=python3.11"
  command -v "${CXX:-c++}" >/dev/null ||
    fail "no C++ compiler: sudo apt install g++"
  "${CXX:-c++}" -std=c++20 -fsyntax-only -x c++ - <<<'#include <concepts>
template <std::integral T> T f(T x) { return x; }' 2>/dev/null ||
    fail "'${CXX:-c++}' does not compile C++20 (g++ 11 or newer does): sudo apt install g++-12, then make CXX=g++-12"
}

# ---- the Python environment ----------------------------------------------------------------------

# The release of torch a Python has ("2.15.0"), empty for none; without the seconds of importing it.
torch_of() {
  "$1" -c 'from importlib.metadata import version; print(version("torch").split("+")[0])' \
    2>/dev/null || true
}

is_supported() { [[ $1 =~ ^2\.1[1-5]\. ]]; }

# pip must not install into a Python its distribution manages (PEP 668), nor can it without permission.
accepts_packages() {
  "$1" - <<'END'
import os, sys, sysconfig
managed = sys.prefix == sys.base_prefix and os.path.exists(
    os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"))
sys.exit(managed or not os.access(sysconfig.get_path("purelib"), os.W_OK))
END
}

make_venv() {
  local folder=$1
  shift
  [[ -x $folder/bin/python ]] && "$folder/bin/python" -m pip --version >/dev/null 2>&1 && return
  "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || fail \
    "$PYTHON has no venv module: sudo apt install python$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
  say "Creating $folder"
  "$PYTHON" -m venv --clear "$@" "$folder"
}

# Sets ENV_PYTHON, the Python everything runs in, and WANTED_TORCH, the torch it is to have.
choose_environment() {
  local host_torch folder=.venv
  host_torch=$(torch_of "$PYTHON")
  WANTED_TORCH=${TORCH:-$DEFAULT_TORCH}
  [[ $WANTED_TORCH == "$DEFAULT_TORCH" ]] || folder=.venv-torch-$WANTED_TORCH

  if is_supported "$host_torch" && [[ -z $TORCH || $TORCH == "$host_torch" ]]; then
    WANTED_TORCH=$host_torch
    if accepts_packages "$PYTHON"; then
      ENV_PYTHON=$("$PYTHON" -c 'import sys; print(sys.executable)')
      return
    fi
    make_venv "$folder" --system-site-packages
  else
    is_supported "$WANTED_TORCH" || fail "TORCH=$WANTED_TORCH is not supported; 2.11 to 2.15 are"
    make_venv "$folder"
  fi
  ENV_PYTHON=$PWD/$folder/bin/python
}

setup() {
  check_prerequisites
  choose_environment
  BUILD=build/torch-$WANTED_TORCH
  PATH=$("$ENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
  export PATH PYTHON=$ENV_PYTHON

  local stamp=$BUILD/setup.stamp content
  content="$ENV_PYTHON $(cksum <requirements-dev.txt)"
  if [[ $(torch_of "$ENV_PYTHON") == "$WANTED_TORCH" && -f $stamp && $(<"$stamp") == "$content" ]]; then
    return
  fi
  say "Installing torch $WANTED_TORCH and what the build and the tests need"
  local torch=()
  [[ $(torch_of "$ENV_PYTHON") == "$WANTED_TORCH" ]] || torch=("torch==$WANTED_TORCH")
  "$ENV_PYTHON" -m pip install --disable-pip-version-check --quiet "${torch[@]}" -r requirements-dev.txt
  mkdir -p "$BUILD"
  echo "$content" >"$stamp"
}

# ---- build and install ---------------------------------------------------------------------------

configure_and_build() {
  say "Building with torch $WANTED_TORCH in $BUILD"
  local generator=()
  [[ -f $BUILD/CMakeCache.txt ]] || generator=(-G Ninja)
  cmake -S . -B "$BUILD" "${generator[@]}" -DPython_EXECUTABLE="$ENV_PYTHON" "$@" >"$BUILD/configure.log" ||
    { cat "$BUILD/configure.log"; fail "CMake could not configure the build"; }
  cmake --build "$BUILD" --parallel "${JOBS:-$(nproc)}"
}

build() { configure_and_build -DMIXHEAD_BUILD_TESTS=ON; }

# Installs the package where a file of it is newer than the last install.
install() {
  local stamp=$BUILD/install.stamp
  if [[ -f $stamp && $(<"$stamp") == "$ENV_PYTHON" ]] &&
    "$ENV_PYTHON" -c 'from importlib.metadata import version; version("mixhead")' 2>/dev/null &&
    [[ -z $(find csrc ops cmake CMakeLists.txt setup.py README.md "$BUILD/libmixhead.so" \
      -newer "$stamp" -type f -not -name '*.pyc' -not -path '*.egg-info*' -print -quit) ]]; then
    return
  fi
  say "Installing mixhead into $(dirname "$(dirname "$ENV_PYTHON")")"
  local started=$BUILD/install.started
  mkdir -p "$BUILD"
  echo "$ENV_PYTHON" >"$started"
  CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-$(nproc)} "$ENV_PYTHON" -m pip install \
    --disable-pip-version-check --quiet --no-build-isolation --no-deps --force-reinstall .
  mv "$started" "$stamp"
}

# On a machine that others use too, OpenMP threads that spin while they wait take the time of those they
# wait for: training in examples/06_memory_mix ran at 1 step a second beside one busy process, and at
# 8 with threads that sleep. Benchmarks keep OpenMP's own choice.
wait_asleep() { export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}; }

# ---- the targets ---------------------------------------------------------------------------------

run_setup() {
  setup
  install
  echo "mixhead is importable in $ENV_PYTHON (torch $WANTED_TORCH)."
}

run_build() {
  setup
  build
}

run_test() {
  setup
  wait_asleep
  build
  say "C++ tests"
  ctest --test-dir "$BUILD" --output-on-failure --no-tests=error
  install
  say "Python tests"
  "$ENV_PYTHON" -m pytest tests/python
}

run_demo() {
  setup
  wait_asleep
  install
  "$ENV_PYTHON" examples/06_memory_mix/run.py
  cat <<END

Next: look at the pictures in build/examples/06_memory_mix/, read examples/06_memory_mix/README.md,
      run the tests with \`make test\`, or use it:
      $ENV_PYTHON -c "import mixhead; help(mixhead.MixedMultiheadAttention)"
END
}

run_bench() {
  setup
  install
  "$ENV_PYTHON" -m pip install --disable-pip-version-check --quiet -r requirements-bench.txt
  "$ENV_PYTHON" benchmarks/run.py "$@"
}

run_lint() {
  setup
  "$ENV_PYTHON" -m pip install --disable-pip-version-check --quiet -r requirements-lint.txt
  local files failed=0
  mapfile -t files < <(git ls-files --cached --others --exclude-standard '*.cpp' '*.h')
  say "clang-format";  clang-format --dry-run -Werror "${files[@]}" || failed=1
  say "ruff";  ruff check . || failed=1
  ruff format --check . || failed=1
  say "clang-tidy"
  mkdir -p "$BUILD-tidy"
  # A build folder of its own: the tests' precompiled header is GCC's, which clang cannot read.
  cmake -S . -B "$BUILD-tidy" -G Ninja -DPython_EXECUTABLE="$ENV_PYTHON" >/dev/null
  # omp.h is the compiler's own; behind clang's headers, as the rest of that folder is not for clang.
  local omp_folder
  omp_folder=$("${CXX:-c++}" -print-file-name=include)
  git ls-files --cached --others --exclude-standard 'csrc/*.cpp' |
    xargs -P "${JOBS:-$(nproc)}" -n 1 \
      clang-tidy --quiet -p "$BUILD-tidy" "--extra-arg=-idirafter$omp_folder" || failed=1
  return $failed
}

run_docs() {
  setup
  local script
  for script in docs/figures/*.py; do
    "$ENV_PYTHON" "$script"
  done
}

run_gallery() {
  setup
  install
  "$ENV_PYTHON" tools/gallery.py
}

run_clean() { rm -rf build dist ops/mixhead.egg-info; }

target=${1:-}
declare -F "run_$target" >/dev/null || fail "unknown target '$target'; see make help"
shift
"run_$target" "$@"
