#!/usr/bin/env bash
# From text to a chat model by the stages of ChatGPT, in less than half an hour on two cores:
#
#   recipes/laptop.sh [FOLDER]      # default: runs/laptop; FRACTION=0.1 takes a tenth of the time, for a quick look
#
# It pretrains on novels, stories and facts, and fine-tunes on instructions. Then it trains a reward model on preferences
# (GPT-4's, in place of human ones), and runs PPO with that reward model and DPO on the same preferences. Separately, a
# small model learns sums by GRPO, where a program can check the answers. Each stage is a run folder that the next stage
# starts from. BARDLET_DATA must name a folder with the data; stages.sh lists what it needs. The table at the end compares
# before and after. Run the same command again to continue; it skips finished stages.
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
