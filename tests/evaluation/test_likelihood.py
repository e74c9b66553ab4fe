"""Questions with a known answer: likelihoods by hand, answers that must win, and what is cut, left out and said."""

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
    """A small model, or a rung, whose weights are large enough that every token matters."""
    torch.manual_seed(0)
    config = TrainConfig(model=request.param, n_layer=2, n_head=2, n_embd=16, block_size=BLOCK).model_config(V)
    made = build(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


@torch.no_grad()
def by_hand(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """log p of each token, given all before it that fit into the window, one at a time."""
    ids, total, greedy = [*context, *continuation][-(BLOCK + 1) :], 0.0, True
    for place in range(len(ids) - len(continuation), len(ids)):
        logits_V = model(torch.tensor([ids[:place]]))[0, -1].double()
        total += float(logits_V.log_softmax(-1)[ids[place]])
        greedy = greedy and int(logits_V.argmax()) == ids[place]
    return total, greedy


def pairs_of(lengths: list[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    torch.manual_seed(1)
    return [(torch.randint(V, (a,)).tolist(), torch.randint(V, (b,)).tolist()) for a, b in lengths]


# --------------------------------------------------------------------------------- likelihood

LENGTHS = [(1, 1), (3, 2), (8, 4), (1, BLOCK), (5, 7), (BLOCK, 1), (20, 3), (30, BLOCK), (2, 9)]


def test_log_likelihoods_are_those_by_hand(model: Any) -> None:
    """Short contexts and such as lose their beginning, in one batch and alone: 1e-5."""
    pairs = pairs_of(LENGTHS)
    together = likelihood.log_likelihoods(model, pairs, CPU)
    alone = [likelihood.log_likelihoods(model, [pair], CPU)[0] for pair in pairs]
    want = [by_hand(model, *pair) for pair in pairs]
    for found in (together, alone):
        assert [logp for logp, _ in found] == pytest.approx([logp for logp, _ in want], abs=1e-5, rel=1e-5)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in want]


def test_many_batches_are_one(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows at a time: the same figures in the order of the pairs, and progress up to all of them."""
    pairs, told = pairs_of(LENGTHS), []
    whole = likelihood.log_likelihoods(model, pairs, CPU)
    monkeypatch.setattr(likelihood, "rows_at_once", lambda *_: 2)
    model.train()
    pieces = likelihood.log_likelihoods(model, pairs, CPU, progress=lambda done, of: told.append((done, of)))
    assert model.training, "the mode it was in"
    assert [logp for logp, _ in pieces] == pytest.approx([logp for logp, _ in whole], abs=1e-5)
    assert told == [(2, 9), (4, 9), (6, 9), (8, 9), (9, 9)]


def test_what_the_model_would_write_is_greedy(model: Any) -> None:
    context = [1, 2, 3]
    with torch.no_grad():
        first = int(model(torch.tensor([context]))[0, -1].argmax())
        second = int(model(torch.tensor([[*context, first]]))[0, -1].argmax())
    other = (second + 1) % V
    pairs = [(context, [first, second]), (context, [first, other]), (context, [(first + 1) % V, second])]
    assert [greedy for _, greedy in likelihood.log_likelihoods(model, pairs, CPU)] == [True, False, False]


def test_continuations_of_one_token_share_a_row() -> None:
    """Four letters behind one context are one row; the head is computed at its end alone."""
    seen: list[tuple[int, ...]] = []

    class Looks(LanguageModel):
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
    found = likelihood.log_likelihoods(Looks(), pairs, CPU)
    assert seen == [(1, 3), (2, 1)]  # [1, 2, 3] once, for one token behind it, and for two
    assert [logp for logp, _ in found] == pytest.approx([-math.log(V)] * 4 + [-2 * math.log(V)])


def test_a_pair_that_cannot_be_is_an_error(model: Any) -> None:
    for pair in (([], [1]), ([1], [1] * (BLOCK + 1))):
        with pytest.raises(ValueError, match="pair 0"):
            likelihood.log_likelihoods(model, [pair], CPU)


def test_a_context_and_its_continuation_are_encoded_together() -> None:
    """White space in between belongs to the continuation; both are the ids of the whole."""
    tokenizer = tk.train_bpe(["what is the answer? the answer is no. " * 40], 330)
    for between in ("", " ", " \n"):
        context, continuation = f"what is{between}", " the answer"
        before, behind = likelihood.encode_pair(tokenizer, context, continuation)
        assert [*before, *behind] == tokenizer.encode(context + continuation).tolist()
        assert tokenizer.decode(before) == "what is" and tokenizer.decode(behind) == context[7:] + continuation
    assert likelihood.encode_pair(tokenizer, "", " no") == ([tokenizer.eos_id], tokenizer.encode(" no").tolist())
    assert likelihood.encode_pair(LETTERS, "", "no") == (LETTERS.encode("\n").tolist(), LETTERS.encode("no").tolist())


# --------------------------------------------------------------------------------- a task


class Follows(LectureModel):
    """After each character of `order` the next one is likely by `strength`, whatever was before."""

    def __init__(self, order: str, strength: float = 5.0, block_size: int = 64) -> None:
        super().__init__(ModelConfig("bigram", vocab_size=V, block_size=block_size))
        table_VV = torch.zeros(V, V)
        ids = LETTERS.encode(order).tolist()
        for one, following in itertools.pairwise(ids):
            table_VV[one, following] = strength
        self.table_VV = nn.Parameter(table_VV)

    def logits(self, idx: torch.Tensor) -> torch.Tensor:
        return self.table_VV[idx]


def choice(*continuations: str, gold: int, context: str = "it is") -> Record:
    return Record(tuple((context, f" {text}") for text in continuations), gold)


def test_a_choice_that_is_known_wins() -> None:
    """" abc" is likely after "it is", so a question is right where that is gold, wherever it stands."""
    model = Follows(" abcdefgh")
    asked = [choice("abc", "cba", gold=0), choice("cab", "bca", "abc", gold=2), choice("cba", "abc", gold=0)]
    result = likelihood.TaskEvaluator(model, LETTERS, CPU).measure("copa", asked)
    assert (result.acc, result.acc_norm, result.records) == (2 / 3, 2 / 3, 3)
    assert result.stderr == pytest.approx(math.sqrt(2 / 9 / 2))
    assert result.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3) and result.always is None
    assert (result.cut, result.too_long, result.unseen) == (0, 0, 0)
    single = likelihood.TaskEvaluator(model, LETTERS, CPU).measure("copa", asked[:1])
    assert single.acc == 1 and single.stderr is None


def test_a_long_choice_wins_by_its_length_only() -> None:
    """log p is a sum, so "zz" is likelier than "abcdefgh"; for each character the long one is."""
    asker = likelihood.TaskEvaluator(Follows("abcdefgh", 3.0), LETTERS, CPU)
    result = asker.measure("copa", [choice("zz", "abcdefgh", gold=1)])
    assert (result.acc, result.acc_norm) == (0, 1)


def test_of_two_contexts_the_one_that_explains_the_end() -> None:
    asked = [Record((("so a", "bc"), ("so z", "bc")), 0), Record((("so z", "bc"), ("so a", "bc")), 1)]
    result = likelihood.TaskEvaluator(Follows("abc"), LETTERS, CPU).measure("winogrande", asked)
    assert result.acc == 1 and result.acc_norm is None and result.chance == 0.5


def test_labels_have_the_most_frequent_answer_beside_them() -> None:
    asked = [choice("no", "yes", gold=gold) for gold in (1, 1, 1, 0)]
    result = likelihood.TaskEvaluator(Follows(" yes"), LETTERS, CPU).measure("boolq", asked)
    assert (result.acc, result.always, result.chance, result.acc_norm) == (0.75, 0.75, 0.5, None)


def test_the_last_word_must_be_what_the_model_writes() -> None:
    model = Follows("s abc.")
    asked = [Record((("it is", " abc"),)), Record((("it is", " abd"),))]
    result = likelihood.TaskEvaluator(model, LETTERS, CPU).measure("lambada", asked)
    with torch.no_grad():
        logp = [sum(model.table_VV.log_softmax(-1)[a, b].item() for a, b in itertools.pairwise(ids))
                for ids in ([LETTERS.vocab["s"], *LETTERS.encode(text).tolist()] for text in (" abc", " abd"))]
    assert result.acc == 0.5 and result.perplexity == pytest.approx(math.exp(-sum(logp) / 2), rel=1e-5)
    assert result.chance == 0 and result.acc_norm is None


def test_what_is_cut_and_left_out_is_counted() -> None:
    """A window of 8: long questions lose their beginning; a choice of 9 tokens, and unseen characters, are left out."""
    model = Follows(" abcdefgh", block_size=8)
    asked = [choice("a", "b", gold=0), choice("a", "b", gold=0, context="this is a long story, is it"),
             choice("abcdefgh", "b", gold=0), choice("a", "é", gold=0), choice("a", "b", gold=0, context="é")]
    known = [one for one in asked if "," not in one.options[0][0]]
    result = likelihood.TaskEvaluator(model, LETTERS, CPU).measure("copa", known)
    assert (result.records, result.cut, result.too_long, result.unseen) == (1, 0, 1, 2)
    long = choice("a", "b", gold=0, context="this is a long story")
    result = likelihood.TaskEvaluator(model, LETTERS, CPU).measure("copa", [long])
    assert (result.records, result.cut, result.acc) == (1, 1, 1)
    with pytest.raises(BardletError, match=r"no question is left: 2 .* never seen, 1 do not fit into its window of 8"):
        likelihood.TaskEvaluator(model, LETTERS, CPU).measure("copa", [*known[1:]])


@pytest.mark.parametrize(("text", "mark", "number"), [
    ("-734\n17*", "", "-734"), (" 1598", "", "1598"), ("about 3", "", None), ("", "", None), ("1,000 and", "", "1000"),
    ("so 3 is\n#### 18", "####", "18"), ("####$1,234.50.", "####", "1234.50"), ("it is 18", "####", None),
    ("#### 4 #### 5", "####", "4"), ("#### four", "####", None),
])  # fmt: skip
def test_the_number_that_counts(text: str, mark: str, number: str | None) -> None:
    assert likelihood.number_after(text, mark) == number


@pytest.mark.parametrize(("text", "number"), [("first 3, then 18.", "18"), ("$1,200 a year", "1200"), ("none", None),
                                              ("it is -5", "-5"), ("2.5%", "2.5")])  # fmt: skip
def test_the_last_number(text: str, number: str | None) -> None:
    assert likelihood.last_number(text) == number


def test_sums_are_right_where_the_model_writes_them() -> None:
    """After "=" it writes 7 and a line end; the number is all digits of it, not the first of them."""
    asked = [Record((("3+4=", "7"),)), Record((("3+5=", "8"),)), Record((("35+36=", "71"),)), Record((("é=", "7"),))]
    result = likelihood.TaskEvaluator(Follows("=7\n\n"), LETTERS, CPU).measure("arithmetic", asked)
    assert (result.acc, result.records, result.unseen, result.acc_last) == (1 / 3, 3, 1, None)
    other = likelihood.TaskEvaluator(Follows("=71\n\n"), LETTERS, CPU).measure("arithmetic", asked[:1])
    assert other.acc == 0, "71 begins with 7, and is another number"


def test_each_prompt_gets_its_own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written two at a time, the short prompts first; one longer than the window leaves room for what is written."""
    model = Follows("abcdefgh", block_size=8)
    monkeypatch.setattr(likelihood, "ROWS", 2)
    prompts = [LETTERS.encode(text).tolist() for text in ("xyzxyzxyzd", "a", "xxb", "xa", "c")]
    assert likelihood.generate_answers(model, LETTERS, prompts, 3) == ["efg", "bcd", "cde", "bcd", "def"]
    until_e = likelihood.generate_answers(model, LETTERS, prompts, 99, stop_ids=[LETTERS.vocab["e"]])
    assert until_e == ["e", "bcde", "cde", "bcde", "de"]
    assert likelihood.generate_answers(model, LETTERS, prompts[1:2], 99) == ["bcde"], "half of the window"


def test_word_problems_stop_before_the_next_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts stands behind ####; the last number is told beside it."""
    texts = [" 9 + 9 = 18\n#### 18\nQuestion: and 7?", " it is 18", " none"]
    monkeypatch.setattr(likelihood, "generate_answers", lambda *_, **__: texts)
    result = likelihood.TaskEvaluator(Follows("ab"), LETTERS, CPU).measure("gsm8k", [Record((("question:", "18"),))] * 3)
    assert result.acc == pytest.approx(1 / 3) and result.acc_last == pytest.approx(2 / 3)


# --------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(["train", str(text), "--out", str(out), *TINY, "--steps", "3", "--block-size", "48"]) == 0
    return out


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$BARDLET_DATA with a few questions of two tasks, one of them with a character that nobody has seen."""
    monkeypatch.setenv("BARDLET_DATA", str(tmp_path / "data"))
    asked = [{"query": f"the {n} little", "choices": ["bards", "songs"], "gold": 0} for n in range(20)]
    asked[3]["query"] = "日本"
    sums = [{"context": f"{n} sang ", "continuation": f"{n * n % 97}"} for n in range(8)]
    for name, values in (("copa", asked), ("arithmetic", sums)):
        path = tmp_path / "data" / tasks.TASKS[name].file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("".join(json.dumps(value) + "\n" for value in values).encode()))
    return tmp_path / "data"


def test_the_command_says_each_task(run: Path, data: Path, bardlet: Callable[..., dict[str, Any]],
                                    capsys: pytest.CaptureFixture[str]) -> None:
    made = bardlet("eval", run, "--task", "copa", "arithmetic")
    assert set(made) == {"run", "tasks"} and list(made["tasks"]) == ["copa", "arithmetic"]
    copa = made["tasks"]["copa"]
    assert copa["records"] == 19 and copa["unseen"] == 1 and copa["chance"] == 0.5 and copa["form"] == "plain text"
    assert set(copa) == {*likelihood.Result.__dataclass_fields__, "form", "seconds"}
    assert bardlet("eval", run, "--task", "copa", "--limit", "4")["tasks"]["copa"]["records"] == 4
    assert main(["eval", str(run), "--task", "copa"]) == 0
    said = capsys.readouterr().out
    assert f"copa: acc {100 * copa['acc']:.1f} % ± {100 * copa['stderr']:.1f}, acc_norm" in said
    assert "chance 50.0 % (19 questions as plain text" in said
    assert "note: 1 question left out: with characters that the tokenizer has never seen" in said


def test_a_model_that_answers_is_asked_by_its_template(data: Path, tmp_path: Path,
                                                       bardlet: Callable[..., dict[str, Any]]) -> None:
    """Numbers by the chat template, choices as plain text; a question without room for an answer is left out."""
    tokenizer = tk.train_bpe(["who sang the songs of the little bards, and how many? " * 40], 330)
    tokenizer.chat_template = chat_template.TEMPLATE
    torch.manual_seed(0)
    model = build(TrainConfig(model="qwen3", n_layer=1, n_head=2, n_embd=32, block_size=48).model_config(330))
    (tmp_path / "chat").mkdir()
    hf.write_folder(tmp_path / "chat", model, tokenizer)
    hf.write_weights(tmp_path / "chat", model.hf_state_dict())
    made = bardlet("eval", tmp_path / "chat", "--task", "copa", "arithmetic")["tasks"]
    assert made["copa"]["form"] == "plain text" and made["arithmetic"]["form"] == "chat template"
    assert made["arithmetic"]["acc_last"] is not None and made["arithmetic"]["records"] == 8

    seen: list[list[int]] = []
    talker = likelihood.ChatFormat(lambda text: seen.append(text) or [1] * len(text), [0])  # type: ignore[arg-type,func-returns-value]
    asked = [Record((("1+1=", "2"),), question=question) for question in ("1+1=", "1" * 40)]
    result = likelihood.TaskEvaluator(model, tokenizer, CPU, talker=talker).measure("arithmetic", asked)
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
