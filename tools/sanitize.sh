#!/usr/bin/env bash
# The engine's tests under GCC's sanitizers and valgrind: tools/sanitize.sh [address undefined thread valgrind]
#
# They see plain pointers and link no LibTorch, so what is reported is the engine's. Tests run the
# engine's items on threads of their own: ThreadSanitizer knows std::thread, not GCC's OpenMP.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[[ -x .venv/bin/python ]] && PYTHON=${PYTHON:-.venv/bin/python}  # where make setup put torch
PYTHON=${PYTHON:-python3}

build() {  # build FOLDER OPTION...
  cmake -S . -B "$1" -G Ninja -DPython_EXECUTABLE="$(command -v "$PYTHON")" -DMIXHEAD_BUILD_TESTS=ON \
    -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS=-O1 "${@:2}" >/dev/null
  cmake --build "$1" --target mixhead_engine_tests --parallel "${JOBS:-$(nproc)}"
}

for check in "${@:-address undefined thread valgrind}"; do
  for each in $check; do
    folder=build/sanitize-$each
    printf '\033[1m== %s\033[0m\n' "$each"
    if [[ $each == valgrind ]]; then
      # valgrind knows no AVX-512: __builtin_cpu_supports does not see it there and those tests skip.
      build "$folder"
      # The tests that run the engine alone: the reference loops would take minutes.
      valgrind --error-exitcode=1 --leak-check=full --quiet \
        "$folder/tests/mixhead_engine_tests" --gtest_brief=1 --gtest_filter='*SameBitsAgain*'
    else
      build "$folder" -DMIXHEAD_SANITIZE="$each"
      UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
        "$folder/tests/mixhead_engine_tests" --gtest_brief=1
    fi
  done
done
