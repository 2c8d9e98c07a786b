#!/usr/bin/env bash
# All tests: bash tests/run.sh [pytest arguments]. Creates .venv as run_all.sh does, unless PYTHON names an environment.
# bash tests/run.sh --long: then ten times as many generated inputs, the planted mistakes, and faults in every stage (hours);
# their tables go to results/reliability/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
LONG="" ARGUMENTS=()
for argument in "$@"; do
  if [[ $argument == --long ]]; then LONG=1; else ARGUMENTS+=("$argument"); fi
done
if [[ -z ${PYTHON:-} ]]; then
  bash run_all.sh configs/micro.yaml setup >/dev/null
  PYTHON=.venv/bin/python
  "$PYTHON" -c "import av, pyarrow, sentencepiece" 2>/dev/null ||
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -e ".[lerobot-data,tokenizer]"
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# two processes, a file of tests in one of them
LONG=$LONG OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
if [[ -n $LONG ]]; then
  "$PYTHON" tests/planted.py out=results/reliability
  "$PYTHON" tests/faults.py out=results/reliability
fi
