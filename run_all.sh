#!/usr/bin/env bash
# The whole method, one stage after the other.
#
#   bash run_all.sh [CONFIG] [STAGES] [key=value ...]
#   bash run_all.sh                                       configs/look.yaml: 40 minutes on two cores, no GPU
#   bash run_all.sh configs/smoke.yaml                    every default stage in a few minutes, to see that all works
#   bash run_all.sh configs/look.yaml "03 04" dpo.beta=2  only DPO and the evaluations, with another beta
#   bash run_all.sh configs/look.yaml adapters=dora       without the LoRA variant
#   bash run_all.sh configs/tiny.yaml backbones=both      both paradigms, one after the other
#   bash run_all.sh configs/look.yaml 07                  the surrogate against the exact likelihood; 05 to 07 run only if named
#
# It skips finished stages. It redoes a stage whose config, inputs or code have changed, and what depends on that stage.
# Stopped at any moment, the same command goes on where it was. Set PYTHON to use another environment than .venv.
set -euo pipefail
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)/
export PYTHONPATH=$kit${PYTHONPATH:+:$PYTHONPATH}
[[ $kit != "$(pwd -P)/" ]] || kit="" # scripts are shown as they are typed

unset ADAPTERS given last # from the caller's environment; "adapters=" means none
CONFIG=configs/look.yaml STAGES="" BACKBONES="" OVERRIDES=()
for argument in "$@"; do
  case $argument in
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
    adapters=*) ADAPTERS=${argument#*=} ;;
    stages=*) STAGES=${argument#*=} ;;
    backbones=both) BACKBONES="pi05 openvla" ;;
    backbones=*) BACKBONES=${argument#*=} ;;
    *=* | --dry-run) OVERRIDES+=("$argument") ;;
    *.yaml | *.yml)
      [[ -z ${given:-} ]] || { echo "error: two configs, $CONFIG and $argument: give one" >&2; exit 2; }
      CONFIG=$argument given=yes ;;
    *) STAGES+=" $argument" ;;
  esac
done

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=${kit}.venv/bin/python
  if ! cmp -s "${kit}requirements.txt" "${kit}.venv/installed.txt"; then
    [[ $(uname) == Linux ]] || { echo "error: the kit runs on Linux: use WSL2 on Windows, or a Linux container" >&2; exit 2; }
    python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
      { echo "error: python3 is not Python 3.11 to 3.13; set PYTHON to one that has the packages" >&2; exit 2; }
    echo "[setup] \$ python3 -m venv .venv && pip install -r requirements.txt"
    python3 -m venv "${kit}.venv"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "${kit}requirements.txt"
    cp "${kit}requirements.txt" "${kit}.venv/installed.txt"
  fi
fi

# what the config says of a backbone, as Python reads it: sets STAGES, adapters and RUN. 00 and 08 go by the last backbone
ask='
import sys
from runtime import PlaceConfig, UserError, load_config
try:
    cfg = load_config(PlaceConfig, sys.argv[1:])
    print(cfg.stages or "00 01 02 03 04 08", cfg.adapters or "lora dora", cfg.run_dir, sep="\n")
except (UserError, OSError) as error:
    sys.exit(print(f"error: {error}", file=sys.stderr) or 2)'
read_config() {
  local answer adapter number
  answer=$("$PYTHON" -c "$ask" "$CONFIG" ${named:+stages="$named"} ${ADAPTERS:+adapters="$ADAPTERS"} \
    ${backbone:+backbone="$backbone"} ${OVERRIDES[@]+"${OVERRIDES[@]}"})
  { read -r STAGES; read -r adapters; read -r RUN; } <<<"$answer"
  adapters=${ADAPTERS-$adapters}
  for adapter in $adapters; do
    [[ $adapter =~ ^(lora|dora)$ ]] || { echo "error: no adapter $adapter; adapters is a list such as \"lora dora\"" >&2; exit 2; }
  done
  for number in $STAGES; do
    [[ $number =~ ^(0[0-8]|setup)$ ]] || { echo "error: no stage $number; STAGES is a list such as \"02 03 04\"" >&2; exit 2; }
  done
}
named=$STAGES

began=$SECONDS
stage() { # number, script and its arguments; `last` is an argument that the command line can't change
  [[ " $STAGES " == *" $1 "* ]] || return 0
  shift
  local arguments=("$CONFIG" ${backbone:+backbone="$backbone"} "${@:2}" overwrite=true ${OVERRIDES[@]+"${OVERRIDES[@]}"} ${last:-})
  echo
  echo "[$(((SECONDS - began) / 60)) min] \$ python $1 ${arguments[*]}"
  "$PYTHON" "$kit$1" "${arguments[@]}"
}

# A wrong key shows now, not in half an hour. Before a new run, preflight also checks the simulator's versions, files and pixels.
for backbone in ${BACKBONES:-""}; do
  read_config
  flag=--config-only
  if [[ " $STAGES " == *" 00 "* && ! -d "$RUN/data" && $backbone == "${BACKBONES##* }" ]]; then
    echo "[setup] \$ python -m extras.preflight $CONFIG"
    flag=""
  fi
  "$PYTHON" -m extras.preflight "$CONFIG" "$STAGES" $flag ${backbone:+backbone="$backbone"} ${OVERRIDES[@]+"${OVERRIDES[@]}"}
done
stage 00 00_demos.py
for backbone in ${BACKBONES:-""}; do
  read_config
  stage 01 01_sft.py
  stage 02 02_collect_prefs.py
  for adapter in $adapters; do stage 03 03_dpo.py adapter="$adapter"; done
  # the finished SFT policy, then the one that DPO starts from (often a snapshot)
  last=start=final stage 04 04_eval.py policy=sft
  stage 04 04_eval.py policy=sft
  for adapter in $adapters; do stage 04 04_eval.py policy=dpo adapter="$adapter"; done
  stage 05 05_profile.py
  last=start=final stage 06 06_pretrain_head.py
  stage 07 07_validate.py
done
stage 08 08_report.py
echo
echo "[$(((SECONDS - began) / 60)) min] all stages done: $STAGES"
