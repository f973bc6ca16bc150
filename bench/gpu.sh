#!/usr/bin/env bash
# Everything there is to learn on a machine with a GPU, in one command and eight minutes at most, without a network:
#
#     OUT=folder bench/gpu.sh
#
# builds for this GPU into a temporary folder (the Python it runs on stays as it is), runs tests/gpu, every regime of the
# benchmark, and compute-sanitizer on small cases. Needs torch with CUDA, nvcc, setuptools, pybind11, ninja, pytest.
# Writes into ${OUT:-bench/results}: gpu-env.txt gpu-build.txt gpu-tests.txt gpu-sanitizer.txt gpu.csv gpu-bench.txt
# gpu-table.txt. Exit status: 0 all green, 1 something is red, 2 no GPU.
#
# BUDGET (480 seconds) is shared out: each stage has a limit, those of the other stages add up to 320, and the benchmark,
# which writes its CSV case by case, most urgent first, has all that they leave: 150 at the very least. What fails or runs
# into its limit is told at the end; the rest goes on.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-480}
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

# now: milliseconds since this script began. share SECONDS: so many of 480 as milliseconds of BUDGET.
begun=${EPOCHREALTIME/[.,]/}
now() { echo $(((${EPOCHREALTIME/[.,]/} - begun) / 1000)); }
share() { echo $(($1 * BUDGET * 1000 / 480)); }
seconds() { printf '%d.%03d' $(($1 / 1000)) $(($1 % 1000)); }
grace=$(seconds "$(share 4)") # between a limit's SIGTERM and its SIGKILL

# limited MILLISECONDS COMMAND...
limited() {
  local limit=$1
  shift
  timeout -k "$grace" "$(seconds "$limit")" "$@"
}

# stage NAME MILLISECONDS FILE COMMAND...: output into FILE; a failure is remembered and the next stage still runs.
stage() {
  local name=$1 limit=$2 file=$3 begin status=0 why
  begin=$(now)
  shift 3
  "$@" "$limit" >"$OUT/$file" 2>&1 || status=$?
  why="exit $status"
  case $status in 124 | 137) why="over $(seconds "$limit") s" ;; esac
  [ $status -eq 0 ] || red+=("$name ($why, see $file)")
  printf '%-12s exit %-3d %8s s  %s\n' "$name" $status "$(seconds $(($(now) - begin)))" \
    "$(grep . "$OUT/$file" | tail -n 1 | cut -c1-100)"
}

# pip would look at the network for build requirements; they are here, so no isolation. Where there is no pip, or its
# setuptools is too old for pyproject.toml, setup.py alone builds the extension. Without one the Triton kernels are still
# there to be tested and measured.
build() {
  local end=$(($(now) + $1)) status=0 left
  export SPARSELOTTERY_CUDA=1 SPARSELOTTERY_CUDA_ARCHS="$arch"
  limited "$1" "$PYTHON" -m pip install --no-index --no-deps --no-build-isolation --target "$scratch/site" "$root" && return
  status=$?
  rm -rf "$scratch/site"
  mkdir -p "$scratch/site" "$scratch/tree"
  cp -r "$root/sparselottery" "$scratch/site/"
  rm -f "$scratch"/site/sparselottery/_C*.so
  cp -r "$root/bench" "$root/kernels" "$scratch/site/sparselottery/"
  cp -r "$root/setup.py" "$root/csrc" "$scratch/tree/"
  left=$((end - $(now)))
  if [ $left -gt $(($1 / 4)) ]; then
    echo "=== once more, without pip"
    status=0
    (cd "$scratch/tree" && limited $left "$PYTHON" setup.py build_ext --build-lib "$scratch/site") || status=$?
  fi
  [ $status -eq 0 ] || echo "not built: what follows is done without the extension"
  return $status
}

environment() {
  limited "$1" "$PYTHON" -c 'from sparselottery import _ext; print(_ext.format_env(_ext.env_report()))'
}

# Most of a test's time is Triton's compiler, which runs on the CPU: one process for every second core, at most eight.
tests() {
  local cores count i status=0 worst=0
  cores=$(nproc)
  count=$((cores / 2 > 8 ? 8 : cores / 2 > 1 ? cores / 2 : 1))
  local running=()
  for ((i = 0; i < count; i++)); do
    limited "$1" "$PYTHON" -m pytest -v -p no:cacheprovider --shard "$i/$count" "$root/tests/gpu" >"$scratch/tests-$i" 2>&1 &
    running+=($!)
  done
  for ((i = 0; i < count; i++)); do
    status=0
    wait "${running[$i]}" || status=$?
    [ $status -gt $worst ] && worst=$status
    echo "=== part $((i + 1)) of $count: exit $status"
    cat "$scratch/tests-$i"
  done
  return $worst
}

bench() {
  limited "$1" "$PYTHON" "$root/bench/run.py" --device cuda --full --repeats 2 --seconds 0.3 \
    --limit "$(seconds $(($1 * 9 / 10)))" --out "$OUT/gpu.csv"
}

# sanitize TOOL MILLISECONDS
sanitize() {
  echo "=== $1"
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed: not checked"
    return
  fi
  local status=0
  limited "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 \
    "$PYTHON" "$root/bench/verify.py" --device cuda --small >"$scratch/$1" 2>&1 || status=$?
  cat "$scratch/$1"
  # Some virtual machines do not let the tool reach the GPU: then nothing was checked, which is no fault of the kernels.
  if grep -q "Device not supported" "$scratch/$1"; then
    echo "$1 cannot run on this machine: not checked"
    return
  fi
  [ $status -eq 0 ] && echo "$1: clean"
  return $status
}

# Half the time each, whatever the first one does with its own.
sanitizers() {
  local first=0 second=0
  sanitize memcheck $(($1 / 2)) || first=$?
  sanitize racecheck $(($1 / 2)) || second=$?
  return $((first > second ? first : second))
}

table() {
  limited "$1" "$PYTHON" "$root/bench/report.py" "$OUT/gpu.csv"
}

rm -f "$OUT/gpu.csv" # an older one's figures are not this run's
stage build "$(share 110)" gpu-build.txt build
cd "$scratch" || exit 1 # so that the package is not taken from the source tree
stage env "$(share 10)" gpu-env.txt environment
stage tests "$(share 100)" gpu-tests.txt tests
stage bench $(($(share 480) - $(now) - $(share 88))) gpu-bench.txt bench # 88: what is behind it, graces and all
stage sanitizer "$(share 64)" gpu-sanitizer.txt sanitizers
stage table "$(share 8)" gpu-table.txt table
cat "$OUT/gpu-table.txt"
if [ ${#red[@]} -gt 0 ]; then
  printf 'RED: %s\n' "${red[@]}"
  exit 1
fi
echo "all green"
