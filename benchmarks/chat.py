"""Gains from fine-tuning on conversations: validation loss of the answers compared with the base, and sampled answers.

    python benchmarks/chat.py answers BASE SFT [--most 1000] [--asked 300] [--temperature 1.0] [--no-save]
    python benchmarks/chat.py preferences RUN [RUN ...] [--no-save]

`answers`: SFT is a run of `bardlet sft` that started from BASE. The loss covers the tokens of each answer without its
end token, on the same conversations of the validation split. SFT reads them in the chat template. BASE reads them as
plain text (separator, question, empty line, answer), and once more in the template, which it was not trained on. SFT
then samples answers to questions of the validation split: the share that ends with the end token, the length compared
with the reference answers, and the share of distinct answers.

`preferences` collects the figures that runs of `bardlet reward` and `bardlet dpo` recorded for their validation pairs.
Both append lines to results/chat.jsonl.
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
"""Token ids, and a mask of the tokens that count in the loss."""


def main() -> None:
    """Run the command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    answers = commands.add_parser("answers", help="measure the loss of answers, and sample answers")
    answers.add_argument("base", type=Path)
    answers.add_argument("sft", type=Path)
    answers.add_argument("--most", type=int, default=1000, help="maximum number of conversations for the loss")
    answers.add_argument("--asked", type=int, default=300, help="maximum number of questions to answer")
    answers.add_argument("--temperature", type=float, default=1.0)
    preferences = commands.add_parser("preferences", help="collect what runs recorded for validation pairs")
    preferences.add_argument("runs", type=Path, nargs="+")
    for command in (answers, preferences):
        command.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    for figures in [measure_answers(args)] if args.command == "answers" else map(recorded_preferences, args.runs):
        print(figures)
        if not args.no_save:
            record.append("chat", figures)


def recorded_preferences(run: Path) -> dict[str, Any]:
    """Return what a run recorded for its validation pairs, with the accuracy of picking the longer answer."""
    config, run_record = folder.settings(run, use_edited=True)
    names = ("text", "parameters", "seconds", "documents", "selected_by", "val_loss", "accuracy", "margin", "longer",
             "accuracy_longer", "accuracy_shorter", "likes_length", "calibration_error")  # fmt: skip
    return {"kind": "preferences", "stage": config.stage, "seed": config.seed, "steps": run_record["steps"],
            **{name: run_record[name] for name in names if name in run_record}}


def measure_answers(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a base and its fine-tuned model."""
    model, tokenizer = hf.read_folder(args.sft)
    base, base_tokenizer = hf.read_folder(args.base)
    assert base_tokenizer.hash == tokenizer.hash, "the two runs have different tokenizers"
    config, run_record = folder.settings(args.sft, use_edited=True)
    assert config.val_part == "val", "the run used another split for validation"
    validation = records.find(config.text).conversations()[1]
    validation = validation[:: -(-len(validation) // args.most)]
    window = model.config.block_size
    pairs = [(chat[-2]["content"], chat[-1]["content"]) for chat in validation
             if [m["role"] for m in chat] == ["user", "assistant"]]
    rows = [(templated(tokenizer, *pair), plain(tokenizer, *pair)) for pair in pairs]
    rows = [both for both in rows if max(len(ids) for ids, _ in both) <= window + 1 and any(both[0][1])]
    template, text = (list(side) for side in zip(*rows, strict=True))
    prompts = [(*pair, chat_template.encode(tokenizer, [{"role": "user", "content": pair[0]}],
                                            add_generation_prompt=True)[0])
               for pair in pairs]
    prompts = [prompt for prompt in prompts if len(prompt[2]) <= window // 2][: args.asked]  # half is for the answer
    device.tune_malloc()
    completions = inference_answers.generate_answers(model, tokenizer, [ids for *_, ids in prompts],
                                                     temperature=args.temperature)
    ids = [tokenizer.encode(answer) for answer, _ in completions]
    reference_lengths = [len(tokenizer.encode(answer)) for _, answer, _ in prompts]
    return {
        "kind": "answers", "text": run_record["text"], "parameters": run_record["parameters"],
        "seconds": run_record["seconds"],
        "seed": config.seed, "conversations": len(rows),
        "base_plain": round(mean(base, text), 4), "base_template": round(mean(base, template), 4),
        "sft": round(mean(model, template), 4), "temperature": args.temperature, "answers": len(completions),
        "ended": round(sum(ended for _, ended in completions) / len(completions), 4),
        "median_tokens": statistics.median(map(len, ids)),
        "median_tokens_written": statistics.median(reference_lengths),
        "distinct": round(len({answer for answer, _ in completions}) / len(completions), 4),
        "examples": [[question, answer] for (question, *_), (answer, _) in zip(prompts, completions, strict=True)][:5],
    }


def templated(tokenizer: Tokenizer, question: str, answer: str) -> Row:
    """Return a question and its answer in the chat template; the loss is on the answer's text."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids, learned = chat_template.encode(tokenizer, messages)
    learned[-1] = False  # the end token
    return ids.tolist(), learned.tolist()


def plain(tokenizer: Tokenizer, question: str, answer: str) -> Row:
    """Return the same as plain text, with the same answer tokens."""
    before = [int(tokenizer.eos_id or 0), *tokenizer.encode(chat_template.escape_special(question) + "\n\n").tolist()]
    after = tokenizer.encode(chat_template.escape_special(answer)).tolist()
    return before + after, [False] * len(before) + [True] * len(after)


def mean(model: Any, rows: list[Row]) -> float:
    """Return the mean loss, in nats, over the tokens that count in it."""

    def to_batch(rows: list[Row]) -> data_batch.Batch:
        T = max(len(ids) for ids, _ in rows) - 1
        idx, target = np.zeros((len(rows), T), np.int64), np.full((len(rows), T), losses.IGNORE, np.int64)
        for row, (ids, learned) in enumerate(rows):
            idx[row, : len(ids) - 1] = ids[:-1]
            target[row, : len(ids) - 1] = np.where(learned[1:], ids[1:], losses.IGNORE)
        return {"idx": torch.from_numpy(idx), "target": torch.from_numpy(target)}

    rows = sorted(rows, key=lambda row: len(row[0]))
    batches = (to_batch(rows[first : first + 16]) for first in range(0, len(rows), 16))
    return metrics.mean_loss(model, batches, torch.device("cpu"), loss=losses.completion_loss)


if __name__ == "__main__":
    main()
