"""What fine-tuning on conversations gives: the loss of held-out answers beside the base's, and what answers are like.

    python benchmarks/chat.py answers BASE SFT [--most 1000] [--asked 300] [--temperature 1.0] [--no-save]
    python benchmarks/chat.py preferences RUN [RUN ...] [--no-save]

BASE is what SFT, a run of `bardlet sft`, began as. The loss is that of the answers' own words, without the token that
ends them, over the same held-out conversations and the same tokens: SFT reads them as the chat template writes them,
BASE as plain text, question, empty line, answer, behind a separator; and BASE once more by the template, which it has
never seen. Then SFT answers held-out questions, sampling: how many answers end by themselves, how long they are beside
the written ones, how many differ. `preferences` takes what runs of `bardlet reward` and `bardlet dpo` say themselves of
the pairs that they held out. Each appends lines to results/chat.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch

from bardlet.data import batch as data_batch
from bardlet.data import chat_template, records
from bardlet.evaluation import metrics
from bardlet.inference import answers as inference_answers
from bardlet.run import folder, hf
from bardlet.runtime import device
from bardlet.tokenizer import Tokenizer
from bardlet.training import losses

Row = tuple[list[int], list[bool]]
"""Ids, and which of them the loss is taken on."""


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    answers = commands.add_parser("answers", help="losses of held-out answers, and answers")
    answers.add_argument("base", type=Path)
    answers.add_argument("sft", type=Path)
    answers.add_argument("--most", type=int, default=1000, help="conversations for the losses")
    answers.add_argument("--asked", type=int, default=300, help="questions for the answers")
    answers.add_argument("--temperature", type=float, default=1.0)
    preferences = commands.add_parser("preferences", help="of held-out pairs, what runs say themselves")
    preferences.add_argument("runs", type=Path, nargs="+")
    for command in (answers, preferences):
        command.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    for figures in [measured(args)] if args.command == "answers" else map(preferred, args.runs):
        print(figures)
        if not args.no_save:
            record.append("chat", figures)


def preferred(run: Path) -> dict[str, Any]:
    """What a run says of the pairs that it held out, and beside it what taking the longer answer gets."""
    config, known = folder.settings(run, changed=True)
    names = ("text", "parameters", "seconds", "documents", "selected_by", "val_loss", "accuracy", "margin", "longer",
             "accuracy_longer", "accuracy_shorter", "likes_length", "calibration_error")  # fmt: skip
    return {"kind": "preferences", "stage": config.stage, "seed": config.seed, "steps": known["steps"],
            **{name: known[name] for name in names if name in known}}


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one pair of runs."""
    model, tokenizer = hf.read_folder(args.sft)
    base, base_words = hf.read_folder(args.base)
    assert base_words.hash == tokenizer.hash, "the two runs have another tokenizer each"
    config, known = folder.settings(args.sft, changed=True)
    assert config.val_part == "val", "its held-out conversations are not those that are measured here"
    held = records.find(config.text).conversations()[1]
    held = held[:: -(-len(held) // args.most)]
    room = model.config.block_size
    pairs = [(said[-2]["content"], said[-1]["content"]) for said in held
             if [m["role"] for m in said] == ["user", "assistant"]]
    rows = [(templated(tokenizer, *pair), plain(tokenizer, *pair)) for pair in pairs]
    rows = [both for both in rows if max(len(ids) for ids, _ in both) <= room + 1 and any(both[0][1])]
    template, text = (list(side) for side in zip(*rows, strict=True))
    asked = [(*pair, chat_template.encode(tokenizer, [{"role": "user", "content": pair[0]}], ask=True)[0])
             for pair in pairs]
    asked = [one for one in asked if len(one[2]) <= room // 2][: args.asked]  # those that leave an answer half of it
    device.tune_malloc()
    made = inference_answers.generate_answers(model, tokenizer, [question for *_, question in asked], temperature=args.temperature)
    ids = [tokenizer.encode(answer) for answer, _ in made]
    written = [len(tokenizer.encode(answer)) for _, answer, _ in asked]
    return {
        "kind": "answers", "text": known["text"], "parameters": known["parameters"], "seconds": known["seconds"],
        "seed": config.seed, "conversations": len(rows),
        "base_plain": round(mean(base, text), 4), "base_template": round(mean(base, template), 4),
        "sft": round(mean(model, template), 4), "temperature": args.temperature, "answers": len(made),
        "ended": round(sum(ended for _, ended in made) / len(made), 4),
        "median_tokens": statistics.median(map(len, ids)), "median_tokens_written": statistics.median(written),
        "distinct": round(len({answer for answer, _ in made}) / len(made), 4),
        "examples": [[question, answer] for (question, *_), (answer, _) in zip(asked, made, strict=True)][:5],
    }


def templated(tokenizer: Tokenizer, question: str, answer: str) -> Row:
    """A question and its answer by the template; the loss is on the answer's words."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids, learned = chat_template.encode(tokenizer, messages)
    learned[-1] = False  # the token that ends it
    return ids.tolist(), learned.tolist()


def plain(tokenizer: Tokenizer, question: str, answer: str) -> Row:
    """The same as a plain text, with the same tokens of the answer."""
    before = [int(tokenizer.eos_id or 0), *tokenizer.encode(chat_template.escape_special(question) + "\n\n").tolist()]
    after = tokenizer.encode(chat_template.escape_special(answer)).tolist()
    return before + after, [False] * len(before) + [True] * len(after)


def mean(model: Any, rows: list[Row]) -> float:
    """The mean loss in nats over the tokens that it is taken on."""

    def batch(some: list[Row]) -> data_batch.Batch:
        T = max(len(ids) for ids, _ in some) - 1
        idx, target = np.zeros((len(some), T), np.int64), np.full((len(some), T), losses.IGNORE, np.int64)
        for row, (ids, learned) in enumerate(some):
            idx[row, : len(ids) - 1] = ids[:-1]
            target[row, : len(ids) - 1] = np.where(learned[1:], ids[1:], losses.IGNORE)
        return {"idx": torch.from_numpy(idx), "target": torch.from_numpy(target)}

    rows = sorted(rows, key=lambda row: len(row[0]))
    batches = (batch(rows[first : first + 16]) for first in range(0, len(rows), 16))
    return metrics.mean_loss(model, batches, torch.device("cpu"), loss=losses.completion_loss)


if __name__ == "__main__":
    main()
