#!/usr/bin/env bash
# All that there is to do on a machine with a GPU: build for it, run the tests marked gpu, let compute-sanitizer watch a short walk
# through the kernels, measure. Under nine minutes; one failed step does not keep the others from running.
#
# Needs Python with torch (a CUDA build), pytest, scikit-build-core and pybind11; nvcc, CMake, Ninja. No network.
#   PYTHON     interpreter                              python3
#   OUT        folder for logs and JSON                 benchmarks/results
#   WHEELS     folder of wheels to install beside, e.g. bitsandbytes (without their dependencies)
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
source=$PWD
python=${PYTHON:-python3}
out=${OUT:-$source/benchmarks/results}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
summary=()

step() {  # step NAME SECONDS COMMAND…
  local name=$1 seconds=$2 start=$SECONDS status
  shift 2
  echo "== $name"
  timeout --kill-after=5 "$seconds" "$@" >"$out/gpu_$name.log" 2>&1
  status=$?
  summary+=("$(printf '%-10s %4ds  %s' "$name" $((SECONDS - start)) "$([ $status -eq 0 ] && echo ok || echo "FAILED ($status)")")")
  tail -n "${SHOW:-15}" "$out/gpu_$name.log"
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
  tail -n 40 "$out/gpu_build.log"
  exit 1
}
if [ -n "${WHEELS:-}" ]; then
  SHOW=1 step wheels 60 "$python" -m pip install --no-index --no-deps --target "$site" "$WHEELS"/*.whl
fi
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}

step tests 150 "$python" -m pytest tests/gpu -q --maxfail=20 -p no:cacheprovider
if command -v compute-sanitizer >/dev/null; then
  # Torch's caching allocator hides what is outside of a tensor, but inside of its pool.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  step memcheck 75 compute-sanitizer --tool memcheck --error-exitcode 9 --target-processes all "$python" tests/gpu/sanitized.py
  step racecheck 75 compute-sanitizer --tool racecheck --error-exitcode 9 --target-processes all "$python" tests/gpu/sanitized.py
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
  summary+=("sanitizer   not there: compute-sanitizer is not on PATH")
fi
left=$((510 - SECONDS))
minutes=$("$python" -c "print(max(0.2, ($left - 30) / 60))")
SHOW=400 step bench "$((left > 30 ? left : 30))" "$python" benchmarks/gpu.py --minutes "$minutes" --out "$out"

echo "== summary ($SECONDS s, architecture $architecture)"
printf '%s\n' "${summary[@]}"
[[ "${summary[*]}" != *FAILED* ]]
