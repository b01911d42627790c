#!/usr/bin/env bash
# The whole pipeline: SFT -> reward model -> DPO -> evaluation -> report. Each stage has its own share of the data (data_split)
# and starts from the SFT stage's checkpoint.
#
#   bash align.sh                        the demo's data and randomly initialized model: minutes on two CPU cores
#   MODEL=smollm2-135m DATASETS=helpful,harmless OUT=.cache/mine bash align.sh
#
# Run the same command again after any interruption: finished stages are skipped, an interrupted one is resumed.
# Every variable can be set in the environment; extra arguments are added to each training command, and take precedence.
set -euo pipefail

PYTHON=${PYTHON:-python}
OUT=${OUT:-.cache/align}               # all stages' runs, samples, numbers, and report.html
MODEL=${MODEL:-}                       # a file of config/model; empty: the demo, with its data
DATASETS=${DATASETS:-}                 # one or more, separated by commas
DATA_SPLIT=${DATA_SPLIT:-4,1,1}        # shares of the prompts for SFT, reward model and DPO
BETA=${BETA:-0.1}                      # strength of DPO's KL constraint
N_PROMPTS=${N_PROMPTS:-100}            # held-out prompts that SFT and DPO policies answer, for the win rate
PROMPTS=${PROMPTS:-}                   # from this data set; empty: the first in DATASETS
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-64}   # per answer
SFT_ARGS=${SFT_ARGS:-}                 # more options for one stage, separated by spaces, such as "lr=1e-5 n_epochs=3"
REWARD_ARGS=${REWARD_ARGS:-}
DPO_ARGS=${DPO_ARGS:-}

cd "$(dirname "${BASH_SOURCE[0]}")"
if [[ -z $MODEL ]]; then
    sft="exp=demo_sft n_epochs=10" reward="exp=demo_reward n_epochs=2" dpo="exp=demo_dpo n_examples=null n_epochs=3 lr=1e-4"
    prompts="demo/test.jsonl --eval-share 1"  # a file of held-out prompts
else
    data="model=$MODEL datasets=[${DATASETS:?give DATASETS=..., such as hh, beside MODEL}]"
    sft="exp_name=align_sft $data loss=sft" reward="exp_name=align_reward $data loss=reward"
    dpo="exp_name=align_dpo $data loss=dpo" prompts=${PROMPTS:-${DATASETS%%,*}}
fi
archive="model.archive='$OUT/sft'"     # the inner quotes are Hydra's

stage() {  # name, share in data_split, settings; further arguments are passed to train.py unchanged
    local name=$1 slice=$2 settings=$3
    shift 3
    echo "=== $name"
    # shellcheck disable=SC2086  # settings are words
    "$PYTHON" -u train.py $settings stage="$slice" data_split="$DATA_SPLIT" local_run_dir="'$OUT/$name'" resume=auto "$@"
}

newer() {  # does the file exist, with no newer checkpoint?
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
# shellcheck disable=SC2086  # a data set, and what else is said of it
newer "$OUT/samples.jsonl" "$OUT/sft" "$OUT/dpo" ||
    "$PYTHON" sample.py "$OUT/sft" "$OUT/dpo" --dataset $prompts --n-prompts "$N_PROMPTS" --max-new-tokens "$MAX_NEW_TOKENS" \
        --temperature 0.7 --seed 0 --show 3 --out "$OUT/samples.jsonl"
"$PYTHON" score.py winrate "$OUT/samples.jsonl" --judge "$OUT/reward" --baseline "$OUT/sft" --json "$OUT/winrate.json"

echo "=== report"
"$PYTHON" report.py "$OUT/sft" "$OUT/reward" "$OUT/dpo" --out "$OUT/report.html"
