#!/bin/sh
# Prints the path of a Python that can build this project's environment.
#
# Looks at $PYTHON if set, else at every folder of PATH, then at pyenv's
# versions. Each candidate is run: a pyenv shim can exist and still fail, and
# Debian ships Pythons without venv. jax 0.11.2 has wheels for 3.12 to 3.14.
set -u

check='
import sys, sysconfig
good = sys.implementation.name == "cpython"
good &= (3, 12) <= sys.version_info[:2] <= (3, 14)
good &= not sysconfig.get_config_var("Py_GIL_DISABLED")
if not good:
  sys.exit(1)
import ensurepip, venv
print(sys.executable)
'

# Prints the interpreter's own path and ends the search if $1 will do.
try() {
  [ -x "$1" ] || return 0
  found=$("$1" -I -c "$check" 2>/dev/null </dev/null) || return 0
  [ -x "$found" ] || return 0
  echo "$found"
  exit 0
}

if [ -n "${PYTHON:-}" ]; then
  try "$(command -v "$PYTHON")"
  echo "PYTHON=$PYTHON is no CPython 3.12, 3.13 or 3.14 with venv and" \
    "ensurepip; unset it, or name one that is." >&2
  exit 1
fi

for name in python3.12 python3.13 python3.14 python3; do
  rest=$PATH:
  while [ -n "$rest" ]; do
    try "${rest%%:*}/$name"
    rest=${rest#*:}
  done
done
for root in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
  for name in python3.12 python3.13 python3.14; do
    for file in "$root"/versions/*/bin/"$name"; do
      try "$file"
    done
  done
done

echo "\
No Python 3.12, 3.13 or 3.14 with venv found on PATH or among pyenv's versions.
Get one in any of these ways, then repeat the command:
  apt-get install python3 python3-venv    Debian 13, Ubuntu 24.04 or later
  pyenv install 3.12                      any system with pyenv
  make PYTHON=/path/to/python3.12 ...     one that is elsewhere" >&2
exit 1
