"""What an answer is worth: by the data, by a reward model, by a program; and what people get wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bardlet import models
from bardlet.config.finetuning import GRPOConfig, is_command
from bardlet.config.model import ModelConfig
from bardlet.data import chat_template
from bardlet.data.records import Question, question
from bardlet.errors import BardletError
from bardlet.models import reward as heads
from bardlet.run import hf
from bardlet.runtime.distributed import Dist
from bardlet.stages import rewards
from bardlet.stages.rewards import Answer
from bardlet.tokenizer import Tokenizer, train_bpe

HERE = Dist(0, 1, torch.device("cpu"))
ASKED = [{"role": "user", "content": "2+2="}]


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    made = train_bpe(iter(["two and two is four"] * 20), 270)
    made.chat_template = chat_template.TEMPLATE
    return made


@pytest.fixture(scope="module")
def scorer(tokenizer: Tokenizer) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = ModelConfig("qwen3", vocab_size=tokenizer.vocab_size, block_size=16, n_layer=1, n_head=2, n_kv_head=2,
                        n_embd=16, head_dim=8, n_inner=32, activation="silu")  # fmt: skip
    return heads.with_scalar_head(models.build(shape)).eval()


def test_exact_is_the_answer_of_the_data() -> None:
    told = Question(ASKED, "4")
    worth = rewards.exact([told] * 5, [Answer("4", True), Answer(" 4\n", True), Answer("4", False), Answer("5", True),
                                       Answer("44", True)])  # fmt: skip
    assert worth.tolist() == [1, 1, 0, 0, 0] and worth.dtype == np.float32
    assert rewards.exact([told], [Answer("I say 5 #### 4", True)]).tolist() == [0]
    worked = Question(ASKED, "Two twice is <<2*2=4>>4.\n#### 1,004")
    assert rewards.exact([worked] * 2, [Answer("so #### 1004", True), Answer("4 #### 5", True)]).tolist() == [1, 0]


def test_a_judge_reads_the_whole_conversation(tokenizer: Tokenizer, scorer: torch.nn.Module) -> None:
    """The same number as for the conversation alone, whatever is beside it; of a long one its end."""
    judge = rewards.RewardModelScorer(scorer, tokenizer, HERE, "fp32")
    answers = [Answer("4", True), Answer("four and two is four", True), Answer("x" * 40, True)]
    worth = judge([Question(ASKED, None)] * 3, answers)
    for answer, found in zip(answers, worth, strict=True):
        ids = chat_template.encode(tokenizer, [*ASKED, {"role": "assistant", "content": answer.text}])[0][-16:]
        with torch.no_grad():
            alone = scorer(torch.from_numpy(ids)[None], torch.tensor([len(ids)])).item()
        assert found == pytest.approx(alone, abs=1e-6)
    assert len(set(worth.tolist())) == 3


def test_a_program_is_asked_by_lines_of_json(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    r = json.loads(line)\n"
        "    print(len(r['answer']) + 10 * r['ended'] + 100 * (r['reference'] == '4') + len(r['messages']) / 2)\n")
    ask = rewards.CommandScorer(f"{sys.executable} {tmp_path / 'judge.py'}")
    worth = ask([Question(ASKED, "4"), Question(ASKED, None)], [Answer("a\nö", True), Answer("", False)])
    assert worth.tolist() == [113.5, 0.5]


def test_ctrl_c_is_not_for_the_program(tmp_path: Path) -> None:
    """It has a session of its own: signals of the terminal go to the run alone, which lets it end and saves."""
    (tmp_path / "judge.py").write_text("import os\nprint(int(os.getsid(0) == os.getpid()))\n")
    judge = rewards.CommandScorer(f"{sys.executable} {tmp_path / 'judge.py'}")
    assert judge([Question(ASKED, None)], [Answer("", True)]) == 1


@pytest.mark.parametrize(("code", "what"), [
    ("print(1)", "1 numbers for 2 answers"), ("print('good', 2)", "no number"),
    ("print(1, float('nan'))", "not finite"),
    ("raise SystemExit('no such thing')", "ended with 1 and said: no such thing"),
])  # fmt: skip
def test_a_program_that_fails_is_one_line(code: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(code)
    asked = [Question(ASKED, None)] * 2, [Answer("", True)] * 2
    with pytest.raises(BardletError) as error:
        rewards.CommandScorer(f"{sys.executable} {tmp_path / 'judge.py'}")(*asked)
    assert what in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_reward_is_one_line(tmp_path: Path, tokenizer: Tokenizer, scorer: torch.nn.Module) -> None:
    def config(reward: str | None) -> GRPOConfig:
        return GRPOConfig(reward=reward, dtype="fp32")

    told = [Question(ASKED, "4")]
    (tmp_path / "judge.py").write_text("print(1)")
    assert rewards.build(config("exact"), told, HERE) is rewards.exact
    for reward, questions, what in ((None, told, "say what an answer is worth"),
                                    ("exact", [*told, Question(ASKED, None)], "1 of 2 questions have no answer"),
                                    ("no-such-program -x", told, "no program no-such-program"),
                                    (str(tmp_path / "judge.py"), told, "say --reward 'python "),
                                    ("", told, "no program named")):  # fmt: skip
        with pytest.raises(BardletError, match=what):
            rewards.build(config(reward), questions, HERE)
    hf.write_folder(tmp_path, scorer, tokenizer)
    hf.write_weights(tmp_path, scorer.hf_state_dict())  # type: ignore[operator]
    assert isinstance(rewards.build(config(str(tmp_path)), told, HERE), rewards.RewardModelScorer)
    assert not is_command(str(tmp_path)) and not is_command("exact") and is_command("judge")


def test_every_kind_of_record_asks_something() -> None:
    answered = [*ASKED, {"role": "assistant", "content": "4"}]
    for record in ({"messages": answered}, {"instruction": "2+2=", "output": "4"}, {"prompt": "2+2=", "answer": "4"},
                   {"prompt": ASKED, "chosen": "4", "rejected": "5"}):  # fmt: skip
        assert question(record, "here") == Question(ASKED, "4")
    for record in ({"messages": ASKED}, {"prompt": ASKED}, {"prompt": "2+2="}):
        assert question(record, "here") == Question(ASKED, None)
    longer = [*answered, {"role": "user", "content": "3+3="}, {"role": "assistant", "content": "6"}]
    assert question({"messages": longer}, "here") == Question(longer[:3], "6")
    with pytest.raises(BardletError, match="here: an answer without a question"):
        question({"messages": answered[1:]}, "here")
