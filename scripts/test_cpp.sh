#!/usr/bin/env bash
# Build and run the C++ tests. GoogleTest comes from Debian's package, which is installed where that is allowed, else from a
# download. Where neither works, one line says what to install, and that is no failure: the Python tests run all the same.
set -euo pipefail
cd "$(dirname "$0")/.."
build=build/tests
jobs=${JOBS:-2}
generator=()
command -v ninja >/dev/null && generator=(-G Ninja)

bash scripts/apt_install.sh /usr/include/gtest/gtest.h:libgtest-dev 2>/dev/null || true

# Without tests first: an error here is about bitfold, not about GoogleTest.
cmake -S . -B $build "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DBITFOLD_BUILD_TESTS=OFF >/dev/null
if ! cmake -S . -B $build -DBITFOLD_BUILD_TESTS=ON >$build/configure.log 2>&1; then
  if grep -qiE 'gtest|googletest' $build/configure.log; then
    echo "C++ tests are left out: GoogleTest is neither installed nor to be downloaded (apt-get install libgtest-dev)"
    exit 0
  fi
  cat $build/configure.log >&2
  exit 1
fi
cmake --build $build -j "$jobs"
ctest --test-dir $build --output-on-failure -j "$jobs"
