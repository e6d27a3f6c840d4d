#!/usr/bin/env bash
# Make the virtual environment if it is absent, and put torch into it if it has none.
#   setup_venv.sh FOLDER "TORCH REQUIREMENT"
set -euo pipefail
venv=$1 torch_spec=$2
python=${BOOTSTRAP_PYTHON:-python3}
here=$(dirname "$0")

if [ ! -x "$venv/bin/python" ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "bitfold needs Python >= 3.10; name one: make BOOTSTRAP_PYTHON=python3.12 …" >&2; exit 1; }
  # Debian splits ensurepip and Python.h off; both are needed, the second to compile the extension module.
  include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  packages=("$include/Python.h:python3-dev")
  "$python" -c 'import ensurepip' 2>/dev/null || packages+=(/nowhere:python3-venv)
  bash "$here/apt_install.sh" "${packages[@]}" || [ -e "$include/Python.h" ]
  echo "making $venv"
  "$python" -m venv "$venv"
fi

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  echo "installing $torch_spec into $venv"
  # Unquoted: the variable may carry options of pip as well, such as --index-url.
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pip install $torch_spec 'numpy>=1.26'
fi
"$venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
