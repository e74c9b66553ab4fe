# What the stories in this folder share; they read it, nobody runs it. It wants `out`, the folder of the runs.
#
#   stage NAME COMMAND ...    `bardlet COMMAND ...` as the run out/NAME: begun, gone on with, or there already
#   minutes M                 M times $FRACTION
#   sums DIGITS MANY FEW      out/sums.jsonl, MANY sums of two numbers of so many digits in random order, every tenth
#                             of which is held out by every stage; the others as lines of out/sums.txt, FEW in out/few.jsonl
#   table                     each stage, before and after
set -euo pipefail

bardlet=${BARDLET:-bardlet}
python=${PYTHON:-python3}
BARDLET_DATA=${BARDLET_DATA:-}
instructions=$BARDLET_DATA/alpaca/alpaca_data.json.xz
preferences=$BARDLET_DATA/alpaca-eval-preferences/pairs.jsonl.xz
for text in "$instructions" "$preferences" "$BARDLET_DATA"/{eltec-eng,tinystories-lower,factbook}; do
  if [ ! -e "$text" ]; then
    echo "${text#/}: is not there. This story reads eltec-eng, tinystories-lower, factbook, alpaca (alpaca_data.json.xz) and" \
      "alpaca-eval-preferences (pairs.jsonl.xz), a folder each, in the folder that BARDLET_DATA names: set it, or put" \
      "them there" >&2
    exit 1
  fi
done
mkdir -p "$out"

minutes() { awk -v m="$1" -v f="${FRACTION:-1}" 'BEGIN { printf "%.2f", m * f }'; }

stage() {
  local name=$1 begun=$SECONDS
  shift
  echo "== $name: bardlet $*"
  if [ -f "$out/$name/README.md" ]; then
    echo "   is there already"
  elif [ -f "$out/$name/run.toml" ]; then
    "$bardlet" resume "$out/$name"
  else
    "$bardlet" "$@" --out "$out/$name"
  fi
  echo "== $name: $((SECONDS - begun)) s in all"
}

sums() {
  "$python" - "$out" "$@" <<'SUMS'
import json, random, sys
from pathlib import Path

out, (digits, many, few) = Path(sys.argv[1]), map(int, sys.argv[2:])
chosen = random.Random(1).sample(range(10 ** (2 * digits)), many)
pairs = [divmod(one, 10**digits) for one in chosen]
records = [{"prompt": f"{a:0{digits}}+{b:0{digits}}=", "answer": str(a + b)} for a, b in pairs]
learned = [one for i, one in enumerate(records) if i % 10 != 9]
for name, some in (("sums", records), ("few", learned[:few])):
    (out / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some), encoding="utf-8")
(out / "sums.txt").write_text("".join(one["prompt"] + one["answer"] + "\n" for one in learned), encoding="utf-8")
SUMS
}

table() {
  "$python" - "$out" <<'TABLE'
import sys, tomllib
from pathlib import Path

WHAT = {  # stage: (what is measured on what was held out, before, after)
    "base": ("nats per character (before: guessing)", "guessing", "nats_per_char"),
    "sft": ("loss of answers, nats per token", "val_loss_before", "val_loss"),
    "judge": ("pairs judged as people did (before: by length)", "longer", "accuracy"),
    "ppo": ("mean reward by the judge", "reward_before", "reward_after"),
    "dpo": ("pairs preferred as people did (before: by length)", "longer", "accuracy"),
    "sums-base": ("nats per character (before: guessing)", "guessing", "nats_per_char"),
    "sums-sft": ("loss of answers, nats per token", "val_loss_before", "val_loss"),
    "sums-grpo": ("sums that are right", "reward_before", "reward_after"),
}
print("\n| stage | on what was held out | before | after | minutes of training |\n| --- | --- | --- | --- | --- |")
for stage, (what, *names) in WHAT.items():
    record = tomllib.loads((Path(sys.argv[1]) / stage / "run.toml").read_text(encoding="utf-8"))["record"]
    before, after = (record[name] for name in names)
    if names[0] == "guessing":  # it is said of tokens
        before *= record["nats_per_char"] / record["val_loss"]
    print(f"| {stage} | {what} | {before:.3f} | {after:.3f} | {record['seconds'] / 60:.1f} |")
TABLE
  printf '\n%d:%02d minutes in all. Talk to it: %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$bardlet chat $out/ppo"
}
