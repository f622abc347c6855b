#!/usr/bin/env bash
# Makes .venv, installs jaxft for CPU, and fine-tunes a toy model with LoRA: minutes, on any machine.
# Run it again and it trains again, into the next free folder. Extra arguments are key=value settings.
set -euo pipefail
cd "$(dirname "$0")/.."

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
    if new_enough "$candidate"; then echo "$candidate"; return; fi
  done
  echo "jaxft needs Python 3.11 or newer, and found $(python3 --version 2>/dev/null || echo none)." >&2
  echo "Install one, or point to it: PYTHON=/path/to/python3.12 $0" >&2
  exit 1
}

if ! new_enough .venv/bin/python; then
  python=$(find_python)
  echo "[1/3] Making .venv with $("$python" --version)"
  "$python" -m venv .venv || {
    echo "Could not make a virtual environment. On Debian or Ubuntu: sudo apt install python3-venv" >&2
    exit 1
  }
else
  echo "[1/3] Using .venv with $(.venv/bin/python --version)"
fi

stamp=.venv/.jaxft-$(.venv/bin/python -c 'import hashlib; print(hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest()[:12])')
if [ ! -e "$stamp" ]; then
  echo "[2/3] Installing jaxft and what it needs (1.2 GB on disk; a few minutes the first time)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e .
  touch "$stamp"
else
  echo "[2/3] jaxft is installed"
fi

run_dir=runs/quickstart
n=1
while [ -e "$run_dir" ]; do
  n=$((n + 1))
  run_dir=runs/quickstart-$n
done

echo "[3/3] jaxft train configs/quickstart.yaml run_dir=$run_dir" "$@"
echo "The model is a toy: 4 million parameters, trained on an invented world. It shows the machinery, not what a real model knows."
exec .venv/bin/jaxft train configs/quickstart.yaml run_dir="$run_dir" "$@"
