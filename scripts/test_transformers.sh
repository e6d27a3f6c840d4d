#!/usr/bin/env bash
# Run tests/python/hf with several versions of transformers, each in a small environment of its own that borrows
# everything else (torch, pytest, bitfold where it is installed) from the interpreter given.
#
#   PYTHON=.venv/bin/python scripts/test_transformers.sh [VERSION…] [-- PYTEST-ARGUMENTS…]
#
# The environments are kept in build/transformers. BITFOLD_PEFT= (empty) leaves PEFT out; its tests are then skipped.
# Where bitfold is not installed in PYTHON's environment, the one compiled in place (`make dev`) is tested.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
peft=${BITFOLD_PEFT-peft==0.21.2}
versions=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do versions+=("$1"); shift; done
[ $# -gt 0 ] && shift
[ ${#versions[@]} -gt 0 ] || versions=(5.24.0 5.17.0 4.57.6)

borrowed=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if ! (cd / && "$python" -c 'import bitfold') 2>/dev/null; then
  export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
fi

failed=()
for version in "${versions[@]}"; do
  environment=build/transformers/$version
  if [ ! -x "$environment/bin/python" ]; then
    "$python" -m venv "$environment"
    own=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$borrowed" > "$own/borrowed.pth"  # after its own packages on the path, so that those win
  fi
  # pip sees the borrowed packages and installs only what this transformers needs in another version.
  "$environment/bin/python" -m pip install -q --disable-pip-version-check "transformers==$version"
  if [ -n "$peft" ]; then
    "$environment/bin/python" -m pip install -q --disable-pip-version-check --no-deps "$peft"
  fi
  "$environment/bin/python" - "$version" <<'CHECK'
import sys
import transformers, torch
assert transformers.__version__ == sys.argv[1], f"found transformers {transformers.__version__}"
print(f"== transformers {transformers.__version__}, torch {torch.__version__}", flush=True)
CHECK
  "$environment/bin/python" -m pytest -q tests/python/hf "$@" || failed+=("$version")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed with transformers ${failed[*]}" >&2
  exit 1
fi
