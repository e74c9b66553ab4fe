"""All tests of a learner's file, class by class: whole models first, then the parts that no model has used."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bardlet.errors import BardletError, is_out_of_memory, one_line
from bardlet.ladder.check import generation, learning, model, modules, script, translation, weights
from bardlet.ladder.check.attention import attentions
from bardlet.ladder.check.build import LENGTHS, Model, Part, TwoTexts, Untestable, build, embeds, part, stirred, width
from bardlet.ladder.check.guess import guess, seen_rung
from bardlet.ladder.check.load import Loaded, raised, supplies
from bardlet.ladder.check.mistakes import Finding, unexplained
from bardlet.ladder.check.sizes import SIZES
from bardlet.ladder.check.trace import Quiet, Trace, trace

Note = Callable[["Report"], None]
"""Called after each step, so that what was found survives the end of the process."""
LONG, SHORT = LENGTHS[0]
FEED_FORWARD = re.compile(r"(?i)feed|ffn?$|ffwd|mlp|fnn")
CROSS = re.compile(r"(?i)cross")


@dataclass
class Report:
    """Everything that check says about a file.

    passed: class -> what holds; untested: class -> the reason; doing: the current step, for a process that is ended.
    """

    rung: int = 0
    guessed: bool = False
    findings: list[Finding] = field(default_factory=list)
    passed: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    untested: dict[str, str] = field(default_factory=dict)
    doing: str = "reading the file"
    done: bool = False

    def add(self, findings: list[Finding]) -> bool:
        """Add new findings; return True if there was none."""
        for finding in findings:
            if not any((finding.name, finding.where) == (each.name, each.where) for each in self.findings):
                self.findings.append(finding)
        return not findings

    def holds(self, where: str, what: str) -> None:
        """Record a property that holds."""
        known = self.passed.setdefault(where, [])
        if what not in known:
            known.append(what)


class Examination:
    """The tests of one file."""

    def __init__(self, loaded: Loaded, rung: int | None, note: Note, until: float) -> None:
        self.loaded, self.note, self.until = loaded, note, until
        self.report = Report(rung or guess(loaded), rung is None)
        self.own = set(loaded.modules.values())
        self.covered: set[type] = set()
        self.translating: set[str] = set()
        self.has_dropout = False
        self.quiet = ExitStack()

    def step(self, doing: str) -> None:
        """Say what comes next."""
        self.report.doing = doing
        self.note(self.report)

    def run(self, only: str | None) -> Report:
        """Run every test, of one class or of all."""
        names = [only] if only else by_size(self.loaded)
        for name in names:
            cls = self.loaded.modules[name]
            if cls in self.covered:
                continue
            self.step(f"testing {name}")
            try:
                self.quiet.close()
                self.test(name)
            except Untestable as error:
                self.report.untested[name] = str(error)
            except RecursionError as error:
                self.report.untested[name] = one_line(error)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self.report.untested[name] = f"a test of it raises {raised(error)}"
        self.quiet.close()
        if not only:
            self.step("reading the training loop")
            self.report.add(script.findings(self.loaded.source, self.has_dropout))
            self.step("calling get_batch")
            self.report.add(script.batch_findings(self.loaded))
        self.report.findings = unexplained(self.report.findings, self.translating)
        self.report.done = True
        self.step("done")
        return self.report

    def test(self, name: str) -> None:
        """Test a class as a model if it embeds tokens, else as a layer; the other way if check cannot run it so.

        Raises:
            Untestable: neither way runs.
        """
        embedding = any(embeds(self.loaded.source.classes[each]) for each in parts(self.loaded)[name])
        first, second = (self.whole, self.part) if embedding else (self.part, self.whole)
        try:
            first(name)
        except Untestable as error:
            try:
                second(name)
            except Untestable:
                raise error from None

    # ------------------------------------------------------------------------------ models

    def whole(self, name: str) -> None:
        """Test a language model."""
        report, module = self.report, build(self.loaded, name)
        try:
            learner = Model(module)
        except TwoTexts:
            self.translation(name, module)
            return
        lists = modules.list_findings(module)
        model.fit(learner)
        for length in (learner.longest, learner.short):
            record, logits, found = model.run_once(name, learner, length, self.own)
            self.cover(record)
            if logits is None:
                report.add([*lists, *found])
                return
        if report.guessed:
            report.rung = seen_rung(record, module)
        report.add([*lists, *modules.mask_findings(module, learner.longest)])
        self.see(module)
        if logits is None or logits.shape[-1] == SIZES["n_embd"]:
            report.untested[name] = "it embeds tokens; check tests it within a model"
            return
        if report.add(model.start_findings(name, learner)):
            report.holds(name, "loss at the start")
        stirred(module)
        self.dropout(name, lambda: learner.logits(learner.ids(2, learner.short, 1)))
        self.structure(name, learner)
        self.step(f"testing the loss of {name}")
        known = {finding.name for finding in report.findings}
        if report.add(model.leak_findings(name, learner, known)) and not known & model.LEAKS:
            report.holds(name, "no leak")
        self.loss(name, learner)
        if report.add(model.gradient_findings(name, learner)):
            report.holds(name, "gradients")
        self.step(f"generating with {name}")
        found, note = generation.findings(name, self.loaded, learner)
        report.add(found)
        if " raises " in note:
            report.untested[f"{name}.generate"] = note.removeprefix("generation: ")
        elif note:
            report.notes.append(f"{name}: {note}")
        elif not found:
            report.holds(name, "generation")
        if (said := weights.comparison(learner)) and not report.findings:
            report.holds(name, said)
        self.learning(name, learner)

    def translation(self, name: str, module: nn.Module) -> None:
        """Test a model that translates; its layers are tested on their own."""
        self.see(module)
        self.translating.add(name)
        stirred(module)
        found, holds, note = translation.findings(name, module)
        self.report.add(found)
        for what in holds:
            self.report.holds(name, what)
        if note:
            self.report.notes.append(f"{name}: {note}")

    def loss(self, name: str, learner: Model) -> None:
        """Test the loss: that of the model, or of a function of the file."""
        if learner.takes_targets:
            found, unknown = model.loss_findings(name, learner)
            if self.report.add(found) and not unknown:
                self.report.holds(name, "loss")
        else:
            idx, y = (learner.ids(2, learner.short, seed) for seed in (3, 4))
            with torch.no_grad():
                logits = learner.logits(idx)
            found, unknown = script.loss_findings(self.loaded, learner.module, idx, y, logits)
            found += model.own_loss_findings(name, learner)
            self.report.add(found or script.softmax_findings(self.loaded.source.tree))
        if unknown and not found:
            self.report.notes.append(f"{name}: its loss is not tested: {unknown}")

    def structure(self, name: str, learner: Model) -> None:
        """Test attention, blocks, feed-forward layers and positions."""
        report, module = self.report, learner.module
        module.eval()
        self.step(f"testing the layers of {name}")
        record, logits, _ = model.run_once(name, learner, learner.short, self.own)
        assert logits is not None
        report.add(modules.finite(name, logits))
        if report.add(modules.attention_findings(record, self.own)) and attentions(record):
            report.holds(name, "attention")
        self.blocks(record)
        for visit in record.visits:
            kind = type(visit.module)
            if kind in self.own and FEED_FORWARD.search(kind.__name__) and len(visit.inputs) == 1:
                report.add(modules.feed_forward_findings(
                    kind.__name__, visit.module, visit.inputs[0].value.shape[-1]))
        attends = attentions(record) or model.is_opaque(record)
        if report.add(model.position_findings(name, learner)) and attends:
            report.holds(name, "positions")

    def learning(self, name: str, learner: Model) -> None:
        """Train the model, if nothing else was found: any mistake would show in its loss, too."""
        if self.report.findings:
            return
        self.step(f"training {name}")
        data = supplies(self.loaded.text)["train_data"]

        def make() -> Model:
            fresh = Model(build(self.loaded, name))
            fresh.shifts, fresh.own_loss = learner.shifts, learner.own_loss
            fresh.longest, fresh.vocab = learner.longest, learner.vocab
            return fresh

        try:
            found, said = learning.findings(name, make, data, self.report.rung, self.until)
        except learning.OutOfTime:
            self.report.notes.append(f"{name}: the time was too short to train it; raise --seconds")
            return
        if self.report.add(found):
            self.report.holds(name, said)

    # ------------------------------------------------------------------------------ parts

    def part(self, name: str) -> None:
        """Test a layer on its own: attention, a block, a feed-forward layer."""
        report, module = self.report, build(self.loaded, name)
        layer = part(module)
        report.add([*modules.list_findings(module), *modules.mask_findings(module, self.lengths(layer)[0])])
        self.see(module)
        stirred(module)
        longest, short = self.lengths(layer)
        for length in (longest, short):
            record, output = self.forward(name, layer, length)
            self.cover(record)
            if output is None:
                return
        self.dropout(name, lambda: layer(activations(layer, 2, short)))
        record, output = self.forward(name, layer, short)
        assert output is not None
        report.add(modules.finite(name, output))
        if not attentions(record) and not model.is_opaque(record):
            if FEED_FORWARD.search(name) and report.add(modules.feed_forward_findings(name, layer, width(module))):
                report.holds(name, "each position alone")
            return
        if report.guessed and report.rung < 3:  # a softmax that is written out
            report.rung = seen_rung(record, module)
        outside = layer.given_mask
        before = len(report.findings)
        report.add(modules.attention_findings(record, self.own | {type(module)}, masked_outside=outside))
        if layer.second:
            self.cross(name, layer)
        elif not outside and modules.is_causal((module,), {type(module)}):
            known = {finding.name for finding in report.findings}
            if not known & model.LEAKS:
                leaking = modules.leak(layer, activations(layer, 3, short), modules.changed)
                report.add([Finding(model.leak_name(record), name, leaking)]
                           if leaking else [])
        self.blocks(record)
        if len(report.findings) == before:
            report.holds(name, "attention")

    def lengths(self, layer: Part) -> tuple[int, int]:
        """Return two lengths of a context; shorter ones if the file fixes the length of its mask."""
        other = activations(layer, 3, 17) if layer.second else None
        with torch.no_grad(), trace() as record:
            try:
                layer(activations(layer, 3, LONG), other)
            except Exception:
                return LENGTHS[1] if model.has_fixed_mask(record) else LENGTHS[0]
        return LENGTHS[0]

    def forward(self, name: str, layer: Part, length: int) -> tuple[Trace, Tensor | None]:
        """Run a layer; a mask that does not fit is a finding."""
        other = activations(layer, 3, 17) if layer.second else None
        with torch.no_grad(), trace() as record:
            try:
                return record, layer(activations(layer, 3, length), other)
            except Untestable:
                raise
            except Exception as error:
                if model.mask_failed(record, length):
                    where = modules.class_of(record.failure.modules, self.own) if record.failure else name
                    detail = f"a context of {length} tokens, block_size is {LONG}"
                    self.report.add([Finding("tril-length", where or name, detail)])
                    return record, None
                raise Untestable(f"its forward raises {raised(error)}") from None

    def cross(self, name: str, layer: Part) -> None:
        """Test cross-attention: a row for each query, and an effect of the other text."""
        x, other = activations(layer, 2, SHORT), activations(layer, 2, 17)
        with torch.no_grad():
            output = layer(x, other)
            if output.shape[1] != SHORT:
                detail = f"{output.shape[1]} rows for {SHORT} queries and 17 keys"
                self.report.add([Finding("shape", name, detail)])
            elif (layer(x, other + 1) - output).abs().max() < 1e-6:
                self.report.add([Finding("ignores-source", name)])

    # ------------------------------------------------------------------------------ helpers

    def dropout(self, name: str, run: Callable[[], Tensor]) -> None:
        """Test that evaluation is without dropout; switch it off for the other tests if it is not."""
        if self.report.add(modules.dropout_findings(name, run)):
            self.report.holds(name, "evaluation without dropout")
        else:
            self.quiet.enter_context(Quiet())

    def blocks(self, record: Trace) -> None:
        """Test the residual path of blocks, if the rung has them."""
        if self.report.rung < 6:
            return
        visits = modules.blocks(record)
        if self.report.add(modules.block_findings(visits, self.own, norm=self.report.rung >= 7)):
            for visit in visits:
                if type(visit.module) in self.own:
                    self.report.holds(type(visit.module).__name__, "residual path")

    def see(self, module: nn.Module) -> None:
        """Note whether a module has dropout."""
        self.has_dropout = self.has_dropout or any(isinstance(each, nn.Dropout) for each in module.modules())

    def cover(self, record: Trace) -> None:
        """Mark the classes that a forward pass has used as tested."""
        self.covered |= {type(visit.module) for visit in record.visits}


def activations(layer: Part, rows: int, length: int) -> Tensor:
    """Return random activations: (rows, length, channels)."""
    generator = torch.Generator().manual_seed(length)
    return torch.randn(rows, length, width(layer.module), generator=generator)


def parts(loaded: Loaded) -> dict[str, set[str]]:
    """Return for each class the classes that it is made of, itself included."""
    uses = {name: {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} & loaded.modules.keys()
            for name, node in loaded.source.classes.items() if name in loaded.modules}
    reached: dict[str, set[str]] = {}
    for name in uses:
        reached[name], ahead = {name}, [name]
        while ahead:
            new = uses[ahead.pop()] - reached[name]
            reached[name] |= new
            ahead += new
    return reached


def by_size(loaded: Loaded) -> list[str]:
    """Return the classes of the file, those first that are made of the most others."""
    reached = parts(loaded)
    return sorted(reached, key=lambda name: (-len(reached[name]), not embeds(loaded.source.classes[name])))


def examine(loaded: Loaded, rung: int | None = None, only: str | None = None,
            note: Note = lambda report: None, until: float = math.inf) -> Report:
    """Return the report on a file, or on one of its classes. until: a time of time.monotonic; training ends then.

    Raises:
        BardletError: the file has no class to test, or not that one.
    """
    if only and only not in loaded.modules:
        reason = loaded.problems.get(only)
        names = ", ".join(loaded.modules) or "none"
        raise BardletError(f"{only}: {reason or f'no such class of PyTorch modules; the file has {names}'}")
    if not loaded.modules:
        problem = next((f" ({name}: {reason})" for name, reason in loaded.problems.items()), "")
        raise BardletError(f"no class of PyTorch modules was found{problem}; write Head, Block or a model as nn.Module")
    return Examination(loaded, rung, note, until).run(only)


def as_json(report: Report) -> dict[str, Any]:
    """Return a report as JSON values."""
    return {"rung": report.rung, "guessed": report.guessed, "done": report.done, "doing": report.doing,
            "findings": [vars(finding) for finding in report.findings], "passed": report.passed,
            "notes": report.notes, "untested": report.untested}
