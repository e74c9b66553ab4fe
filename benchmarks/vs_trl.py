"""The stages of a chat model by TRL and by bardlet, in turn on one machine: how fast; and whether losses agree.

    python benchmarks/vs_trl.py sft BASE CONVERSATIONS --peer-python PATH [--records 768] [--repeats 3] [--save]
    python benchmarks/vs_trl.py dpo SFT PREFERENCES --peer-python PATH [--records 384] [--repeats 3] [--save]
    python benchmarks/vs_trl.py grpo SFT CONVERSATIONS --peer-python PATH [--records 64] [--repeats 3] [--save]
    python benchmarks/vs_trl.py parity SFT --peer-python PATH

PATH is the python of an environment where somebody has installed TRL (`pip install trl`); bardlet need not be there.
BASE and SFT are run folders with a qwen3 or gpt2 model, which transformers loads, too; the files are those of `bardlet
sft` and `bardlet dpo`. Of a file the first records are taken that fit into the window, so that nothing is cut. Both
sides turn them into tokens themselves, by the same chat template, and have to come to the same ids.

Each side reads all of the records once to warm up (compilation, memory) and then --passes times, timed, so that all
compute the same tokens; each in a process of its own, in turn, and the median of the repeats counts. Not timed:
reading, tokens, the reference's log p (both compute it once, before training), evaluation, saving. Same weights,
window, global batch, precision and threads. The loss is taken on answers alone. A token counts where it is predicted:
all but the first of a conversation, none of the padding; in `dpo` those of both answers.

In `grpo` both write answers to the questions, --group to each, and learn once from each --rows of them, at
temperature 1, without a divergence in the loss, at a rate so small that the model stays as it is and the answers stay
equally long. Writing is in the time, and a reward that costs nothing. What counts is answers per second.

bardlet as it comes (Muon, compiled) and with AdamW, each compiled and not. TRL with its default optimizer, AdamW,
without gradient checkpointing (its default has it, which takes a part of the speed) and with several settings of how
the batch is computed, of which the fastest is what the ratios are to: all rows at once; a few at a time, the gradients
added up; `packing`, which lays rows end to end, in one row with all others that are computed at once; a larger batch
of answers that are written at once. --peer-compile has the fastest kind compiled, too.

Floor: tokens per second of a program that computes nothing but the matrix products of this model (three times those of
the forward pass, in `grpo` four times, for what is written; the head where there is an answer), at the speed of a large
product here.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from safetensors.torch import save_file

from bardlet.config.finetuning import EXACT, DPOConfig, FineTuneConfig, GRPOConfig, SFTConfig
from bardlet.data import batch as data_batch
from bardlet.data import chat_template, prompts
from bardlet.data import preferences as data_preferences
from bardlet.data import records as examples
from bardlet.data.packing import ChatBatches, TokenizedChats
from bardlet.data.records import Question
from bardlet.planning import compilation
from bardlet.run import hf
from bardlet.runtime import distributed
from bardlet.stages import dpo, rl, sft, stage_of
from bardlet.stages.rewards import Answer
from bardlet.tokenizer import Tokenizer
from bardlet.training import logprobs, losses, trainer

Record = dict[str, Any]
OURS: dict[str, dict[str, Any]] = {
    "bardlet": {"compile": "on"}, "bardlet, eager": {"compile": "off"},
    "bardlet AdamW": {"compile": "on", "optimizer": "adamw"},
    "bardlet AdamW, eager": {"compile": "off", "optimizer": "adamw"}}  # fmt: skip
OF_GRPO = ("group", "answer_tokens")
STILL = 1e-8
CONFIGS: dict[str, type[FineTuneConfig]] = {"sft": SFTConfig, "dpo": DPOConfig, "grpo": GRPOConfig}
"""The rate of `grpo`: answers stay as they are."""
FAST = {"sft": "TRL packed, 1 at a time", "dpo": "TRL, 4 at a time", "grpo": "TRL"}
"""What --peer-compile compiles: the fastest without it, as measured when this was written."""
COUNTS = ("tokens", "answer_tokens", "conversations", "positions")


def peers(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The settings of TRL's sides, by name. All have the same global batch where --rows is a multiple of 4."""
    stage, rows = args.command, args.rows

    def at_once(number: int, **more: Any) -> dict[str, Any]:
        return {"per_device_train_batch_size": number, "gradient_accumulation_steps": rows // number, **more}

    few = min(4, rows)
    if stage == "sft":
        made = {"TRL padded": at_once(rows), "TRL padded, 4 at a time": at_once(few),
                "TRL packed": at_once(rows, packing=True), "TRL packed, 1 at a time": at_once(1, packing=True)}
    elif stage == "dpo":
        known = {"precompute_ref_log_probs": True, "beta": DPOConfig.beta}
        made = {"TRL": at_once(rows, **known), "TRL, 4 at a time": at_once(few, **known)}
    else:
        known = {"num_generations": args.group, "max_completion_length": args.answer_tokens, "beta": 0.0}
        made = {"TRL": at_once(rows, **known), "TRL, a group at a time": at_once(args.group, **known),
                "TRL, 4 batches at once": at_once(rows, steps_per_generation=4, **known)}
    fast = FAST[stage]
    return {**made, **({f"{fast}, compiled": {**made[fast], "torch_compile": True}} if args.peer_compile else {})}


def main() -> None:
    """See the top of this file."""
    if sys.argv[1:2] == ["ours"]:  # one side, in a process of its own
        job = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
        Path(sys.argv[3]).write_text(json.dumps(ours(job)), encoding="utf-8")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for stage, many, rows in (("sft", 768, 32), ("dpo", 384, 32), ("grpo", 64, 64)):
        one = commands.add_parser(stage, help=f"speed of {stage.upper()}")
        one.add_argument("model", type=Path)
        one.add_argument("data", type=Path)
        one.add_argument("--records", type=int, default=many, help="so many, from the beginning of the file")
        one.add_argument("--passes", type=int, default=1, help="timed, after the first")
        one.add_argument("--repeats", type=int, default=3)
        one.add_argument("--rows", type=int, default=rows, help="rows, pairs or answers of the global batch")
        one.add_argument("--block-size", type=int, default=256)
        one.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
        one.add_argument("--peer-compile", action="store_true", help="TRL compiled, too")
        one.add_argument("--only", nargs="+", help="sides, by their names; default: all")
        one.add_argument("--save", action="store_true", help="append a line of results")
        if stage == "grpo":
            one.add_argument("--group", type=int, default=8, help="answers to each question")
            one.add_argument("--answer-tokens", type=int, default=64, help="of the longest answer")
    parity_ = commands.add_parser("parity", help="losses of the same numbers by both")
    parity_.add_argument("model", type=Path)
    for one in commands.choices.values():
        one.add_argument("--peer-python", required=True, help="the python of an environment with TRL")
        one.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        (parity if args.command == "parity" else speed)(args, Path(scratch))


def asked(command: list[str], job: Record, scratch: Path) -> Record:
    """The answer of another process to a job; one that fails ends the benchmark with what it said."""
    question, answer = scratch / "job.json", scratch / "answer.json"
    question.write_text(json.dumps(job), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
                   "HF_HOME": str(scratch / "cache")}
    done = subprocess.run([*command, str(question), str(answer)], env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")
    return dict(json.loads(answer.read_text(encoding="utf-8")))


def peer(args: argparse.Namespace) -> list[str]:
    """The command of TRL's side."""
    return [args.peer_python, str(record.HERE / "trl_peer.py")]


# ---------------------------------------------------------------- speed


def speed(args: argparse.Namespace, scratch: Path) -> None:
    """Run all sides in turn, print the table, append a line of results."""
    model, tokenizer = hf.read_folder(args.model)
    records = list(itertools.islice(fitting(args, tokenizer), args.records))
    (scratch / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    rows = [row for one in records for row in conversations(tokenizer, one)]
    job = {"stage": args.command, "model": str(args.model.resolve()), "records": str(scratch / "records.jsonl"),
           "chat_template": chat_template.TEMPLATE, "scratch": str(scratch / "run"), "block_size": args.block_size,
           "rows": args.rows, "dtype": args.dtype, "threads": args.threads, "passes": 1 + args.passes,
           **{name: getattr(args, name) for name in OF_GRPO if hasattr(args, name)}}
    own = [sys.executable, str(Path(__file__).resolve()), "ours"]
    rate = STILL if args.command == "grpo" else CONFIGS[args.command].lr
    sides = {**{name: (own, settings) for name, settings in OURS.items()},
             **{name: (peer(args), {**settings, "learning_rate": rate}) for name, settings in peers(args).items()}}
    if unknown := set(args.only or ()) - set(sides):
        sys.exit(f"there is no side {', '.join(sorted(unknown))}; there are {'; '.join(sides)}")
    runs: dict[str, list[Record]] = {name: [] for name in args.only or sides}
    versions: Record = {}
    for _ in range(args.repeats):
        for name in runs:
            command, settings = sides[name]
            answer = asked(command, {**job, "what": "train", "settings": settings}, scratch)
            assert answer["learned"] == digest(rows), f"{name} does not learn from the same tokens"
            runs[name].append(rates(answer["passes"][1:]))
            versions |= answer.get("versions", {})
            print(json.dumps({name: runs[name][-1]}), flush=True)
    lengths = [len(ids) for ids, _ in rows]
    answered = sum(int(learned[1:].sum()) for _, learned in rows)
    if args.command == "grpo":  # answers as long as the first side wrote them
        one = next(iter(runs.values()))[0]
        length = round(one["answer_tokens"] / one["conversations"])
        lengths, answered = [n + length for n in lengths] * args.group, length * args.group * len(lengths)
    at_most = floor(model, lengths, answered, args.dtype) * (6 / 8 if args.command == "grpo" else 1)
    report(args, runs, {"floor": round(at_most), "records": len(records),
                        "parameters": sum(p.numel() for p in model.parameters()), "versions": versions})


def fitting(args: argparse.Namespace, tokenizer: Tokenizer) -> Iterator[Record]:
    """The records that are learned from and fit into the window, as TRL reads conversations."""
    found = examples.Examples(args.data.name, (args.data,))
    made: Iterator[Record]
    room = args.block_size - getattr(args, "answer_tokens", 0)
    if args.command == "grpo":
        made = ({"prompt": one.prompt} for one in found.questions()[0])
    elif args.command == "sft":
        made = ({"prompt": list(said[:-1]), "completion": [said[-1]]} for said in found.conversations()[0])
    else:
        made = ({"prompt": one.prompt, **{side: [{"role": "assistant", "content": getattr(one, side)}]
                                          for side in data_preferences.SIDES}} for one in found.preferences()[0])
    return (one for one in made if all(len(ids) <= room for ids, _ in conversations(tokenizer, one)))


def conversations(tokenizer: Tokenizer, one: Record) -> list[tuple[Any, Any]]:
    """(ids, which are learned) of a record: one conversation, or both of a pair, or a question."""
    ends = [one[name] for name in ("completion", *data_preferences.SIDES) if name in one]
    asked = chat_template.encode(tokenizer, one["prompt"], add_generation_prompt=True)
    made = [chat_template.encode(tokenizer, [*one["prompt"], *end]) for end in ends] or [asked]
    for _, learned in made:
        learned[: len(asked[0])] = False  # answers before the last are part of the question
    return made


def digest(rows: list[tuple[Any, Any]]) -> str:
    """sha256 (hex) of conversations, in whatever order they are; `trl_peer.py` has the same."""
    whole = sorted(json.dumps([ids.tolist(), ids[learned].tolist()]) for ids, learned in rows)
    return hashlib.sha256("\n".join(whole).encode()).hexdigest()


def ours(job: Record) -> Record:
    """bardlet's side: (seconds, *count) of each pass, and a digest of what was learned from."""
    name, run = job["stage"], Path(job["scratch"])
    run.mkdir(exist_ok=True)
    records = [json.loads(line) for line in Path(job["records"]).read_text(encoding="utf-8").splitlines()]
    own = {name: job[name] for name in OF_GRPO if name in job}
    if own:
        own |= {"reward": EXACT, "rollout": job["rows"], "beta": 0.0, "lr": STILL, "muon_lr": STILL}
    config = CONFIGS[name](init=job["model"], block_size=job["block_size"], batch_size=job["rows"], steps=1,
                         dtype=job["dtype"], device="cpu", threads=job["threads"], keep="last", eval_every=0,
                         save_every=0, log_every=10**6, **own, **job["settings"])
    with distributed.connect("cpu") as dist:
        stage = stage_of(config)(config, dist)
        model, words = stage.read_base(None)
        rows = [row for one in records for row in conversations(words, one)]
        if isinstance(stage, sft.SFT):
            chats = TokenizedChats.of(rows, words.dtype)
            stage.data = sft.ChatDataset(chats, chats.part(slice(1)), words, leaked=0.0)
        elif isinstance(stage, rl.RL):
            asked = prompts.Prompts([Question(one["prompt"], "") for one in records], [ids for ids, _ in rows])
            stage.data = prompts.PromptDataset(asked, asked, words)
        else:
            pairs = data_preferences.TokenizedPreferences(*(TokenizedChats.of(rows[side::2], words.dtype) for side in range(2)))
            known = dpo.reference(model, pairs, stage.config, dist)
            ready = data_preferences.PreferenceDataset(pairs, pairs.part(slice(1)), words)
            stage.data = dpo.DPODataset(ready, known, known[:1], "")
        stage.record = stage.record_class(text="records")
        t = stage.build_trainer(run, model)
        if isinstance(memory := t.objective.stage_state, rl.Rollouts):
            memory.actor = replace(memory.actor, reward=share_of_e)
        batches = t.record.batches
        t.state.steps = job["passes"] * batches
        t.config = replace(t.config, steps=t.state.steps)
        compilation.choose_compile(t)
        counted, passes = [0] * len(COUNTS), list[list[float]]()
        take, pad = t.objective.batch, int(words.pad_id or 0)

        def counting(step: int) -> data_batch.Batch:
            batch = take(step)
            counted[:] = [a + b for a, b in zip(counted, count(batch, pad), strict=True)]
            return batch

        def watch(line: Record) -> None:
            if line["step"] % batches == 0:
                passes.append([line["seconds"] - sum(seconds for seconds, *_ in passes), *counted])
                counted[:] = [0] * len(COUNTS)

        t.objective = replace(t.objective, batch=counting)
        trainer.fit(t, watch=watch)
    return {"passes": passes, "learned": digest(rows), "versions": {}}


def share_of_e(questions: Any, answers: Sequence[Answer]) -> np.ndarray:
    """A reward that costs nothing; `trl_peer.py` has the same."""
    return np.array([one.text.count("e") / max(1, len(one.text)) for one in answers], np.float32)


def count(batch: data_batch.Batch, pad: int) -> tuple[int, int, int, int]:
    """COUNTS of a batch: a position that is no padding predicts a token."""
    answered = batch["target"] != losses.IGNORE
    several = int(batch["segment"].amax(1).sum()) if "segment" in batch else int(answered.any(-1).sum())
    read = answered.flip(1).cumsum(1) > 0 if "advantage" in batch else batch["idx"] != pad
    return int(read.sum()), int(answered.sum()), several, batch["idx"].numel()


def rates(passes: list[list[float]]) -> Record:
    """How many a second of each of COUNTS."""
    seconds, *counted = (sum(column) for column in zip(*passes, strict=True))
    return {"seconds": round(seconds, 6)} | {name: round(n / seconds, 3)
                                             for name, n in zip(COUNTS, counted, strict=True)}


def floor(model: Any, lengths: list[int], answered: int, dtype: str) -> float:
    """Tokens a second that the matrix products alone would allow, at the speed of one large product.

    A training step takes 6 operations for each weight and token (a product of the forward pass has 2, one of the
    backward pass twice as many), and attention 6 n C for a conversation of n tokens, each token and layer: its two
    products, where a token sees half of them on average.
    """
    c = model.config
    head = c.vocab_size * c.n_embd
    # the matrices of the blocks, whose names have their number; a table of tokens or of positions is only looked up
    inner = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and re.search(r"\.\d+\.", name))
    tokens = sum(n - 1 for n in lengths)
    attention = sum(6 * n * n * c.n_embd * c.n_layer for n in lengths)
    return product_speed(dtype) * tokens / (6 * inner * tokens + 6 * head * answered + attention)


def product_speed(dtype: str, n: int = 2048) -> float:
    """Operations a second of a product of two n x n matrices in fp32 or bf16, the fastest of five."""
    a, b = (torch.randn(n, n).to(torch.bfloat16 if dtype == "bf16" else torch.float32) for _ in range(2))
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begun)
    return 2 * n**3 / min(times)


def report(args: argparse.Namespace, runs: dict[str, list[Record]], facts: Record) -> None:
    """Medians and ratios, printed and, with --save, appended to the results."""
    medians = {name: {key: statistics.median(run[key] for run in some) for key in some[0]}
               for name, some in runs.items()}
    counts = {"sft": "tokens", "dpo": "tokens", "grpo": "conversations"}[args.command]
    best = max((one[counts] for name, one in medians.items() if name.startswith("TRL")), default=float("nan"))
    items = {"sft": "chats/s", "dpo": "pairs/s", "grpo": "answers/s"}[args.command]
    print(f"\n{'':34} {'tokens/s':>9} {'answers, tokens/s':>18} {items:>9}"
          f" {'filled':>7} {'of the floor':>13} {'to the best TRL':>16}")
    for name, one in medians.items():
        print(f"{name:34} {one['tokens']:9,.0f} {one['answer_tokens']:18,.0f}"
              f" {one['conversations'] / (2 if args.command == 'dpo' else 1):9.1f}"
              f" {one['tokens'] / one['positions']:7.0%} {one['tokens'] / facts['floor']:13.1%}"
              f" {one[counts] / best:16.2f}")
    print(f"floor: {facts['floor']:,} tokens/s")
    if args.save:
        named = {name: getattr(args, name) for name in ("rows", "block_size", "dtype", "passes", "repeats")}
        record.append("vs_trl", {"kind": args.command, **named, **facts, "medians": medians, "runs": runs})


# ---------------------------------------------------------------- parity

BETA, CLIP, PAD = 0.1, 0.2, 1


def parity(args: argparse.Namespace, scratch: Path) -> None:
    """Losses of random batches and the norms of their gradients by both, and how far they are apart; at most 1e-5."""
    model, _ = hf.read_folder(args.model)
    given = batch_for_both(model, min(256, model.config.block_size))
    save_file(given, scratch / "tensors.safetensors")
    job = {"what": "parity", "model": str(args.model.resolve()), "tensors": str(scratch / "tensors.safetensors"),
           "chat_template": chat_template.TEMPLATE, "scratch": str(scratch / "run"),
           "block_size": model.config.block_size, "dtype": "fp32", "threads": args.threads, "beta": BETA, "clip": CLIP}
    answer = asked(peer(args), job, scratch)
    worst = 0.0
    print(f"{'':16} {'bardlet':>12} {'TRL':>12} {'apart':>9} {'gradients':>12} {'TRL':>12} {'apart':>9}")
    for name, own in our_losses(model, given).items():
        apart = [abs(a - b) / abs(b) for a, b in zip(own, answer["found"][name], strict=True)]
        (value, norm), (their, their_norm) = own, answer["found"][name]
        print(f"{name:16} {value:12.7f} {their:12.7f} {apart[0]:9.1e} {norm:12.7f} {their_norm:12.7f} {apart[1]:9.1e}")
        worst = max(worst, *apart)
    print(f"TRL {answer['versions']['trl']}, transformers {answer['versions']['transformers']}; TRL has no function of "
          "tensors for advantages (GAE), whiten and clipped_value: nothing to compare them with")
    if worst > 1e-5:
        sys.exit(f"{worst:.1e} apart is more than 1e-5")


def batch_for_both(model: Any, longest: int, pairs: int = 4) -> dict[str, torch.Tensor]:
    """Random conversations (2 `pairs` rows: all chosen ones, then the rejected), and random log probabilities."""
    torch.manual_seed(0)
    rows, at = 2 * pairs, torch.arange(longest)[None]
    length = torch.randint(longest // 4, longest + 1, (rows, 1))
    ids = torch.randint(8, model.config.vocab_size, (rows, longest)).where(at < length, PAD)
    labels = ids.where((at >= length - 16) & (at < length), losses.IGNORE)
    with torch.no_grad():  # short answers, a reference that is near: DPO's loss is no difference of large numbers
        reference = logprobs.pair_log_probability(model, as_pairs(ids, labels)) + 10 * torch.randn(pairs, 2)
    A, T = 8, 32
    logp = -torch.rand(A, T)
    return {"ids": ids, "labels": labels, "mask": (at < length).long(), "reference": reference,
            "logp": logp, "old": logp + 0.3 * torch.randn(A, T), "reference_logp": logp + 0.3 * torch.randn(A, T),
            "advantage": torch.randn(A),
            "answered": (torch.arange(T)[None] < torch.randint(1, T + 1, (A, 1))).long()}  # fmt: skip


def as_pairs(ids: torch.Tensor, labels: torch.Tensor) -> data_batch.Batch:
    """Rows, all chosen answers before all rejected ones, as a batch of pairs."""
    ids, labels = (torch.stack(x.chunk(2), 1) for x in (ids, labels))
    return {"idx": ids[..., :-1], "target": labels[..., 1:]}


def our_losses(model: Any, given: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """(mean loss, norm of its gradient) of each of TRL's losses that bardlet has, too."""
    ids, labels, mask = given["ids"], given["labels"], given["mask"] == 1
    targets = int((labels != losses.IGNORE).sum())
    plain = {"idx": ids[:, :-1], "target": labels[:, 1:]}
    chats = TokenizedChats.of([(i[m].numpy(), (w[m] != losses.IGNORE).numpy())
                      for i, w, m in zip(ids, labels, mask, strict=True)], "int64")
    packed = ChatBatches(chats, ids.shape[1], len(ids), 0, PAD).batch(0)

    def of_model(value: torch.Tensor) -> tuple[float, float]:
        model.zero_grad()
        value.backward()
        return value.item(), torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()

    def of_logp(made: Any) -> tuple[float, float]:
        logp = given["logp"].clone().requires_grad_()
        value = made(logp, given["answered"] == 1) / given["answered"].sum()
        value.backward()
        return value.item(), logp.grad.norm().item()

    chosen, rejected = logprobs.pair_log_probability(model, as_pairs(ids, labels)).unbind(1)
    preferred = losses.dpo_loss(chosen, rejected, *given["reference"].unbind(1), BETA) / len(chosen)
    old, advantage = given["old"], given["advantage"]
    return {
        "SFT": of_model(losses.completion_loss(model, plain) / targets),
        "SFT, packed": of_model(losses.completion_loss(model, packed) / targets),
        "DPO": of_model(preferred),
        "GRPO": of_logp(lambda logp, m: losses.grpo_loss(logp, old, given["reference_logp"], advantage, m, CLIP, BETA)),
        "clipped policy": of_logp(lambda logp, m: losses.clipped_policy_loss(logp, old, advantage[:, None], m, CLIP)),
        "divergence": of_logp(lambda logp, m: losses.kl_estimate(logp, given["reference_logp"])[m].sum()),
    }


if __name__ == "__main__":
    main()
