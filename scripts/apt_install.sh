#!/usr/bin/env bash
# Install Debian packages that are missing, where that is allowed (root, or sudo without a password).
#   apt_install.sh WITNESS:PACKAGE …    WITNESS is a command or a file that shows that the package is there
# Fails with one line that says what to install.
set -euo pipefail

missing=()
for pair in "$@"; do
  witness=${pair%%:*}
  case $witness in
    /*) [ -e "$witness" ] || missing+=("${pair##*:}") ;;
    *) command -v "$witness" >/dev/null || missing+=("${pair##*:}") ;;
  esac
done
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -eq 0 ]; then
  as_root=()
elif sudo -n true 2>/dev/null; then
  as_root=(sudo -n)
else
  as_root=(nobody)
fi
if [ "${as_root[*]}" != nobody ] && command -v apt-get >/dev/null; then
  echo "installing ${missing[*]}"
  # A fresh container has no package lists yet, so a first failure is answered by fetching them.
  install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}")
  if "${as_root[@]}" "${install[@]}" >/dev/null 2>&1 ||
    { "${as_root[@]}" apt-get update -qq && "${as_root[@]}" "${install[@]}" >/dev/null; } 2>/dev/null; then
    exit 0
  fi
fi
echo "please install: apt-get install ${missing[*]}" >&2
exit 1
