"""The live parts of the course: the models that come with it, and the same numbers in the page as in torch."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from export.test_page import model_of

from bardlet import tokenizer as tk
from bardlet.errors import BardletError
from bardlet.export import html
from bardlet.inference import generate
from bardlet.ladder import pictures
from bardlet.ladder.rungs import LADDER, Rung
from bardlet.run import hf

DOCS = Path(__file__).parents[2] / "docs"
SMALL = [rung for rung in LADDER if not rung.scaled]
SENTENCE = "ROMEO: to be, or not"

sys.path.insert(0, str(DOCS))
course, diagrams, live, live_models = map(importlib.import_module, ("course", "diagrams", "live", "live_models"))
sys.path.remove(str(DOCS))


@pytest.fixture(autouse=True)
def no_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models that come with the course, whatever ladder this checkout has."""
    monkeypatch.setenv("BARDLET_LADDER", "")


def window(ids: list[int], t: int, context: int) -> torch.Tensor:
    """Return what a model sees at position t: a row with its last `context` tokens."""
    return torch.tensor([ids[max(0, t + 1 - context) : t + 1]])


def test_models_that_come_with_the_course_are_small_and_nearly_as_good_as_their_runs() -> None:
    """The seven files take less than 170 kB. 8 bits change the loss by less than 0.005 (measured: 0.001 at most)."""
    known = live_models.facts()
    assert set(known["rungs"]) == {rung.name for rung in SMALL} and len(known["characters"]) == 65
    assert sum(path.stat().st_size for path in live_models.FOLDER.glob("*.safetensors")) < 170_000
    for rung in SMALL:
        figures = known["rungs"][rung.name]
        assert abs(figures["val_loss_stored"] - figures["val_loss"]) < 0.005, rung.name


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_the_page_computes_what_torch_computes(tmp_path: Path) -> None:
    """Loss, weights of every head and logit lens at every position, the text, and temperatures: of all seven rungs."""
    for rung, got in zip(SMALL, in_node(tmp_path, SMALL), strict=True):
        compare(rung, got, *live_models.read(rung))


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_the_readers_own_model_computes_what_torch_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rung that does not come with the course, read from its run folder."""
    rung = next(rung for rung in LADDER if rung.name == "qk-norm")
    tokenizer = tk.train_char(live_models.facts()["characters"], False)
    model = model_of("qk-norm", 65)
    run = tmp_path / "11-qk-norm" / "seed-1337"
    run.mkdir(parents=True)
    hf.write_folder(run, model, tokenizer)
    hf.write_weights(run, model.hf_state_dict())
    (run / "outcome.json").write_text(json.dumps({"val_loss": 1.25, "seed": 1337, "made": {"date": "2026-01-02"}}))
    monkeypatch.setenv("BARDLET_LADDER", str(tmp_path))
    got = in_node(tmp_path, [rung])[0]
    assert got["about"]["origin"].startswith("This is your own rung 11, trained on 2026-01-02; validation loss 1.250")
    compare(rung, got, model, tokenizer)


def in_node(folder: Path, rungs: list[Rung]) -> list[dict[str, Any]]:
    """Return what the page computes of SENTENCE and a character that no model knows, for each rung."""
    for rung in rungs:
        (folder / f"{rung.name}.js").write_text(live.model_script(rung), encoding="utf-8")
    command = ["node", str(Path(__file__).with_name("lesson.mjs")), str(folder), *(rung.name for rung in rungs)]
    done = subprocess.run(command, input=json.dumps({"sentence": SENTENCE + "€"}), capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return list(json.loads(done.stdout).values())


@torch.inference_mode()
def compare(rung: Rung, got: dict[str, Any], model: Any, tokenizer: tk.Tokenizer) -> None:
    """Compare the numbers of a page with those of torch."""
    for parameter in model.parameters():
        parameter.copy_(html.rounded(parameter, "int8"))
    ids, T = tokenizer.encode(SENTENCE).tolist(), model.config.block_size
    assert got["ids"] == ids and got["unknown"] == ["€"] and len(got["steps"]) == len(ids) > T
    logits = torch.stack([model(window(ids, t, T))[0, -1] for t in range(len(ids))])
    torch.testing.assert_close(torch.tensor([step["logits"] for step in got["steps"]]), logits, atol=2e-4, rtol=1e-4)
    assert got["loss"] == pytest.approx(F.cross_entropy(logits[:-1], torch.tensor(ids[1:])).item(), abs=1e-4)
    for t, step in enumerate(got["steps"]):
        seen = window(ids, t, T)
        assert step["start"] == t + 1 - seen.shape[1]
        heads = [row for block in step["heads"] for row in block]
        if rung.name == "averaging":
            assert heads == [pytest.approx([1 / seen.shape[1]] * seen.shape[1])]
        else:
            maps = pictures.attention(model, seen[0]) if rung.attends else []
            expected = [weights[-1] for _, weights_HTT in maps for weights in weights_HTT]
            assert len(heads) == len(expected)
            for row, weights in zip(heads, expected, strict=True):
                assert row == pytest.approx(weights.tolist(), abs=1e-5)
        if hasattr(model, "blocks"):
            assert len(step["lens"]) == model.config.n_layer + 1
            torch.testing.assert_close(torch.tensor(step["lens"]), lens(model, seen), atol=2e-4, rtol=1e-4)
    assert got["greedy"] == tokenizer.decode(generate.generate(model, [ids], 40, temperature=0)[0])
    assert got["sampled"][0] == got["sampled"][1] != got["sampled"][2]
    for temperature, p in zip((0, 0.5, 2), got["temperatures"], strict=True):
        last = logits[-1]
        softmax = F.softmax(last / temperature, -1) if temperature else F.one_hot(last.argmax(), 65).float()
        assert p == pytest.approx(softmax.tolist(), abs=1e-4)
    entropy = -(F.softmax(logits[-1], -1) * F.log_softmax(logits[-1], -1)).sum().item()
    assert got["perplexity"] == pytest.approx(math.exp(entropy), rel=1e-3)


def lens(model: Any, seen: torch.Tensor) -> torch.Tensor:
    """Return the logits of the last position after the embedding and after each block: (1 + blocks, V)."""
    x = model.token_embedding_table(seen)
    if hasattr(model, "position_embedding_table"):
        x = x + model.position_embedding_table(torch.arange(seen.shape[1]))
    stream = itertools.accumulate(model.blocks, lambda x, block: block(x), initial=x)
    norm = getattr(model, "ln_f", lambda x: x)
    return torch.stack([model.lm_head(norm(x))[0, -1] for x in stream])


def test_the_readers_own_ladder_replaces_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its finished rungs only; a rung that only the reader can train is named until then."""
    pages = course.Course(DOCS, {}, {})
    assert "`bardlet ladder --rungs 9`" in live.live(pages, "rung 9 | attention lens", "rungs/a.md")
    assert "comes with the course" in live.origin(SMALL[2])
    assert live.origins(SMALL).startswith("These rungs come with the course")
    for rung, finished in ((LADDER[2], True), (LADDER[3], False), (LADDER[8], True)):
        run = tmp_path / f"{rung.number:02}-{rung.name}" / "seed-1337"
        run.mkdir(parents=True)
        if finished:
            outcome = {"val_loss": 1.25, "seed": 1337, "made": {"date": "2026-01-02"}}
            (run / "outcome.json").write_text(json.dumps(outcome))
    monkeypatch.setenv("BARDLET_LADDER", str(tmp_path))
    own = "This is your own rung 3, trained on 2026-01-02; validation loss 1.250 nats per token."
    assert live.origin(LADDER[2]) == own
    assert "comes with the course" in live.origin(LADDER[3])
    assert 'data-rungs="rotary"' in live.live(pages, "rung 9 | attention lens", "rungs/a.md")
    assert "Your own models: rungs 3, 9, trained on 2026-01-02. The others" in live.origins(live.available())
    monkeypatch.setenv("BARDLET_LADDER", str(tmp_path / "nothing"))
    with pytest.raises(BardletError, match="no such folder; name the folder of a bardlet ladder"):
        live.available()


def test_a_page_loads_each_script_once() -> None:
    pages = course.Course(DOCS, {}, {})
    parts = [live.live(pages, argument, "rungs/a.md") for argument in ("rung 3 | attention", "all | compare")]
    content = live.with_scripts("\n".join(parts), "rungs/a.md")
    names = [*dict.fromkeys(["one-head", *(rung.name for rung in SMALL)]), "lesson"]
    assert content.count("<script") == len(names) and all(f'"../live/{name}.js"' in content for name in names)
    assert content.rstrip().endswith('<script src="../live/lesson.js"></script>')
    assert live.with_scripts("<p>No live part</p>", "a.md") == "<p>No live part</p>"
    for wrong in ("rung 3", "rung 3 | nothing"):
        with pytest.raises(BardletError, match="choose what the live part shows"):
            live.live(pages, wrong, "a.md")


def test_the_script_has_all_modules_and_no_import() -> None:
    script = live.lesson_script()
    assert "\nimport " not in script and "\nexport " not in script
    assert "class Model" in script and "class Live" in script


@pytest.mark.parametrize("name", ["block", "masks", "pipeline"])
def test_diagrams_are_as_their_code_draws_them(name: str) -> None:
    assert (DOCS / "diagrams" / f"{name}.svg").read_text(encoding="utf-8") == diagrams.DIAGRAMS[name]()
    pages = course.Course(DOCS, {}, {})
    assert 'aria-label="A &quot;thing&quot;"' in diagrams.diagram(pages, f'{name} | A "thing"', "a.md")
    with pytest.raises(BardletError, match="describe the diagram"):
        diagrams.diagram(pages, name, "a.md")
