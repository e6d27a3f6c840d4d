#!/usr/bin/env bash
# What CI refuses. Tools that are not installed are named and passed over; findings fail.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
status=0

run() {  # run NAME COMMAND…
  local name=$1
  shift
  echo "== $name"
  "$@" || status=1
}

have() {
  "$@" --version >/dev/null 2>&1 || { echo "== ${*: -1}: not installed, left out"; return 1; }
}

have "$python" -m ruff && run "ruff" "$python" -m ruff check .
have "$python" -m mypy && run "mypy" "$python" -m mypy
mapfile -t sources < <(git ls-files -- 'csrc/*.h' 'csrc/*.cc' 'csrc/*.cu' 'csrc/*.cuh' 'tests/cpp/*.h' 'tests/cpp/*.cc')
have clang-format && [ ${#sources[@]} -gt 0 ] && run "clang-format" clang-format --dry-run -Werror "${sources[@]}"
have shellcheck && run "shellcheck" shellcheck scripts/*.sh .ci/run
exit $status
