#!/usr/bin/env bash
# The whole pipeline: SFT -> reward model -> policy -> evaluation -> report. Each stage has its own share of the data (data_split)
# and starts from the SFT stage's checkpoint.
#
#   bash align.sh                        the demo's data and randomly initialized model: minutes on two CPU cores
#   MODEL=smollm2-135m DATASETS=helpful,harmless OUT=.cache/mine bash align.sh
#   METHOD=grpo bash align.sh            the last stage learns from the policy's own responses and the reward model
#
# METHOD   dpo: pairs of the data | ppo, grpo: own responses, by their rewards | online: DPO on pairs of own responses
#          mpo: Mixed Preference Optimization (arXiv:2403.19443): two responses of the SFT policy to each prompt; where their rewards
#          differ by MARGIN or more they train DPO, and the prompts of the others train PPO, from the DPO policy and with it as reference
#
# Run the same command again after any interruption: finished stages are skipped, an interrupted one is resumed.
# Every variable can be set in the environment; extra arguments are added to each training command, and take precedence.
set -euo pipefail

PYTHON=${PYTHON:-python}
OUT=${OUT:-.cache/align}               # all stages' runs, samples, numbers, and report.html
MODEL=${MODEL:-}                       # a file of config/model; empty: the demo, with its data
DATASETS=${DATASETS:-}                 # one or more, separated by commas
METHOD=${METHOD:-dpo}                  # how the policy is trained
DATA_SPLIT=${DATA_SPLIT:-4,1,1}        # shares of the prompts for SFT, reward model and policy
BETA=${BETA:-}                         # strength of the KL constraint; empty: 0.1 for DPO, the loss's own for others
MARGIN=${MARGIN:-1}                    # with METHOD=mpo, in units of the reward
N_PROMPTS=${N_PROMPTS:-100}            # held-out prompts that both policies answer, for the win rate
PROMPTS=${PROMPTS:-}                   # from this data set; empty: the first in DATASETS
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-64}   # per answer
SFT_ARGS=${SFT_ARGS:-}                 # more options for one stage, separated by spaces, such as "lr=1e-5 n_epochs=3"
REWARD_ARGS=${REWARD_ARGS:-}
POLICY_ARGS=${POLICY_ARGS:-${DPO_ARGS:-}}

cd "$(dirname "${BASH_SOURCE[0]}")"
if [[ -z $MODEL ]]; then
    sft="exp=demo_sft n_epochs=10" reward="exp=demo_reward n_epochs=2" policy="exp=demo_dpo n_examples=null n_epochs=3 lr=1e-4"
    prompts="demo/test.jsonl --eval-share 1"  # a file of held-out prompts
else
    data="model=$MODEL datasets=[${DATASETS:?give DATASETS=..., such as hh, beside MODEL}]"
    sft="exp_name=align_sft $data loss=sft" reward="exp_name=align_reward $data loss=reward"
    policy="exp_name=align_$METHOD $data" prompts=${PROMPTS:-${DATASETS%%,*}}
fi
own=("rollout.max_new_tokens=$MAX_NEW_TOKENS" "reward.terms={reward: {model: '$OUT/reward'}}")
as=()                                  # how the policy is evaluated on the held-out pairs, if not by its own loss
case $METHOD in
    dpo) policy+=" loss=dpo loss.beta=${BETA:-0.1}" own=() ;;
    online) policy+=" loss=dpo loss.beta=${BETA:-0.1} rollout=pairs" ;;
    ppo | grpo) policy+=" loss=$METHOD ${BETA:+loss.beta=$BETA}" as=(loss=dpo "loss.beta=${BETA:-0.1}") ;;
    mpo)
        first="$policy loss=dpo loss.beta=${BETA:-0.1} rollout=pairs rollout.preferences=margin rollout.pair_margin=$MARGIN"
        policy+=" loss=ppo_mpo ${BETA:+loss.beta=$BETA}" as=(loss=dpo "loss.beta=${BETA:-0.1}")
        ;;
    *) echo "error: METHOD=$METHOD: expected dpo, ppo, grpo, online or mpo" >&2 && exit 2 ;;
esac
archive="model.archive='$OUT/sft'"     # the inner quotes are Hydra's

train() {  # name, settings; further arguments are passed to train.py unchanged
    local name=$1 settings=$2
    shift 2
    echo "=== $name"
    # shellcheck disable=SC2086  # settings are words
    "$PYTHON" -u train.py $settings local_run_dir="'$OUT/$name'" resume=auto "$@"
}

stage() {  # name, share in data_split, settings, further arguments
    train "$1" "$3" stage="$2" data_split="$DATA_SPLIT" "${@:4}"
}

newer() {  # does the file exist, with no newer checkpoint?
    local file=$1
    shift
    for run in "$@"; do [[ -s $file && ! $run/LATEST/policy.pt -nt $file ]] || return 1; done
    echo "$file is there already"
}

stage sft sft "$sft $SFT_ARGS" "$@"
stage reward reward "$reward $REWARD_ARGS" "$archive" "$@"
if [[ $METHOD == mpo ]]; then  # DPO on one rollout of all prompts, which is the SFT policy's
    stage mpo-dpo policy "$first $POLICY_ARGS n_epochs=1 rollout.n=2 rollout.batches=1000000" "$archive" "${own[@]}" "$@"
    newer "$OUT/hard.jsonl" "$OUT/mpo-dpo" ||
        "$PYTHON" score.py split "$OUT/mpo-dpo/rollouts.jsonl" --threshold "$MARGIN" --easy "$OUT/easy.jsonl" --hard "$OUT/hard.jsonl"
    train mpo "$policy $POLICY_ARGS" "datasets=['$OUT/hard.jsonl']" "model.archive='$OUT/mpo-dpo'" "${own[@]}" "$@"
else
    stage "$METHOD" policy "$policy $POLICY_ARGS" "$archive" "${own[@]}" "$@"
fi

echo "=== evaluation"
evaluate() {  # name, more options
    newer "$OUT/$1.json" "$OUT/$1" || "$PYTHON" eval.py "$OUT/$1" --out "$OUT/$1.json" "${@:2}"
}
evaluate sft
evaluate reward
evaluate "$METHOD" "${as[@]}"
# shellcheck disable=SC2086  # a data set, and what else is said of it
newer "$OUT/samples.jsonl" "$OUT/sft" "$OUT/$METHOD" ||
    "$PYTHON" sample.py "$OUT/sft" "$OUT/$METHOD" --dataset $prompts --n-prompts "$N_PROMPTS" --max-new-tokens "$MAX_NEW_TOKENS" \
        --temperature 0.7 --seed 0 --show 3 --out "$OUT/samples.jsonl"
"$PYTHON" score.py winrate "$OUT/samples.jsonl" --judge "$OUT/reward" --baseline "$OUT/sft" --json "$OUT/winrate.json"

echo "=== report"
runs=("$OUT/sft" "$OUT/reward" "$OUT/$METHOD")
[[ $METHOD != mpo ]] || runs+=("$OUT/mpo-dpo")
"$PYTHON" report.py "${runs[@]}" --out "$OUT/report.html" --samples "$OUT/samples.jsonl" \
    --figures "$OUT/winrate.json" "$OUT/sft.json" "$OUT/reward.json" "$OUT/$METHOD.json"
