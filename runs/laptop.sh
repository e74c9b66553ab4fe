#!/usr/bin/env bash
# From text to a chat model on two cores in less than an hour, by the stages of ChatGPT:
#
#   runs/laptop.sh [FOLDER]         # by default runs/laptop; FRACTION=0.1 takes a tenth of the time, to look around
#
# Pretraining on novels, stories and facts; fine-tuning on instructions; a reward model from people's (here GPT-4's)
# preferences; PPO with that reward model, DPO on the same preferences; and beside it a small model that learns sums by
# GRPO, where right and wrong are known. Each stage is a run folder from which the next one starts, and says what it was
# before and after. What lies there already is not made again, so a run that was stopped goes on by the same command.
set -euo pipefail

: "${BARDLET_DATA:?the folder with the texts: alpaca, alpaca-eval-preferences (bardlet data lists them)}"
out=${1:-runs/laptop}
bardlet=${BARDLET:-bardlet}
minutes() { awk -v m="$1" -v f="${FRACTION:-1}" 'BEGIN { printf "%.2f", m * f }'; }
mkdir -p "$out"

stage() { # stage NAME COMMAND...: the run out/NAME, begun or resumed
  local name=$1
  shift
  echo "== $name: bardlet $*"
  if [ -f "$out/$name/README.md" ]; then
    echo "   is there already"
  elif [ -f "$out/$name/run.toml" ]; then
    "$bardlet" resume "$out/$name"
  else
    "$bardlet" "$@" --out "$out/$name"
  fi
}

instructions=$BARDLET_DATA/alpaca/alpaca_data.json.xz
preferences=$BARDLET_DATA/alpaca-eval-preferences/pairs.jsonl.xz

stage base train eltec-eng tinystories-lower factbook --tokenizer bpe --block-size 256 --minutes "$(minutes 19)"
stage sft sft "$out/base" "$instructions" --minutes "$(minutes 11)"
stage judge reward "$out/sft" "$preferences" --minutes "$(minutes 5)"
stage ppo ppo "$out/sft" "$preferences" --reward "$out/judge" --minutes "$(minutes 6)"
stage dpo dpo "$out/sft" "$preferences" --minutes "$(minutes 5)"

# the sums of two numbers of two digits: every tenth line of this file is held out from all that follows
if [ ! -f "$out/sums.jsonl" ]; then
  awk 'BEGIN { srand(1); for (a = 0; a < 100; a++) for (b = 0; b < 100; b++) print rand() "\t" a "\t" b }' | sort |
    awk -F '\t' '{ printf "{\"prompt\": \"%02d+%02d=\", \"answer\": \"%d\"}\n", $2, $3, $2 + $3 }' > "$out/sums.jsonl"
fi
awk 'NR % 10' "$out/sums.jsonl" | sed 's/.*"prompt": "\([^"]*\)", "answer": "\([^"]*\)".*/\1\2/' > "$out/sums.txt"
awk 'NR % 10' "$out/sums.jsonl" | head -120 > "$out/few.jsonl"
stage sums-base train "$out/sums.txt" --tokenizer bpe --vocab-size 262 --n-layer 3 --n-embd 128 --block-size 64 \
  --minutes "$(minutes 2)"
stage sums-sft sft "$out/sums-base" "$out/few.jsonl" --no-pack --batch-size 64 --steps 120 --lr 1e-3 --muon-lr 1e-2
stage sums-grpo grpo "$out/sums-sft" "$out/sums.jsonl" --reward exact --group 4 --rollout 512 \
  --batch-size 128 --passes 2 --schedule linear --minutes "$(minutes 6)"

"${PYTHON:-python3}" - "$out" <<'TABLE'
import sys, tomllib
from pathlib import Path

WHAT = {  # stage: (what is measured on what was held out, before, after)
    "base": ("nats per character", "guessing", "nats_per_char"),
    "sft": ("loss of answers, nats per token", "val_loss_before", "val_loss"),
    "judge": ("pairs judged as people did (before: by length)", "longer", "accuracy"),
    "ppo": ("mean reward by the judge", "reward_before", "reward_after"),
    "dpo": ("pairs preferred as people did (before: by length)", "longer", "accuracy"),
    "sums-sft": ("loss of answers, nats per token", "val_loss_before", "val_loss"),
    "sums-grpo": ("sums that are right", "reward_before", "reward_after"),
}
print("\n| stage | on what was held out | before | after | minutes |\n| --- | --- | --- | --- | --- |")
for stage, (what, *names) in WHAT.items():
    record = tomllib.loads((Path(sys.argv[1]) / stage / "run.toml").read_text(encoding="utf-8"))["record"]
    before, after = (f"{record[name]:.3f}" if name in record else "-" for name in names)
    before = "-" if stage == "base" else before  # a loss by guessing is one of tokens, not of characters
    print(f"| {stage} | {what} | {before} | {after} | {record['seconds'] / 60:.1f} |")
TABLE
echo
echo "talk to it: $bardlet chat $out/ppo"
