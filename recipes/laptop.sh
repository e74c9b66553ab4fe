#!/usr/bin/env bash
# From text to a chat model on two cores in less than half an hour, by the stages of ChatGPT:
#
#   recipes/laptop.sh [FOLDER]      # by default runs/laptop; FRACTION=0.1 takes a tenth of the time, to look around
#
# Pretraining on novels, stories and facts; fine-tuning on instructions; a reward model from people's (here GPT-4's)
# preferences; PPO with that reward model, DPO on the same preferences; and beside it a small model that learns sums by
# GRPO, where right and wrong are known. Each stage is a run folder from which the next one starts, and says what it was
# before and after. What lies there already is not made again, so a run that was stopped goes on by the same command.
out=${1:-runs/laptop}
source "$(dirname "$0")/stages.sh"

stage base train eltec-eng tinystories-lower factbook --tokenizer bpe --block-size 256 --minutes "$(minutes 8)"
stage sft sft "$out/base" "$instructions" --minutes "$(minutes 7)"
stage judge reward "$out/sft" "$preferences" --minutes "$(minutes 2)"
stage ppo ppo "$out/sft" "$preferences" --reward "$out/judge" --answer-tokens 128 --batch-size 64 \
  --passes 2 --beta 0.2 --minutes "$(minutes 2.5)"
stage dpo dpo "$out/sft" "$preferences" --minutes "$(minutes 2)"

sums 2 10000 80
stage sums-base train "$out/sums.txt" --tokenizer bpe --vocab-size 262 --n-layer 3 --n-embd 128 --block-size 64 \
  --minutes "$(minutes 1)"
stage sums-sft sft "$out/sums-base" "$out/few.jsonl" --no-pack --batch-size 64 --steps 400
stage sums-grpo grpo "$out/sums-sft" "$out/sums.jsonl" --reward exact --group 4 --rollout 512 --batch-size 128 \
  --passes 2 --schedule linear --minutes "$(minutes 2.5)"

table
