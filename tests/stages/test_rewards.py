"""Scorers: exact match, reward models and commands, with their error messages."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bardlet import models
from bardlet.config.finetuning import GRPOConfig, is_command
from bardlet.config.model import ModelConfig
from bardlet.data import chat_template
from bardlet.data.forms import Fields, Question, Unusable, question
from bardlet.errors import BardletError
from bardlet.models import reward as heads
from bardlet.run import hf
from bardlet.run.record import RolloutsRecord
from bardlet.runtime.distributed import Dist
from bardlet.stages import rewards
from bardlet.stages.rewards import Completion
from bardlet.tokenizer import Tokenizer, train_bpe

DIST = Dist(0, 1, torch.device("cpu"))
PROMPT = [{"role": "user", "content": "2+2="}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = train_bpe(iter(["two and two is four"] * 20), 270)
    tokenizer.chat_template = chat_template.TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def scorer(tokenizer: Tokenizer) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = ModelConfig("qwen3", vocab_size=tokenizer.vocab_size, block_size=16, n_layer=1, n_head=2, n_kv_head=2,
                        n_embd=16, head_dim=8, n_inner=32, activation="silu")  # fmt: skip
    return heads.with_scalar_head(models.build(shape)).eval()


def test_exact_compares_with_the_reference_answer() -> None:
    plain = Question(PROMPT, "4")
    answers = [Completion(text, True) for text in ("4", " 4\n", "5", "44")] + [Completion("4", False)]
    rewards_A = rewards.exact([plain] * 5, answers)
    assert rewards_A.tolist() == [1, 1, 0, 0, 0] and rewards_A.dtype == np.float32
    assert rewards.exact([plain], [Completion("I say 5 #### 4", True)]).tolist() == [0]
    gsm8k = Question(PROMPT, "Two twice is <<2*2=4>>4.\n#### 1,004")
    completions = [Completion("so #### 1004", True), Completion("4 #### 5", True)]
    assert rewards.exact([gsm8k] * 2, completions).tolist() == [1, 0]


def test_a_reward_model_reads_the_whole_conversation(tokenizer: Tokenizer, scorer: torch.nn.Module) -> None:
    """A reward does not depend on the batch; a long conversation loses its beginning."""
    score = rewards.RewardModelScorer(scorer, tokenizer, DIST, "fp32")
    answers = [Completion("4", True), Completion("four and two is four", True), Completion("x" * 40, True)]
    rewards_A = score([Question(PROMPT, None)] * 3, answers)
    for answer, reward in zip(answers, rewards_A, strict=True):
        ids = chat_template.encode(tokenizer, [*PROMPT, {"role": "assistant", "content": answer.text}])[0][-16:]
        with torch.no_grad():
            expected = scorer(torch.from_numpy(ids)[None], torch.tensor([len(ids)])).item()
        assert reward == pytest.approx(expected, abs=1e-6)
    assert len(set(rewards_A.tolist())) == 3


def test_a_command_reads_lines_of_json(tmp_path: Path) -> None:
    (tmp_path / "scorer.py").write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    r = json.loads(line)\n"
        "    print(len(r['answer']) + 10 * r['ended'] + 100 * (r['reference'] == '4') + len(r['messages']) / 2)\n")
    score = rewards.CommandScorer(f"{sys.executable} {tmp_path / 'scorer.py'}")
    completions = [Completion("a\nö", True), Completion("", False)]
    rewards_A = score([Question(PROMPT, "4"), Question(PROMPT, None)], completions)
    assert rewards_A.tolist() == [113.5, 0.5]


def test_ctrl_c_does_not_reach_the_command(tmp_path: Path) -> None:
    """It runs in its own session; only the run gets signals from the terminal, and saves after the command ends."""
    (tmp_path / "scorer.py").write_text("import os\nprint(int(os.getsid(0) == os.getpid()))\n")
    score = rewards.CommandScorer(f"{sys.executable} {tmp_path / 'scorer.py'}")
    assert score([Question(PROMPT, None)], [Completion("", True)]) == 1


@pytest.mark.parametrize(("code", "message"), [
    ("print(1)", "1 numbers for 2 completions"), ("print('good', 2)", "other than numbers"),
    ("print(1, float('nan'))", "not finite"),
    ("raise SystemExit('no such thing')", "failed with exit code 1, stderr: no such thing"),
])  # fmt: skip
def test_a_failing_command_is_a_one_line_error(code: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "scorer.py").write_text(code)
    arguments = [Question(PROMPT, None)] * 2, [Completion("", True)] * 2
    record = RolloutsRecord()
    score = rewards.CommandScorer(f"{sys.executable} {tmp_path / 'scorer.py'}", record)
    for saved, remedy in ((None, "; fix it, then run the command again"), (5, "; fix it, then continue the run: ")):
        record.saved = saved
        with pytest.raises(BardletError) as error:
            score(*arguments)
        assert message in str(error.value) and remedy in str(error.value) and "\n" not in str(error.value)


def test_a_bad_reward_setting_is_a_one_line_error(tmp_path: Path, tokenizer: Tokenizer,
                                                  scorer: torch.nn.Module) -> None:  # fmt: skip
    def config(reward: str | None) -> GRPOConfig:
        return GRPOConfig(reward=reward, dtype="fp32")

    answered = [Question(PROMPT, "4")]
    (tmp_path / "scorer.py").write_text("print(1)")
    assert rewards.build(config("exact"), answered, DIST) is rewards.exact
    for reward, questions, message in (
        (None, answered, "choose a reward"),
        ("exact", [*answered, Question(PROMPT, None)], "1 of 2 prompts have no reference answer"),
        ("no-such-program -x", answered, "no such program no-such-program"),
        (str(tmp_path / "scorer.py"), answered, "use --reward 'python "), ("", answered, "no such program;"),
    ):
        with pytest.raises(BardletError, match=message):
            rewards.build(config(reward), questions, DIST)
    hf.write_folder(tmp_path, scorer, tokenizer)
    hf.write_weights(tmp_path, scorer.hf_state_dict())  # type: ignore[operator]
    assert isinstance(rewards.build(config(str(tmp_path)), answered, DIST), rewards.RewardModelScorer)
    assert not is_command(str(tmp_path)) and not is_command("exact") and is_command("scorer")


def test_every_kind_of_record_has_a_prompt() -> None:
    answered = [*PROMPT, {"role": "assistant", "content": "4"}]
    for record in ({"messages": answered}, {"instruction": "2+2=", "output": "4"}, {"prompt": "2+2=", "answer": "4"},
                   {"prompt": PROMPT, "chosen": "4", "rejected": "5"}):  # fmt: skip
        assert question(Fields(record)) == Question(PROMPT, "4")
    for record in ({"messages": PROMPT}, {"prompt": PROMPT}, {"prompt": "2+2="}):
        assert question(Fields(record)) == Question(PROMPT, None)
    longer = [*answered, {"role": "user", "content": "3+3="}, {"role": "assistant", "content": "6"}]
    assert question(Fields({"messages": longer})) == Question(longer[:3], "6")
    with pytest.raises(Unusable, match="has an answer without a prompt"):
        question(Fields({"messages": answered[1:]}))


@pytest.mark.parametrize("program", [
    "import time; time.sleep(60)",  # reads nothing
    "import sys, time; sys.stdin.read(); print(1, flush=True); time.sleep(60)",  # answers, and does not end
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
    "import subprocess; subprocess.run(['sleep', '5'])",  # its child has its standard output
])
def test_a_command_that_does_not_finish_is_an_error(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "TIMEOUT", 0.2)
    score = rewards.CommandScorer(f"{sys.executable} -c {shlex.quote(program)}")
    with pytest.raises(BardletError, match=r"did not finish within 0\.2 seconds for 1 completions"):
        score([Question(PROMPT, None)], [Completion("", True)])


def test_what_a_command_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "TIMEOUT", 2)
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    child = f"exec 3> {shlex.quote(str(tmp_path / 'fifo'))}; sleep 30; echo alive >&3"
    score = rewards.CommandScorer(f"sh -c {shlex.quote(f'({child}) & wait')}")
    with pytest.raises(BardletError, match="did not finish"):
        score([Question(PROMPT, None)], [Completion("", True)])
    os.set_blocking(reader, True)
    assert os.read(reader, 10) == b"", "nothing has the FIFO open"
    os.close(reader)
