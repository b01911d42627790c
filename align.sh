#!/usr/bin/env bash
# The whole pipeline in one chain: SFT -> reward model -> DPO -> evaluation -> report. Each stage sees its own part of the data
# (data_split) and starts from the checkpoint that the SFT stage left.
#
#   bash align.sh                        the demo's data and its model of random weights: minutes on two CPU cores
#   MODEL=smollm2-135m DATASETS=helpful,harmless OUT=.cache/mine bash align.sh
#
# The same command again, whatever ended it: finished stages are skipped, one that was interrupted goes on.
# Every variable can be set from outside; whatever follows the script's name is added to each training command, and wins.
set -euo pipefail

PYTHON=${PYTHON:-python}
OUT=${OUT:-.cache/align}               # all stages' runs, samples, numbers, and report.html
MODEL=${MODEL:-}                       # a file of config/model; empty: the demo, with its data
DATASETS=${DATASETS:-}                 # one or several, with commas between them
DATA_SPLIT=${DATA_SPLIT:-2,1,1}        # shares of the prompts for SFT, reward model and DPO
BETA=${BETA:-0.1}                      # strength of DPO's KL constraint
N_PROMPTS=${N_PROMPTS:-100}            # held-out prompts that SFT and DPO policies answer, for the win rate
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-64}   # of an answer
SFT_ARGS=${SFT_ARGS:-}                 # further knobs of one stage, apart by spaces, such as "lr=1e-5 n_epochs=3"
REWARD_ARGS=${REWARD_ARGS:-}
DPO_ARGS=${DPO_ARGS:-}

cd "$(dirname "${BASH_SOURCE[0]}")"
if [[ -z $MODEL ]]; then
    sft="exp=demo_sft n_epochs=8" reward="exp=demo_reward" dpo="exp=demo_dpo" prompts=${PROMPTS:-demo/test.jsonl}
else
    data="model=$MODEL datasets=[${DATASETS:?give DATASETS=..., such as hh, beside MODEL}]"
    sft="exp_name=align_sft $data loss=sft" reward="exp_name=align_reward $data loss=reward"
    dpo="exp_name=align_dpo $data loss=dpo" prompts=${PROMPTS:-${DATASETS%%,*}}
fi
archive="model.archive='$OUT/sft'"     # the inner quotes are Hydra's

stage() {  # its name, its place in data_split, its settings; what follows goes to train.py as it is
    local name=$1 slice=$2 settings=$3
    shift 3
    echo "=== $name"
    # shellcheck disable=SC2086  # settings are words
    "$PYTHON" -u train.py $settings stage="$slice" data_split="$DATA_SPLIT" local_run_dir="'$OUT/$name'" resume=auto "$@"
}

newer() {  # is the file there, and no checkpoint younger?
    local file=$1
    shift
    for run in "$@"; do [[ -s $file && ! $run/LATEST/policy.pt -nt $file ]] || return 1; done
    echo "$file is there already"
}

stage sft sft "$sft $SFT_ARGS" "$@"
stage reward reward "$reward $REWARD_ARGS" "$archive" "$@"
stage dpo policy "$dpo loss.beta=$BETA $DPO_ARGS" "$archive" "$@"

echo "=== evaluation"
for name in sft reward dpo; do
    newer "$OUT/$name.json" "$OUT/$name" || "$PYTHON" eval.py "$OUT/$name" --out "$OUT/$name.json"
done
newer "$OUT/samples.jsonl" "$OUT/sft" "$OUT/dpo" ||
    "$PYTHON" sample.py "$OUT/sft" "$OUT/dpo" --dataset "$prompts" --n-prompts "$N_PROMPTS" --max-new-tokens "$MAX_NEW_TOKENS" \
        --temperature 0.7 --seed 0 --show 3 --out "$OUT/samples.jsonl"
"$PYTHON" score.py winrate "$OUT/samples.jsonl" --judge "$OUT/reward" --baseline "$OUT/sft" --json "$OUT/winrate.json"

echo "=== report"
"$PYTHON" report.py "$OUT/sft" "$OUT/reward" "$OUT/dpo" --out "$OUT/report.html"
