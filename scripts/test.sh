#!/usr/bin/env bash
# Lint, format check, types, tests, in an environment of its own (.venv-test) that is made once and kept.
# Arguments go to pytest: scripts/test.sh tests/core -k lora
set -euo pipefail
cd "$(dirname "$0")/.."

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

venv=.venv-test
if ! new_enough "$venv/bin/python"; then
  python=
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
    if new_enough "$candidate"; then python=$candidate; break; fi
  done
  if [ -z "$python" ]; then
    echo "jaxft needs Python 3.11 or newer; point to one: PYTHON=/path/to/python3.12 $0" >&2
    exit 1
  fi
  "$python" -m venv --clear "$venv"
fi

stamp=$venv/.ready-$("$venv/bin/python" -c 'import hashlib; print(hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest()[:12])')
if [ ! -e "$stamp" ]; then
  echo "Installing the test environment into $venv (once for each pyproject.toml)"
  rm -f "$venv"/.ready-*
  # torch first and alone: where an index offers a CPU build, nothing installed later may swap it for a CUDA one
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[test]'
  touch "$stamp"
fi

export PATH="$PWD/$venv/bin:$PATH"
ruff check .
ruff format --check --quiet .
pyright --pythonpath "$venv/bin/python"
# worksteal keeps neighbours in one process, where they share what they compiled
exec pytest -n "${TEST_WORKERS:-2}" --dist worksteal "$@"
