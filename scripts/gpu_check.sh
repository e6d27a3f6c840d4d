#!/usr/bin/env bash
# All that there is to do on a machine with a GPU: build for it, run the tests marked gpu, let compute-sanitizer watch a short walk
# through the kernels, measure. Under nine minutes; one failed step does not keep the others from running, and what there is no time left
# for has failed.
#
# Needs Python with torch (a CUDA build), pytest, scikit-build-core and pybind11; nvcc, CMake, Ninja. No network.
#   PYTHON     interpreter                              python3
#   OUT        folder for logs and JSON                 benchmarks/results
#   WHEELS     folder of wheels to install beside, e.g. bitsandbytes (without their dependencies)
#   STEPS      some of them                             build wheels tests memcheck racecheck bench
#              without build: the bitfold that PYTHON finds
#   BUDGET     seconds for all together                 530
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
source=$PWD
python=${PYTHON:-python3}
out=${OUT:-$source/benchmarks/results}
budget=${BUDGET:-530}
all_steps="build wheels tests memcheck racecheck bench"
steps=${STEPS:-$all_steps}
for name in $steps; do
  [[ " $all_steps " == *" $name "* ]] || { echo "STEPS: there is no step $name; there are: $all_steps"; exit 2; }
done
for tool in nvcc compute-sanitizer; do
  command -v "$tool" >/dev/null && continue
  PATH=/usr/local/cuda/bin:$PATH  # where images have them that say nothing of it in PATH
  break
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
summary=()

chosen() { [[ " $steps " == *" $1 "* ]]; }

left() { echo $((budget - SECONDS)); }

note() { summary+=("$(printf '%-10s %4ds  %s' "$@")"); }

step() {  # step NAME SECONDS COMMAND…
  local name=$1 seconds=$2 start=$SECONDS status
  shift 2
  chosen "$name" || return 0
  echo "== $name"
  rm -f "$out/gpu_$name.log"  # of an earlier run
  if [ "$(left)" -le 0 ]; then
    note "$name" 0 "FAILED (no time left of $budget s)"
    return 1
  fi
  [ "$seconds" -le "$(left)" ] || seconds=$(left)
  timeout --kill-after=5 "$seconds" "$@" >"$out/gpu_$name.log" 2>&1
  status=$?
  note "$name" $((SECONDS - start)) "$([ $status -eq 0 ] && echo ok || echo "FAILED ($status)")"
  sed '/^goals: /,$d' "$out/gpu_$name.log" | tail -n "${SHOW:-15}"
  return $status
}

# Machine code for the GPU at hand; Hopper's own instructions want the architecture with an a.
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
case $capability in
  '') echo "no GPU: nvidia-smi names none"; exit 1 ;;
  90) architecture=90a-real ;;
  *) architecture=$capability-real ;;
esac

# A copy, without what was built for another machine; installed into a folder of its own.
tar -C "$source" --exclude=./build --exclude='*.so' --exclude=./.git --exclude=./.venv -cf - . | tar -C "$work" -xf - || exit 1
cd "$work" || exit 1
site=$work/site
export BITFOLD_CUDA=ON BITFOLD_CUDA_ARCHITECTURES=$architecture CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-$(nproc)}
SHOW=3 step build 240 "$python" -m pip install --no-build-isolation --no-deps --target "$site" . || {
  tail -n 40 "$out/gpu_build.log" 2>/dev/null
  exit 1
}
if [ -n "${WHEELS:-}" ]; then
  SHOW=1 step wheels 60 "$python" -m pip install --no-index --no-deps --target "$site" "$WHEELS"/*.whl
fi
chosen build && export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}

step tests 150 "$python" -m pytest tests/gpu -q --maxfail=20 -p no:cacheprovider
if ! chosen memcheck && ! chosen racecheck; then
  :
elif command -v compute-sanitizer >/dev/null; then
  # Torch's caching allocator hides what is outside of a tensor, but inside of its pool.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  # Our own kernels: torch's are many, slow to watch, and ask the driver for what not every one has.
  for tool in memcheck racecheck; do
    step $tool 75 compute-sanitizer --tool $tool --kernel-name kns=bitfold --report-api-errors no --error-exitcode 9 \
      --target-processes all "$python" tests/gpu/sanitized.py
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
  summary+=("sanitizer   not there: compute-sanitizer is not on PATH")
fi
# The last rows that begin take seconds, and then the tables are still to be printed.
rows=$(($(left) > 50 ? $(left) - 30 : 20))
SHOW=400 step bench "$budget" "$python" benchmarks/gpu.py --minutes "$(printf '%d.%02d' $((rows / 60)) $((rows % 60 * 100 / 60)))" --out "$out"

echo "== summary ($SECONDS s, architecture $architecture)"
printf '%s\n' "${summary[@]}"
if chosen bench && [ -e "$out/gpu_bench.log" ]; then
  echo
  sed -n '/^goals: /,$p' "$out/gpu_bench.log"
fi
[[ "${summary[*]}" != *FAILED* ]]
