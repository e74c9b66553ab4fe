# Functions shared by the recipes in this folder, which source this file and set `out`, the folder of the runs.
#
#   stage NAME COMMAND ...    start or resume `bardlet COMMAND ...` as the run out/NAME; skip a finished run
#   minutes M                 print M times $FRACTION
#   sums DIGITS MANY FEW      write MANY sums of two DIGITS-digit numbers, in random order, to out/sums.jsonl. All
#                             stages hold out every tenth; the others also go to out/sums.txt, FEW to out/few.jsonl
#   table                     print a table of all stages, before and after
set -euo pipefail

bardlet=${BARDLET:-bardlet}
python=${PYTHON:-python3}
BARDLET_DATA=${BARDLET_DATA:-}
instructions=$BARDLET_DATA/alpaca/alpaca_data.json.xz
preferences=$BARDLET_DATA/alpaca-eval-preferences/pairs.jsonl.xz
for text in "$instructions" "$preferences" "$BARDLET_DATA"/{eltec-eng,tinystories-lower,factbook}; do
  if [ ! -e "$text" ]; then
    echo "${text#/}: not found; set BARDLET_DATA to a folder with the subfolders eltec-eng, tinystories-lower," \
      "factbook, alpaca (alpaca_data.json.xz) and alpaca-eval-preferences (pairs.jsonl.xz)" >&2
    exit 1
  fi
done
mkdir -p "$out"

minutes() { awk -v m="$1" -v f="${FRACTION:-1}" 'BEGIN { printf "%.2f", m * f }'; }

stage() {
  local name=$1 started=$SECONDS
  shift
  echo "== $name: bardlet $*"
  if [ -f "$out/$name/README.md" ]; then
    echo "   already finished"
  elif [ -f "$out/$name/run.toml" ]; then
    "$bardlet" resume "$out/$name"
  else
    "$bardlet" "$@" --out "$out/$name"
  fi
  echo "== $name: $((SECONDS - started)) s in total"
}

sums() {
  "$python" - "$out" "$@" <<'SUMS'
import json, random, sys
from pathlib import Path

out, (digits, many, few) = Path(sys.argv[1]), map(int, sys.argv[2:])
numbers = random.Random(1).sample(range(10 ** (2 * digits)), many)
pairs = [divmod(number, 10**digits) for number in numbers]
records = [{"prompt": f"{a:0{digits}}+{b:0{digits}}=", "answer": str(a + b)} for a, b in pairs]
training = [record for i, record in enumerate(records) if i % 10 != 9]
for name, part in (("sums", records), ("few", training[:few])):
    (out / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part), encoding="utf-8")
(out / "sums.txt").write_text("".join(r["prompt"] + r["answer"] + "\n" for r in training), encoding="utf-8")
SUMS
}

table() {
  "$python" - "$out" <<'TABLE'
import sys, tomllib
from pathlib import Path

STAGES = {  # stage: (figure on held-out data, its keys in run.toml before and after)
    "base": ("nats per character (before: guessing)", "guessing", "nats_per_char"),
    "sft": ("loss of answers, nats per token", "val_loss_before", "val_loss"),
    "judge": ("accuracy on preference pairs (before: by length)", "longer", "accuracy"),
    "ppo": ("mean reward from the reward model", "reward_before", "reward_after"),
    "dpo": ("accuracy on preference pairs (before: by length)", "longer", "accuracy"),
    "sums-base": ("nats per character (before: guessing)", "guessing", "nats_per_char"),
    "sums-sft": ("loss of answers, nats per token", "val_loss_before", "val_loss"),
    "sums-grpo": ("share of sums that are right", "reward_before", "reward_after"),
}
print("\n| stage | figure on held-out data | before | after | minutes of training |\n| --- | --- | --- | --- | --- |")
for stage, (figure, *keys) in STAGES.items():
    record = tomllib.loads((Path(sys.argv[1]) / stage / "run.toml").read_text(encoding="utf-8"))["record"]
    before, after = (record[key] for key in keys)
    if keys[0] == "guessing":  # recorded per token
        before *= record["nats_per_char"] / record["val_loss"]
    print(f"| {stage} | {figure} | {before:.3f} | {after:.3f} | {record['seconds'] / 60:.1f} |")
TABLE
  printf '\n%d:%02d minutes in total. Chat with the model: %s\n' \
    $((SECONDS / 60)) $((SECONDS % 60)) "$bardlet chat $out/ppo"
}
