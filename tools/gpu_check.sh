#!/usr/bin/env bash
# What a machine with a GPU is to check: build for the torch at hand, compare every operator with
# float64 on the CPU, measure. Ends within about 6 minutes there.
#
#   tools/gpu_check.sh [--device cuda|cpu]
#
#   PYTHON  the Python to use, which has torch, numpy and pytest (default python3)
#   OUT     where the reports go (default build/gpu): check.json, benchmark.json and their texts
#   GROUPS_OF_BENCHMARK   names of benchmarks/gpu.py's groups (default all)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

device=cuda
[[ ${1:-} == --device ]] && device=${2:?"--device needs cuda or cpu"}
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$PWD/build/gpu}
mkdir -p "$OUT"

version=$("$PYTHON" -c 'import torch; print(torch.__version__.split("+")[0])') || exit 1
build=build/torch-$version
if [[ ! -f $build/libmixhead.so ]]; then
  cmake -G Ninja -S . -B "$build" -DPython_EXECUTABLE="$(command -v "$PYTHON")" >"$OUT/build.txt" &&
    cmake --build "$build" --target mixhead --parallel >>"$OUT/build.txt" 2>&1 ||
    { tail -n 40 "$OUT/build.txt"; exit 1; }
fi
export PYTHONPATH=ops:tests/python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

"$PYTHON" tools/gpu_check.py --device "$device" --out "$OUT" 2>&1 | tee "$OUT/check.txt"
checked=$?
read -ra groups <<<"${GROUPS_OF_BENCHMARK:-}"
"$PYTHON" benchmarks/gpu.py --device "$device" --out "$OUT" ${groups:+--groups "${groups[@]}"} 2>&1 |
  tee "$OUT/benchmark.txt"
measured=$?
exit $((checked | measured))
