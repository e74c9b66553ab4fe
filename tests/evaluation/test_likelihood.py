"""Task accuracy: likelihoods by hand, models with a known answer, truncation, skipped questions, and the command."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from torch import nn

from bardlet import tokenizer as tk
from bardlet.cli import main
from bardlet.config.model import ModelConfig
from bardlet.config.pretraining import TrainConfig
from bardlet.data import chat_template
from bardlet.errors import BardletError
from bardlet.evaluation import likelihood, tasks
from bardlet.evaluation.tasks import Record
from bardlet.models import build
from bardlet.models.base import LanguageModel, LectureModel
from bardlet.run import hf

CPU = torch.device("cpu")
LETTERS = tk.train_char("abcdefghijklmnopqrstuvwxyz .=+0123456789\n:", separator=False)
V, BLOCK = LETTERS.vocab_size, 12


@pytest.fixture(params=["gpt2", "qwen3", "one-head", "swiglu"])
def model(request: pytest.FixtureRequest) -> Any:
    """A small model or lecture model with weights large enough that every token matters."""
    torch.manual_seed(0)
    config = TrainConfig(model=request.param, n_layer=2, n_head=2, n_embd=16, block_size=BLOCK).model_config(V)
    model = build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@torch.no_grad()
def by_hand(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Sum log p token by token, each given the context that fits in the window."""
    ids, total, greedy = [*context, *continuation][-(BLOCK + 1) :], 0.0, True
    for t in range(len(ids) - len(continuation), len(ids)):
        logits_V = model(torch.tensor([ids[:t]]))[0, -1].double()
        total += float(logits_V.log_softmax(-1)[ids[t]])
        greedy = greedy and int(logits_V.argmax()) == ids[t]
    return total, greedy


def pairs_of(lengths: list[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    torch.manual_seed(1)
    return [(torch.randint(V, (a,)).tolist(), torch.randint(V, (b,)).tolist()) for a, b in lengths]


# --------------------------------------------------------------------------------- likelihood

LENGTHS = [(1, 1), (3, 2), (8, 4), (1, BLOCK), (5, 7), (BLOCK, 1), (20, 3), (30, BLOCK), (2, 9)]


def test_log_likelihoods_match_by_hand(model: Any) -> None:
    """Short and truncated contexts, batched and alone, to 1e-5."""
    pairs = pairs_of(LENGTHS)
    together = likelihood.log_likelihoods(model, pairs, CPU)
    alone = [likelihood.log_likelihoods(model, [pair], CPU)[0] for pair in pairs]
    want = [by_hand(model, *pair) for pair in pairs]
    for results in (together, alone):
        assert [logp for logp, _ in results] == pytest.approx([logp for logp, _ in want], abs=1e-5, rel=1e-5)
        assert [greedy for _, greedy in results] == [greedy for _, greedy in want]


def test_batching_changes_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows at a time: same results in the order of the pairs, and progress up to the total."""
    pairs, calls = pairs_of(LENGTHS), []
    whole = likelihood.log_likelihoods(model, pairs, CPU)
    monkeypatch.setattr(likelihood, "rows_at_once", lambda *_: 2)
    model.train()
    batched = likelihood.log_likelihoods(model, pairs, CPU, progress=lambda *call: calls.append(call))
    assert model.training, "its mode is restored"
    assert [logp for logp, _ in batched] == pytest.approx([logp for logp, _ in whole], abs=1e-5)
    assert calls == [(2, 9), (4, 9), (6, 9), (8, 9), (9, 9)]


def test_greedy_is_true_for_the_greedy_continuation_only(model: Any) -> None:
    context = [1, 2, 3]
    with torch.no_grad():
        first = int(model(torch.tensor([context]))[0, -1].argmax())
        second = int(model(torch.tensor([[*context, first]]))[0, -1].argmax())
    other = (second + 1) % V
    pairs = [(context, [first, second]), (context, [first, other]), (context, [(first + 1) % V, second])]
    assert [greedy for _, greedy in likelihood.log_likelihoods(model, pairs, CPU)] == [True, False, False]


def test_continuations_of_one_token_share_a_row() -> None:
    """Four letters after one context are one row; the head is applied at scored positions only."""
    seen: list[tuple[int, ...]] = []

    class Spy(LanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.config = ModelConfig("gpt2", vocab_size=V, block_size=BLOCK)

        def hidden(self, idx_BT: torch.Tensor, *_: Any) -> torch.Tensor:
            seen.append(tuple(idx_BT.shape))
            return torch.zeros(*idx_BT.shape, 1)

        def logits(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(x.shape))
            return torch.zeros(len(x), V)

    pairs = [([1, 2, 3], [letter]) for letter in (5, 6, 7, 8)] + [([1, 2], [3, 5])]
    results = likelihood.log_likelihoods(Spy(), pairs, CPU)
    assert seen == [(1, 3), (2, 1)]  # the shared row, then the other; 2 scored positions + 1
    assert [logp for logp, _ in results] == pytest.approx([-math.log(V)] * 4 + [-2 * math.log(V)])


def test_invalid_pairs_raise(model: Any) -> None:
    for pair in (([], [1]), ([1], [1] * (BLOCK + 1))):
        with pytest.raises(ValueError, match="pair 0"):
            likelihood.log_likelihoods(model, [pair], CPU)


def test_context_and_continuation_are_encoded_together() -> None:
    """White space between them belongs to the continuation; together they are the ids of the whole text."""
    tokenizer = tk.train_bpe(["what is the answer? the answer is no. " * 40], 330)
    for between in ("", " ", " \n"):
        context, continuation = f"what is{between}", " the answer"
        context_ids, ids = likelihood.encode_pair(tokenizer, context, continuation)
        assert [*context_ids, *ids] == tokenizer.encode(context + continuation).tolist()
        assert tokenizer.decode(context_ids) == "what is" and tokenizer.decode(ids) == context[7:] + continuation
    assert likelihood.encode_pair(tokenizer, "", " no") == ([tokenizer.eos_id], tokenizer.encode(" no").tolist())
    assert likelihood.encode_pair(LETTERS, "", "no") == (LETTERS.encode("\n").tolist(), LETTERS.encode("no").tolist())


# --------------------------------------------------------------------------------- tasks


class Follows(LectureModel):
    """A bigram model: each character of `order` is followed by the next one, with logit `strength`."""

    def __init__(self, order: str, strength: float = 5.0, block_size: int = 64) -> None:
        super().__init__(ModelConfig("bigram", vocab_size=V, block_size=block_size))
        table_VV = torch.zeros(V, V)
        ids = LETTERS.encode(order).tolist()
        for current, following in itertools.pairwise(ids):
            table_VV[current, following] = strength
        self.table_VV = nn.Parameter(table_VV)

    def logits(self, idx: torch.Tensor) -> torch.Tensor:
        return self.table_VV[idx]


def choice(*continuations: str, gold: int, context: str = "it is") -> Record:
    return Record(tuple((context, f" {text}") for text in continuations), gold)


def test_the_likeliest_choice_wins() -> None:
    """" abc" is likely after "it is": a question is answered correctly if that is gold, at any index."""
    model = Follows(" abcdefgh")
    questions = [choice("abc", "cba", gold=0), choice("cab", "bca", "abc", gold=2), choice("cba", "abc", gold=0)]
    result = likelihood.TaskEvaluator(model, LETTERS, CPU).measure("copa", questions)
    assert (result.acc, result.acc_norm, result.records) == (2 / 3, 2 / 3, 3)
    assert result.stderr == pytest.approx(math.sqrt(2 / 9 / 2))
    assert result.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3) and result.always is None
    assert (result.cut, result.too_long, result.unseen) == (0, 0, 0)
    single = likelihood.TaskEvaluator(model, LETTERS, CPU).measure("copa", questions[:1])
    assert single.acc == 1 and single.stderr is None


def test_acc_norm_divides_by_the_length() -> None:
    """log p is a sum, so "zz" is likelier than "abcdefgh"; per character the long choice is."""
    evaluator = likelihood.TaskEvaluator(Follows("abcdefgh", 3.0), LETTERS, CPU)
    result = evaluator.measure("copa", [choice("zz", "abcdefgh", gold=1)])
    assert (result.acc, result.acc_norm) == (0, 1)


def test_the_context_that_makes_the_continuation_likelier_wins() -> None:
    questions = [Record((("so a", "bc"), ("so z", "bc")), 0), Record((("so z", "bc"), ("so a", "bc")), 1)]
    result = likelihood.TaskEvaluator(Follows("abc"), LETTERS, CPU).measure("winogrande", questions)
    assert result.acc == 1 and result.acc_norm is None and result.chance == 0.5


def test_label_tasks_report_the_majority_accuracy() -> None:
    questions = [choice("no", "yes", gold=gold) for gold in (1, 1, 1, 0)]
    result = likelihood.TaskEvaluator(Follows(" yes"), LETTERS, CPU).measure("boolq", questions)
    assert (result.acc, result.always, result.chance, result.acc_norm) == (0.75, 0.75, 0.5, None)


def test_the_last_word_must_be_the_greedy_continuation() -> None:
    model = Follows("s abc.")
    questions = [Record((("it is", " abc"),)), Record((("it is", " abd"),))]
    result = likelihood.TaskEvaluator(model, LETTERS, CPU).measure("lambada", questions)
    with torch.no_grad():
        logp = [sum(model.table_VV.log_softmax(-1)[a, b].item() for a, b in itertools.pairwise(ids))
                for ids in ([LETTERS.vocab["s"], *LETTERS.encode(text).tolist()] for text in (" abc", " abd"))]
    assert result.acc == 0.5 and result.perplexity == pytest.approx(math.exp(-sum(logp) / 2), rel=1e-5)
    assert result.chance == 0 and result.acc_norm is None


def test_truncated_and_skipped_questions_are_counted() -> None:
    """A window of 8: long questions lose their beginning; a choice of 9 tokens and unseen characters are skipped."""
    model = Follows(" abcdefgh", block_size=8)
    questions = [choice("a", "b", gold=0), choice("a", "b", gold=0, context="this is a long story, is it"),
             choice("abcdefgh", "b", gold=0), choice("a", "é", gold=0), choice("a", "b", gold=0, context="é")]
    known = [record for record in questions if "," not in record.options[0][0]]
    result = likelihood.TaskEvaluator(model, LETTERS, CPU).measure("copa", known)
    assert (result.records, result.cut, result.too_long, result.unseen) == (1, 0, 1, 2)
    long = choice("a", "b", gold=0, context="this is a long story")
    result = likelihood.TaskEvaluator(model, LETTERS, CPU).measure("copa", [long])
    assert (result.records, result.cut, result.acc) == (1, 1, 1)
    with pytest.raises(BardletError, match=r"no question is left: 2 .* does not know, 1 exceed the model.s window"):
        likelihood.TaskEvaluator(model, LETTERS, CPU).measure("copa", [*known[1:]])


@pytest.mark.parametrize(("text", "marker", "number"), [
    ("-734\n17*", "", "-734"), (" 1598", "", "1598"), ("about 3", "", None), ("", "", None), ("1,000 and", "", "1000"),
    ("so 3 is\n#### 18", "####", "18"), ("####$1,234.50.", "####", "1234.50"), ("it is 18", "####", None),
    ("#### 4 #### 5", "####", "4"), ("#### four", "####", None),
])  # fmt: skip
def test_number_after(text: str, marker: str, number: str | None) -> None:
    assert likelihood.number_after(text, marker) == number


@pytest.mark.parametrize(("text", "number"), [("first 3, then 18.", "18"), ("$1,200 a year", "1200"), ("none", None),
                                              ("it is -5", "-5"), ("2.5%", "2.5")])  # fmt: skip
def test_last_number(text: str, number: str | None) -> None:
    assert likelihood.last_number(text) == number


def test_a_generated_number_must_match_as_a_whole() -> None:
    """After "=" the model generates 7 and a line break; only the whole number counts, not its first digit."""
    sums = (("3+4=", "7"), ("3+5=", "8"), ("35+36=", "71"), ("é=", "7"))
    questions = [Record((question,)) for question in sums]
    result = likelihood.TaskEvaluator(Follows("=7\n\n"), LETTERS, CPU).measure("arithmetic", questions)
    assert (result.acc, result.records, result.unseen, result.acc_last) == (1 / 3, 3, 1, None)
    other = likelihood.TaskEvaluator(Follows("=71\n\n"), LETTERS, CPU).measure("arithmetic", questions[:1])
    assert other.acc == 0, "71 starts with 7 but is another number"


def test_each_prompt_gets_its_own_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time, short prompts first; a prompt longer than the window is truncated to leave room."""
    model = Follows("abcdefgh", block_size=8)
    monkeypatch.setattr(likelihood, "ROWS", 2)
    prompts = [LETTERS.encode(text).tolist() for text in ("xyzxyzxyzd", "a", "xxb", "xa", "c")]
    assert likelihood.generate_answers(model, LETTERS, prompts, 3) == ["efg", "bcd", "cde", "bcd", "def"]
    until_e = likelihood.generate_answers(model, LETTERS, prompts, 99, stop_ids=[LETTERS.vocab["e"]])
    assert until_e == ["e", "bcde", "cde", "bcde", "de"]
    assert likelihood.generate_answers(model, LETTERS, prompts[1:2], 99) == ["bcde"], "at most half of the window"


def test_word_problems_stop_before_the_next_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """acc is the number after ####; acc_last is the last number."""
    texts = [" 9 + 9 = 18\n#### 18\nQuestion: and 7?", " it is 18", " none"]
    monkeypatch.setattr(likelihood, "generate_answers", lambda *_, **__: texts)
    questions = [Record((("question:", "18"),))] * 3
    result = likelihood.TaskEvaluator(Follows("ab"), LETTERS, CPU).measure("gsm8k", questions)
    assert result.acc == pytest.approx(1 / 3) and result.acc_last == pytest.approx(2 / 3)


# --------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(["train", str(text), "--out", str(out), *TINY, "--steps", "3", "--block-size", "48"]) == 0
    return out


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$BARDLET_DATA with a few questions of two tasks, one with unseen characters."""
    monkeypatch.setenv("BARDLET_DATA", str(tmp_path / "data"))
    choices = [{"query": f"the {n} little", "choices": ["bards", "songs"], "gold": 0} for n in range(20)]
    choices[3]["query"] = "日本"
    sums = [{"context": f"{n} sang ", "continuation": f"{n * n % 97}"} for n in range(8)]
    for name, values in (("copa", choices), ("arithmetic", sums)):
        path = tmp_path / "data" / tasks.TASKS[name].file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("".join(json.dumps(value) + "\n" for value in values).encode()))
    return tmp_path / "data"


def test_the_command_prints_each_task(run: Path, data: Path, bardlet: Callable[..., dict[str, Any]],
                                      capsys: pytest.CaptureFixture[str]) -> None:
    output = bardlet("eval", run, "--task", "copa", "arithmetic")
    assert set(output) == {"run", "tasks"} and list(output["tasks"]) == ["copa", "arithmetic"]
    copa = output["tasks"]["copa"]
    assert copa["records"] == 19 and copa["unseen"] == 1 and copa["chance"] == 0.5 and copa["form"] == "plain text"
    assert set(copa) == {*likelihood.Result.__dataclass_fields__, "form", "seconds"}
    assert bardlet("eval", run, "--task", "copa", "--limit", "4")["tasks"]["copa"]["records"] == 4
    assert main(["eval", str(run), "--task", "copa"]) == 0
    printed = capsys.readouterr().out
    assert f"copa: acc {100 * copa['acc']:.1f} % ± {100 * copa['stderr']:.1f}, acc_norm" in printed
    assert "chance 50.0 % (19 questions as plain text" in printed
    assert "note: 1 question with characters that the tokenizer does not know: left out" in printed


def test_a_chat_model_is_asked_in_its_template(data: Path, tmp_path: Path,
                                               bardlet: Callable[..., dict[str, Any]]) -> None:
    """Numbers in the chat template, choices as plain text; a question without room for an answer is skipped."""
    tokenizer = tk.train_bpe(["who sang the songs of the little bards, and how many? " * 40], 330)
    tokenizer.chat_template = chat_template.TEMPLATE
    torch.manual_seed(0)
    model = build(TrainConfig(model="qwen3", n_layer=1, n_head=2, n_embd=32, block_size=48).model_config(330))
    (tmp_path / "chat").mkdir()
    hf.write_folder(tmp_path / "chat", model, tokenizer)
    hf.write_weights(tmp_path / "chat", model.hf_state_dict())
    results = bardlet("eval", tmp_path / "chat", "--task", "copa", "arithmetic")["tasks"]
    assert results["copa"]["form"] == "plain text" and results["arithmetic"]["form"] == "chat template"
    assert results["arithmetic"]["acc_last"] is not None and results["arithmetic"]["records"] == 8

    seen: list[str] = []

    def ask(text: str) -> list[int]:
        seen.append(text)
        return [1] * len(text)

    chat_format = likelihood.ChatFormat(ask, [0])
    questions = [Record((("1+1=", "2"),), question=question) for question in ("1+1=", "1" * 40)]
    evaluator = likelihood.TaskEvaluator(model, tokenizer, CPU, chat_format=chat_format)
    result = evaluator.measure("arithmetic", questions)
    assert seen == ["1+1=", "1" * 40] and (result.records, result.too_long) == (1, 1)


def test_a_model_that_translates_is_refused(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("one two\nthree four\nfive six\nseven eight\nnine ten\n" * 5, encoding="utf-8")
    out = tmp_path / "run"
    assert main(["train", "--source", str(tmp_path / "a"), "--target", str(tmp_path / "b"), "--out", str(out),
                 "--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--steps", "1", "--dtype", "fp32", "--compile",
                 "off", "--vocab-size", "280", "--debug"]) == 0  # fmt: skip
    capsys.readouterr()
    assert main(["eval", str(out), "--task", "copa"]) == 1
    assert "this model translates" in capsys.readouterr().err
