#!/usr/bin/env bash
# Everything there is to learn on a machine with a GPU, in one command and under eight minutes, without a network:
#
#     OUT=folder bench/gpu.sh
#
# builds for this GPU into a temporary folder (the Python it runs on stays as it is), runs tests/gpu, compute-sanitizer on
# small cases, and every regime of the benchmark twice. Needs torch with CUDA, nvcc, setuptools, pybind11, ninja, pytest.
# Writes into ${OUT:-bench/results}: gpu-env.txt gpu-build.txt gpu-tests.txt gpu-sanitizer.txt gpu.csv gpu-bench.txt
# gpu-table.txt. Exit status: 0 all green, 1 something is red, 2 no GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
PYTHON=${PYTHON:-python3}
arch=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null) || {
  echo "bench/gpu.sh: $PYTHON finds no torch with a CUDA device here; nothing was measured" >&2
  exit 2
}
mkdir -p "${OUT:=bench/results}"
OUT=$(cd "$OUT" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH="$scratch/site" SPARSELOTTERY_CACHE="$scratch/cache" TRITON_CACHE_DIR="$scratch/triton"
unset TRITON_INTERPRET SPARSELOTTERY_BACKEND
red=()

# stage NAME SECONDS FILE COMMAND...: output into FILE; a failure is remembered and the next stage still runs.
stage() {
  local name=$1 limit=$2 file=$3 begin=$SECONDS status=0
  shift 3
  timeout -k 5 "$limit" "$@" >"$OUT/$file" 2>&1 || status=$?
  [ $status -eq 0 ] || red+=("$name ($([ $status -eq 124 ] && echo "over $limit s" || echo "exit $status"), see $file)")
  printf '%-12s exit %-3d %4d s  %s\n' "$name" $status $((SECONDS - begin)) "$(tail -n 1 "$OUT/$file" | cut -c1-100)"
}

sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed: memory and races were not checked"
    return
  fi
  local tool status=0
  for tool in memcheck racecheck; do
    echo "=== $tool"
    compute-sanitizer --tool $tool --error-exitcode 9 --print-limit 20 \
      "$PYTHON" "$root/bench/verify.py" --device cuda --small >"$scratch/$tool" 2>&1
    local code=$?
    cat "$scratch/$tool"
    # Some virtual machines do not let the tool reach the GPU: then nothing was checked, which is no fault of the kernels.
    if grep -q "Device not supported" "$scratch/$tool"; then
      echo "$tool cannot run on this machine: not checked"
    elif [ $code -ne 0 ]; then
      status=1
      echo "$tool: exit $code"
    else
      echo "$tool: clean"
    fi
  done
  return $status
}
export -f sanitize
export PYTHON OUT root scratch

# pip would look at the network for build requirements; they are here, so no isolation.
stage build 150 gpu-build.txt env SPARSELOTTERY_CUDA=1 SPARSELOTTERY_CUDA_ARCHS="$arch" \
  "$PYTHON" -m pip install --no-index --no-deps --no-build-isolation --target "$scratch/site" "$root"
cd "$scratch" || exit 1 # so that the package is not taken from the source tree
stage env 30 gpu-env.txt "$PYTHON" -c 'from sparselottery import _ext; print(_ext.format_env(_ext.env_report()))'
stage tests 150 gpu-tests.txt "$PYTHON" -m pytest -q -p no:cacheprovider "$root/tests/gpu"
stage sanitizer 80 gpu-sanitizer.txt env PYTORCH_NO_CUDA_MEMORY_CACHING=1 bash -c sanitize
left=$((450 - SECONDS))
stage bench $left gpu-bench.txt "$PYTHON" "$root/bench/run.py" --device cuda --full --repeats 2 --limit $((left - 30)) \
  --out "$OUT/gpu.csv"
stage table 20 gpu-table.txt "$PYTHON" "$root/bench/report.py" "$OUT/gpu.csv"
cat "$OUT/gpu-table.txt"
if [ ${#red[@]} -gt 0 ]; then
  printf 'RED: %s\n' "${red[@]}"
  exit 1
fi
echo "all green"
