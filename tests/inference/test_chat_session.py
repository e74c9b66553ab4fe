"""A conversation: what the model is shown of it, and what a person can do in it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bardlet import tokenizer as tk
from bardlet.cli import chat as command
from bardlet.cli import main
from bardlet.config.model import ModelConfig
from bardlet.data import chat_template
from bardlet.errors import BardletError
from bardlet.inference.chat_session import ChatSession
from bardlet.models.qwen3 import Qwen3
from bardlet.run import hf

WORDS = tk.train_bpe(["the user asks and the assistant answers, as it may be " * 20], 330)
CONFIG = ModelConfig(model="qwen3", vocab_size=330, block_size=48, n_layer=1, n_head=2, n_kv_head=1, n_embd=16,
                     head_dim=8, n_inner=24, activation="silu", norm_eps=1e-6)  # fmt: skip


def talker(answers: bool = True, **options: Any) -> ChatSession:
    torch.manual_seed(0)
    tokenizer = tk.Tokenizer(WORDS.json)
    tokenizer.chat_template = chat_template.TEMPLATE if answers else None
    return ChatSession(Qwen3(CONFIG).eval(), tokenizer, tokens=12, **options)


def roles(talk: ChatSession) -> str:
    return "".join(message["role"][0] for message in talk.messages)


def test_the_model_sees_the_conversation_as_the_template_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from bardlet.inference import generate

    seen: list[list[int]] = []
    stream = generate.stream
    monkeypatch.setattr(generate, "stream", lambda model, prompts, *a, **k: (seen.append(prompts[0]),
                                                                             stream(model, prompts, *a, **k))[1])
    talk = talker(system="be kind")
    answer = "".join(talk.ask("the user <|end|>"))
    assert talk.messages[1]["content"] == answer
    system = {"role": "system", "content": "be kind"}
    assert seen[0] == chat_template.encode(WORDS, [system, talk.messages[0]], ask=True)[0].tolist()
    "".join(talk.ask("asks"))
    assert roles(talk) == "uaua" and talk.forgotten == 2  # it is long by now: the system's message stays
    assert seen[1] == chat_template.encode(WORDS, [system, talk.messages[2]], ask=True)[0].tolist()
    assert all(len(prompt) <= 48 - 12 for prompt in seen)


def test_again_is_another_answer_to_the_same(tmp_path: Path) -> None:
    talk = talker(seed=3)
    with pytest.raises(BardletError, match="nothing was said"):
        talk.regenerate()
    one = "".join(talk.ask("asks"))
    two = "".join(talk.regenerate())
    assert one != two and roles(talk) == "ua" and talk.messages[1]["content"] == two
    same = talker(seed=3)
    assert "".join(same.ask("asks")) == one, "the seed decides"


def test_an_answer_that_is_stopped_stays_as_far_as_it_came() -> None:
    talk = talker()
    pieces = talk.ask("asks")
    came = next(pieces) + next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert talk.messages[-1] == {"role": "assistant", "content": came}
    assert not talk.model.training


def test_what_does_not_fit_any_more_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"asks the user\n" * 4)))
    assert main(["chat", str(folder), "--seed", "1", "--tokens", "12"]) == 0
    answers = hf.read_folder(folder)[1].chat_template is not None
    assert ("do not fit into the model's window" in capsys.readouterr().err) == answers


def test_somebody_elses_words_end_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer in which a role's token comes ends there: what follows would be another's words."""
    from bardlet.inference import generate

    asked: list[Any] = []
    stream = generate.stream
    monkeypatch.setattr(generate, "stream", lambda *a, **k: (asked.append(k["stop_ids"]), stream(*a, **k))[1])
    "".join(talker().ask("asks"))
    assert set(asked[0]) == set(WORDS.special)


def test_a_base_begins_anew_behind_the_end_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from bardlet.inference import generate

    seen: list[list[int]] = []

    def ends(model: Any, prompts: Any, *a: Any, **k: Any) -> Any:
        seen.append(prompts[0])
        return iter([[80], [WORDS.eos_id]])

    monkeypatch.setattr(generate, "stream", lambda *a, **k: (yield from ends(*a, **k)))
    talk = talker(answers=False)
    "".join(talk.ask("the user"))
    "".join(talk.ask("asks"))
    "".join(talk.regenerate())  # the answer that ended is taken back, and the text that it ended with it
    assert seen == [[WORDS.eos_id, *WORDS.encode(text).tolist()] for text in ("the user", "asks", "asks")]
    "".join(talk.ask("who"))
    assert seen[3] == [WORDS.eos_id, *WORDS.encode("who").tolist()]


def test_what_is_too_long_is_said_and_forgotten() -> None:
    talk = talker()
    with pytest.raises(BardletError, match=r"too long: \d+ tokens; beside an answer of 12"):
        talk.ask("the user " * 60)
    assert talk.messages == []
    "".join(talk.ask("asks"))
    assert roles(talk) == "ua"


def test_a_base_goes_on_with_the_text() -> None:
    talk = talker(answers=False, temperature=0.0)
    first = "".join(talk.ask("the user"))
    ids = [WORDS.eos_id, *WORDS.encode("the user").tolist()]
    from bardlet.inference import generate

    [made] = generate.generate(talk.model, [ids], 12, temperature=0.0, stop_ids=[WORDS.eos_id])
    assert WORDS.decode([*ids, *made], skip_special=True) == "the user" + first
    "".join(talk.ask(" asks"))
    assert roles(talk) == "uaua"


def test_a_saved_conversation_is_read_by_sft(tmp_path: Path) -> None:
    from bardlet.data import records

    talk = talker(system="be kind")
    with pytest.raises(BardletError, match="nothing to save"):
        talk.save(tmp_path / "a.jsonl")
    for _ in range(2):
        "".join(talk.ask("ü"))
        talk.save(tmp_path / "a.jsonl")
    read = [records.conversation(record, place) for place, record in records.records(tmp_path / "a.jsonl")]
    assert [len(messages) for messages in read] == [3, 5] and read[1][1:] == talk.messages
    with pytest.raises(BardletError, match="cannot be written"):
        talk.save(tmp_path / "no" / "a.jsonl")


@pytest.fixture(scope="module", params=[True, False], ids=["answers", "base"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    talk, path = talker(request.param), tmp_path_factory.mktemp("model")
    hf.write_folder(path, talk.model, talk.words)
    hf.write_weights(path, talk.model.hf_state_dict())
    return path


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                     tmp_path: Path) -> None:  # fmt: skip
    """From a pipe: an answer to each line, commands obeyed, the conversation as JSON."""
    said = f"asks\n\n/again\n/save {tmp_path / 'a.jsonl'}\nthe user\n/help\n/quit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said.encode())))
    assert main(["chat", str(folder), "--seed", "1", "--tokens", "8", "--json"]) == 0
    out, err = capsys.readouterr()
    messages = json.loads(out.splitlines()[-1])["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2 and len(messages) == 4
    assert messages[1]["content"] in out and "/save FILE" in out and "never" not in out
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8"))["messages"] == messages[:2]
    assert ("has not learned to answer" in err) == (hf.read_folder(folder)[1].chat_template is None)


@pytest.mark.parametrize(("line", "what"), [("/save", "name the file"), ("/dance", "no such command"),
                                            ("/again", "nothing was said")])  # fmt: skip
def test_what_cannot_be_done_is_one_line(line: str, what: str, folder: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line.encode())))
    assert main(["chat", str(folder)]) == 1
    assert what in capsys.readouterr().err


def test_control_c_ends_the_answer_and_not_the_conversation(capsys: pytest.CaptureFixture[str],
                                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from bardlet.inference import generate

    talk, stream = talker(), generate.stream

    def interrupted(*arguments: Any, **options: Any) -> Any:
        for number, ids in enumerate(stream(*arguments, **options)):
            if number == 3:
                raise KeyboardInterrupt
            yield ids

    with monkeypatch.context() as patched:
        patched.setattr(generate, "stream", interrupted)
        assert command.handle_command(talk, "asks")
    assert capsys.readouterr().out.endswith(" ...\n")
    assert roles(talk) == "ua"
    assert talk.messages[1]["content"]
    assert command.handle_command(talk, "the user") and roles(talk) == "uaua"
