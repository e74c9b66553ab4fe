"""The mistakes that check recognizes: a sentence, the minute of the lecture, and the page of the course for each."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """A mistake. text: its sentence, in which {detail} is the measured part; minute: of the lecture, h:mm:ss."""

    text: str
    minute: str
    page: str


BIGRAM, AVERAGING, HEAD, HEADS, FEED, RESIDUAL, NORM, DROPOUT, ENCODER = (
    "1, The bigram", "2, An average of the past", "3, One head of self-attention", "4, Several heads",
    "5, Feed-forward", "6, Residual connections", "7, LayerNorm", "8, Dropout and scale", "The encoder-decoder")

MISTAKES = {
    "no-scale": Mistake("The scores are not divided by the square root of the head size, {detail}.", "1:16:56", HEAD),
    "scale-n-embd": Mistake("The scores are divided by the square root of n_embd, {detail}.", "1:20:05", HEAD),
    "wrong-scale": Mistake("The scores are multiplied by the wrong number, {detail}.", "1:16:56", HEAD),
    "softmax-axis": Mistake("The softmax runs over the wrong axis: the weights of a query do not sum to 1; use dim=-1, "
                            "and keepdim=True in a sum of your own.", "0:54:42", AVERAGING),
    "no-sum": Mistake("The exponentials of the scores are never divided by their sum, so the weights of a query do not "
                      "sum to 1; divide by w.sum(dim=-1, keepdim=True).", "0:54:42", AVERAGING),
    "mask-side": Mistake("The mask hides the past and shows the future; keep the lower triangle (torch.tril).",
                         "0:54:42", AVERAGING),
    "mask-missing": Mistake("Nothing hides the future: {detail}; fill it with -inf before the softmax.", "0:54:42",
                            AVERAGING),
    "mask-after-softmax": Mistake("The mask comes after the softmax, so the rows do not sum to 1; mask the scores with "
                                  "-inf first.", "0:54:42", AVERAGING),
    "mask-diagonal": Mistake("The mask is off by one: {detail}; a position attends to itself and all before it.",
                             "0:54:42", AVERAGING),
    "tril-length": Mistake("The mask does not fit {detail}; make it block_size long and use tril[:T, :T].", "1:19:11",
                           HEAD),
    "heads-view": Mistake("The view that splits or merges the heads mixes positions; use view(B, T, n_head, head_size)"
                          ".transpose(1, 2), and transpose back before merging.", "1:21:59", HEADS),
    "loss-axis": Mistake("The cross-entropy runs over the wrong axis: it wants the classes in dimension 1; use "
                         "logits.view(B*T, C).", "0:22:11", BIGRAM),
    "targets-not-shifted": Mistake("The targets are not the next tokens: {detail}; use data[i+1:i+block_size+1].",
                                   "0:14:27", BIGRAM),
    "no-eval": Mistake("Dropout is active at evaluation: {detail}.", "1:37:49", DROPOUT),
    "positions-after": Mistake("The positions are added after the blocks, so attention cannot use them; add them to "
                               "the token embedding.", "1:00:18", AVERAGING),
    "no-positions": Mistake("No position reaches the model: equal tokens look alike everywhere; add a position "
                            "embedding.", "1:00:18", AVERAGING),
    "zero-grad": Mistake("The training loop does not clear the gradients before each backward pass; call "
                         "optimizer.zero_grad(set_to_none=True).", "0:34:53", BIGRAM),
    "no-residual": Mistake("A block does not add to its input: {detail}; write x = x + self.sa(self.ln1(x)).",
                           "1:26:48", RESIDUAL),
    "double-residual": Mistake("A block adds its input more than once: {detail}; write x = x + self.sa(self.ln1(x)).",
                               "1:26:48", RESIDUAL),
    "post-norm": Mistake("A norm comes after a part of the block; the lecture puts it before each part: "
                         "x = x + self.sa(self.ln1(x)).", "1:32:51", NORM),
    "no-crop": Mistake("Generation does not crop its context: {detail}; pass idx[:, -block_size:] to the model.",
                       "1:19:11", HEAD),
    "wrong-crop": Mistake("Generation crops to the wrong end: {detail}; use idx[:, -block_size:].", "1:19:11", HEAD),
    "wrong-position": Mistake("Generation samples from position {detail}; use logits[:, -1, :].", "0:22:11", BIGRAM),
    "plain-list": Mistake("Layers in a Python list are not registered, so the optimizer never sees them ({detail}); "
                          "use nn.ModuleList.", "1:21:59", HEADS),
    "shared-heads": Mistake("The same layer appears several times ({detail}), so its copies share weights; make each "
                            "with a comprehension: [Head(head_size) for _ in range(n)].", "1:21:59", HEADS),
    "softmax-before-loss": Mistake("The loss gets probabilities; F.cross_entropy wants logits, and applies softmax "
                                   "itself.", "0:22:11", BIGRAM),
    "leak": Mistake("The future leaks: {detail}.", "0:42:13", AVERAGING),
    "shape": Mistake("The output has the wrong shape: {detail}.", "0:22:11", BIGRAM),
    "not-a-number": Mistake("The output has values that are not numbers: {detail}.", "0:54:42", AVERAGING),
    "wrong-loss": Mistake("The loss is not the mean cross-entropy of the logits: {detail}.", "0:22:11", BIGRAM),
    "start-loss": Mistake("The loss at the start is {detail}; use smaller initial weights.", "0:22:11", BIGRAM),
    "dead-parameter": Mistake("No gradient reaches {detail}.", "0:34:53", BIGRAM),
    "linear-feed-forward": Mistake("The feed-forward layer has no nonlinearity; put nn.ReLU() between its layers.",
                                   "1:24:25", FEED),
    "mixes-positions": Mistake("The feed-forward layer mixes positions: {detail}.", "1:24:25", FEED),
    "ignores-source": Mistake("Cross-attention takes no keys and values from the other text.", "1:42:39", ENCODER),
    "does-not-learn": Mistake("The model does not learn: {detail}.", "0:34:53", BIGRAM),
    "same-output": Mistake("The model ignores its input: {detail}.", "0:22:11", BIGRAM),
    "exercise": Mistake("{detail}.", "", ""),  # of an exercise, whose minute and page follow it
}
"""The minutes are the chapters of the lecture's video, and its correction at 1:20:05."""

EXPLAINS = {
    "softmax-axis": {"not-a-number", "dead-parameter", "leak", "same-output", "mask-after-softmax"},
    "mask-side": {"leak", "not-a-number", "dead-parameter", "mask-diagonal"}, "mask-missing": {"leak"},
    "mask-after-softmax": {"leak"},
    "mask-diagonal": {"leak", "not-a-number", "dead-parameter"}, "heads-view": {"leak"},
    "no-positions": {"dead-parameter"}, "no-residual": {"dead-parameter"}, "double-residual": {"start-loss"},
    "ignores-source": {"dead-parameter", "mask-missing"}, "no-sum": {"start-loss", "not-a-number", "dead-parameter"},
    "softmax-before-loss": {"start-loss", "does-not-learn"}, "loss-axis": {"wrong-loss"},
    "plain-list": {"dead-parameter", "no-eval"},
}
"""Findings that another one of the same file explains."""

DETAIL = re.compile(r"[\w .,:;()\[\]'=<>+*@/-]{0,160}")
"""The form of a detail: the process that makes it ran somebody else's code."""


@dataclass(frozen=True)
class Finding:
    """A mistake in a learner's code. where: the class or function."""

    name: str
    where: str
    detail: str = ""

    def sentence(self) -> str:
        """Return the finding as a sentence, with the minute and the page."""
        mistake = MISTAKES[self.name]
        text = mistake.text.replace("{detail}", self.detail)
        if not mistake.page:
            return f"{self.where}: {text[0].upper()}{text[1:]}"
        page = mistake.page if not mistake.page[0].isdigit() else f"page {mistake.page}"
        return f"{self.where}: {text} Lecture {mistake.minute}; course: {page}."


def unexplained(findings: list[Finding], whole: set[str]) -> list[Finding]:
    """Return the findings that no other one explains. whole: models whose layers are tested again on their own."""
    explained = set().union(*(EXPLAINS.get(each.name, set()) for each in findings))
    in_layers = {each.name for each in findings if each.where not in whole}
    return [each for each in findings if each.name not in explained and not (
        each.name == "ignores-source" and each.where in whole and each.name in in_layers)]
