"""Answers to the course's exercises. Running this file writes their figures to answers.json for the pages to show.

    python docs/answers.py [NAME ...] [--seeds N]      # all answers: about ten minutes on one core

Training uses the lecture's own loop, short enough to modify: Tiny Shakespeare as characters, batches of 32 windows of
8, AdamW. An answer returns named figures; trained rungs give the validation loss, averaged over seeds. An exercise that
chooses between settings uses the loss on the development split instead.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardlet.config.model import ModelConfig
from bardlet.config.pretraining import TrainConfig
from bardlet.data import corpus
from bardlet.errors import BardletError
from bardlet.models import build, lecture
from bardlet.models.layers import RMSNorm, apply_rope, rope_cos_sin
from bardlet.training.optimizers import orthogonalize

Figures = dict[str, float]

# ---------------------------------------------------------------------------- the lecture's loop


class Text:
    """A text as ids: the characters, the training part and the validation part."""

    def __init__(self, file: str = "tinyshakespeare") -> None:
        """file: a text file of yours, in place of Tiny Shakespeare. Exits with a message if the text is unavailable."""
        try:
            text = "".join(corpus.find([file]).documents())
        except BardletError as error:  # one line, also for a learner who types into Python
            raise SystemExit(f"{error}\nTo use a text of your own: Text(\"my.txt\")") from None
        self.chars = sorted(set(text))
        stoi = {c: i for i, c in enumerate(self.chars)}
        ids = torch.tensor([stoi[c] for c in text])
        cut = int(0.9 * len(ids))
        self.train, self.val = ids[:cut], ids[cut:]

    def development(self) -> Text:
        """Return the text for making choices: the validation part is the last tenth of the original training part."""
        other = Text.__new__(Text)
        cut = int(0.9 * len(self.train))
        other.chars, other.train, other.val = self.chars, self.train[:cut], self.train[cut:]
        return other


def shape(model: str, text: Text, **changed: int) -> ModelConfig:
    """Return the lecture's small model shape, with changes."""
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 8, **changed}
    return TrainConfig(model=model, **sizes).model_config(len(text.chars))  # type: ignore[arg-type]


def batch(part: Tensor, generator: torch.Generator, rows: int = 32, length: int = 8) -> tuple[Tensor, Tensor]:
    """Return random windows, and the same windows one character later: two (rows, length)."""
    start = torch.randint(len(part) - length, (rows, 1), generator=generator)
    position = start + torch.arange(length)
    return part[position], part[position + 1]


def train(model: nn.Module, text: Text, seed: int, steps: int = 5000, lr: float = 1e-3,
          after_step: Callable[[int], None] = lambda step: None) -> float:
    """Train as the lecture does; return the validation loss over every character once."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        idx, target = batch(text.train, generator)
        loss = F.cross_entropy(model(idx).flatten(0, 1), target.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        after_step(step)
    return validate(model, text)


@torch.no_grad()
def validate(model: nn.Module, text: Text) -> float:
    """Return the mean loss over every validation character except the first."""
    rows = (len(text.val) - 1) // 8
    idx, target = text.val[: 8 * rows].view(rows, 8), text.val[1 : 8 * rows + 1].view(rows, 8)
    return F.cross_entropy(model(idx).flatten(0, 1), target.flatten()).item()


def new(name: str, text: Text, seed: int, **changed: int) -> nn.Module:
    """Return an untrained rung."""
    torch.manual_seed(seed)
    model: nn.Module = build(shape(name, text, **changed))
    return model


# ---------------------------------------------------------------------------- the answers


def counted(text: Text, seed: int) -> Figures:
    """Rung 1: count a bigram's table instead of training it."""
    V = len(text.chars)
    pairs = torch.ones(V, V)  # start at 1: an unseen pair is rare, not impossible
    pairs.index_put_((text.train[:-1], text.train[1:]), torch.ones(len(text.train) - 1), accumulate=True)
    log_p = (pairs / pairs.sum(dim=1, keepdim=True)).log()
    return {"counted, no seed": -log_p[text.val[:-1], text.val[1:]].mean().item(),
            "trained, 3,000 steps": train(new("bigram", text, seed), text, seed, steps=3000, lr=1e-2)}


def only_itself(text: Text, seed: int) -> Figures:
    """Rung 2: the same model without the average."""
    figures = {"average of the past": train(new("averaging", text, seed), text, seed)}
    with mock.patch.object(lecture, "average_by_softmax", lambda x: x):  # restored afterwards
        figures["only the current token"] = train(new("averaging", text, seed), text, seed)
    return figures


def without_mask(text: Text, seed: int) -> Figures:
    """Rung 3: let every position look at every other."""
    model = new("one-head", text, seed)
    model.sa_head.tril.fill_(1)
    train(model, text, seed)
    rows = (len(text.val) - 1) // 8
    idx, target = text.val[: 8 * rows].view(rows, 8), text.val[1 : 8 * rows + 1].view(rows, 8)
    with torch.no_grad():
        loss = F.cross_entropy(model(idx).transpose(1, 2), target, reduction="none").mean(dim=0)  # (B, T) -> (T)
    return {"all positions": loss.mean().item(), "the first seven": loss[:7].mean().item(),
            "the last, which sees no future": loss[7].item()}


def number_of_heads(text: Text, seed: int) -> Figures:
    """Rung 4: the same 32 channels in fewer or more heads; a choice, so it uses the development split."""
    text = text.development()
    return {f"{n} of {32 // n}": train(new("multi-head", text, seed, n_head=n), text, seed)
            for n in (1, 2, 4, 8, 16, 32)}


def without_relu(text: Text, seed: int) -> Figures:
    """Rung 5: the feed-forward layer without its ReLU."""
    figures = {"with ReLU": train(new("feed-forward", text, seed), text, seed)}
    model = new("feed-forward", text, seed)
    model.ffwd.net[1] = nn.Identity()
    figures["without"] = train(model, text, seed)
    figures["rung 4, no such layer"] = train(new("multi-head", text, seed), text, seed)
    return figures


def without_residual(text: Text, seed: int) -> Figures:
    """Rung 6: three blocks that replace x instead of adding to it."""

    def without_sum(self: nn.Module, x: Tensor) -> Tensor:
        return self.ffwd(self.sa(x))

    figures = {"x + block(x)": train(new("residual", text, seed), text, seed)}
    with mock.patch.object(lecture.ResidualBlock, "forward", without_sum):
        figures["block(x)"] = train(new("residual", text, seed), text, seed)
    return figures


def ten_times_the_rate(text: Text, seed: int) -> Figures:
    """Rung 7: 2,000 steps at three learning rates, with and without LayerNorm."""
    return {f"{name}, learning rate {lr:g}": train(new(name, text, seed), text, seed, steps=2000, lr=lr)
            for name in ("residual", "layer-norm") for lr in (1e-3, 1e-2, 3e-2)}


def first_loss(text: Text, seed: int) -> Figures:
    """Rung 8: the loss before the first step."""
    with torch.no_grad():
        return {f"rung {n}": validate(new(name, text, seed), text)
                for n, name in ((1, "bigram"), (6, "residual"), (7, "layer-norm"), (8, "dropout"))}


def same_distance(text: Text, seed: int) -> Figures:
    """Rung 9: the score of one query and one key at several pairs of positions."""
    torch.manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, 16)  # one token, one head, 16 channels each

    def score(at_q: int, at_k: int) -> float:
        rotated = [apply_rope(x, *rope_cos_sin(torch.tensor([[position]]), 16, 10_000.0))
                   for x, position in ((q, at_q), (k, at_k))]
        return (rotated[0] * rotated[1]).sum().item()

    return {f"query at {t}, key at {s}": score(t, s) for t, s in ((3, 1), (13, 11), (103, 101), (13, 3))}


def parameters_of_a_gate(text: Text, seed: int) -> Figures:
    """Rung 10: count the parameters of one feed-forward layer at 128 and at 384 channels."""

    def count(name: str, C: int) -> int:
        return sum(p.numel() for p in new(name, text, seed, n_embd=C).blocks[0].ffwd.parameters())

    return {f"{C} channels, rung {n}": count(name, C)
            for C in (128, 384) for n, name in (("9, two matrices", "rotary"), ("10, three matrices", "swiglu"))}


def sharper_queries(text: Text, seed: int) -> Figures:
    """Rung 11: the largest attention weight of each row, also with a query matrix a hundred times larger."""
    figures = {"equal weights": sum(1 / n for n in range(2, 9)) / 7}  # the row at position t has t + 1 weights
    x = torch.randn(64, 8, 32, generator=torch.Generator().manual_seed(seed))
    for n, name in ((10, "swiglu"), (11, "qk-norm")):
        attention = new(name, text, seed).blocks[0].sa
        with torch.no_grad():
            for label, factor in (("as initialized", 1), ("query matrix x 100", 100)):
                attention.query.weight *= factor
                figures[f"rung {n}, {label}"] = attention.weights(x)[..., 1:, :].amax(dim=-1).mean().item()
    return figures


def muon_update(text: Text, seed: int) -> Figures:
    """Rung 12: the singular values of a gradient, and of Muon's update."""
    model = new("qk-norm", text, seed)
    idx, target = batch(text.train, torch.Generator().manual_seed(seed))
    F.cross_entropy(model(idx).flatten(0, 1), target.flatten()).backward()
    gradient = model.blocks[0].sa.value.weight.grad
    update = orthogonalize(gradient[None], torch.float32)[0]  # in bf16 the third digit depends on the processor
    old, new_ = torch.linalg.svdvals(gradient), torch.linalg.svdvals(update)
    return {"gradient, largest / median": (old[0] / old.median()).item(),
            "gradient, smallest / median": (old[-1] / old.median()).item(),
            "update, largest": new_[0].item(), "update, median": new_.median().item(),
            "update, smallest": new_[-1].item(), f"update, of {len(new_)} above 0.6": (new_ > 0.6).sum().item()}


def average_of_weights(text: Text, seed: int) -> Figures:
    """Rung 13: train rung 7; compare the last weights with their mean over the last thousand steps."""
    figures = {}
    for lr in (1e-3, 1e-2):
        model = new("layer-norm", text, seed)
        mean: dict[str, Tensor] = {}
        count = 0

        def add(step: int, model: nn.Module = model, mean: dict[str, Tensor] = mean) -> None:
            nonlocal count
            if step < 4000:
                return
            count += 1
            for name, p in model.named_parameters():
                mean.setdefault(name, p.detach().clone()).lerp_(p.detach(), 1 / count)

        figures[f"learning rate {lr:g}, last"] = train(model, text, seed, lr=lr, after_step=add)
        model.load_state_dict(mean)
        figures[f"learning rate {lr:g}, average"] = validate(model, text)
    return figures


def centered(text: Text, seed: int) -> Figures:
    """Rung 9: the change in two norms' outputs when a constant is added to every channel."""
    x = torch.randn(1000, 32, generator=torch.Generator().manual_seed(seed))
    norms = {"LayerNorm": nn.LayerNorm(32), "RMSNorm": RMSNorm(32, 1e-6)}
    return {name: (norm(x + 5) - norm(x)).abs().mean().item() for name, norm in norms.items()}


LOSS = "validation loss, nats per character"
ANSWERS: dict[str, tuple[Callable[[Text, int], Figures], int, str]] = {  # name -> (function, seeds, what it measures)
    "counted": (counted, 2, LOSS), "only itself": (only_itself, 2, LOSS), "without mask": (without_mask, 2, LOSS),
    "number of heads": (number_of_heads, 1, "development loss, nats per character"),
    "without ReLU": (without_relu, 2, LOSS), "without residual": (without_residual, 2, LOSS),
    "ten times the rate": (ten_times_the_rate, 1, LOSS), "first loss": (first_loss, 1, LOSS),
    "same distance": (same_distance, 1, "score"), "centered": (centered, 1, "mean absolute change of a channel"),
    "parameters of a gate": (parameters_of_a_gate, 1, "parameters, an exact count"),
    "sharper queries": (sharper_queries, 1, "largest weight of a row, mean"),
    "muon update": (muon_update, 1, "singular value, or ratio of two"),
    "average of weights": (average_of_weights, 1, LOSS),
}


def main() -> None:
    """Run the named answers, or all, and write their figures to answers.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ANSWERS))
    parser.add_argument("--seeds", type=int, help="number of seeds (default: as listed in ANSWERS)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are tiny: a second thread costs more than it saves
    path, text = Path(__file__).with_name("answers.json"), Text()
    for name in args.names or ANSWERS:
        run, seeds, measures = ANSWERS[name]
        figures = [run(text, 1337 + i) for i in range(args.seeds or seeds)]
        mean = {key: sum(f[key] for f in figures) / len(figures) for key in figures[0]}
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        entries[name] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
                         "threads": torch.get_num_threads(), "seeds": len(figures), "measures": measures,
                         "figures": mean}
        path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(mean), flush=True)


if __name__ == "__main__":
    main()
