#!/usr/bin/env bash
# laptop.sh for one GPU and about an hour and a half: a longer context, more and longer answers, sums of three digits.
#
#   recipes/gpu.sh [FOLDER]         # default: runs/gpu; FRACTION=0.1 takes a tenth of the time, for a quick look
#
# As everywhere, the minutes determine the size of the models. The settings are those of laptop.sh, scaled up. Every
# stage has run on two cores in a hundredth of the time (tests/acceptance/test_stories.py). No stage has run on a GPU
# yet.
out=${1:-runs/gpu}
source "$(dirname "$0")/stages.sh"

stage base train eltec-eng tinystories-lower factbook --tokenizer bpe --block-size 1024 --minutes "$(minutes 30)"
stage sft sft "$out/base" "$instructions" --minutes "$(minutes 12)"
stage judge reward "$out/sft" "$preferences" --minutes "$(minutes 6)"
stage ppo ppo "$out/sft" "$preferences" --reward "$out/judge" --rollout 512 --batch-size 128 --answer-tokens 256 \
  --passes 2 --beta 0.2 --minutes "$(minutes 15)"
stage dpo dpo "$out/sft" "$preferences" --minutes "$(minutes 6)"

sums 3 100000 1000
stage sums-base train "$out/sums.txt" --tokenizer bpe --vocab-size 262 --n-layer 6 --n-head 6 --n-embd 384 \
  --block-size 64 --batch-size 256 --minutes "$(minutes 5)"
stage sums-sft sft "$out/sums-base" "$out/few.jsonl" --no-pack --batch-size 64 --steps 400
stage sums-grpo grpo "$out/sums-sft" "$out/sums.jsonl" --reward exact --group 4 --rollout 2048 --batch-size 512 \
  --passes 2 --schedule linear --minutes "$(minutes 12)"

table
