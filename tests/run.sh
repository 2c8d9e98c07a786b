#!/usr/bin/env bash
# All tests: bash tests/run.sh [pytest arguments]. Creates .venv as run_all.sh does, unless PYTHON names an environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${PYTHON:-} ]]; then
  bash run_all.sh configs/micro.yaml setup >/dev/null
  PYTHON=.venv/bin/python
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pytest -q "$@"
