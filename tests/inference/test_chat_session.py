"""Conversations: what the model reads, and the commands of `bardlet chat`."""

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
from bardlet.models.llama import Llama
from bardlet.run import hf

TOKENIZER = tk.train_bpe(["the user asks and the assistant answers, as it may be " * 20], 330)
CONFIG = ModelConfig(model="qwen3", vocab_size=330, block_size=48, n_layer=1, n_head=2, n_kv_head=1, n_embd=16,
                     head_dim=8, n_inner=24, activation="silu", norm_eps=1e-6)  # fmt: skip


def new_session(chat: bool = True, **options: Any) -> ChatSession:
    torch.manual_seed(0)
    tokenizer = tk.Tokenizer(TOKENIZER.json)
    tokenizer.chat_template = chat_template.TEMPLATE if chat else None
    return ChatSession(Llama(CONFIG).eval(), tokenizer, tokens=12, **options)


def prompt_of(messages: list[dict[str, str]]) -> list[int]:
    return chat_template.encode(TOKENIZER, messages, add_generation_prompt=True)[0].tolist()


def roles(session: ChatSession) -> str:
    return "".join(message["role"][0] for message in session.messages)


def test_the_prompt_is_the_conversation_in_the_chat_template(monkeypatch: pytest.MonkeyPatch) -> None:
    from bardlet.inference import generate

    seen: list[list[int]] = []
    stream = generate.stream
    monkeypatch.setattr(generate, "stream", lambda model, prompts, *a, **k: (seen.append(prompts[0]),
                                                                             stream(model, prompts, *a, **k))[1])
    session = new_session(system="be kind")
    answer = "".join(session.ask("the user <|end|>"))
    assert session.messages[1]["content"] == answer
    system = {"role": "system", "content": "be kind"}
    assert seen[0] == prompt_of([system, session.messages[0]])
    "".join(session.ask("asks"))
    assert roles(session) == "uaua" and session.forgotten == 2  # the system message stays
    assert seen[1] == prompt_of([system, session.messages[2]])
    assert all(len(prompt) <= 48 - 12 for prompt in seen)


def test_regenerate_gives_another_answer(tmp_path: Path) -> None:
    session = new_session(seed=3)
    with pytest.raises(BardletError, match="the conversation is empty"):
        session.regenerate()
    first = "".join(session.ask("asks"))
    second = "".join(session.regenerate())
    assert first != second and roles(session) == "ua" and session.messages[1]["content"] == second
    same_seed = new_session(seed=3)
    assert "".join(same_seed.ask("asks")) == first


def test_a_closed_stream_leaves_the_partial_answer() -> None:
    session = new_session()
    pieces = session.ask("asks")
    partial = next(pieces) + next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert session.messages[-1] == {"role": "assistant", "content": partial}
    assert not session.model.training


def test_dropping_messages_warns(folder: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"asks the user\n" * 4)))
    assert main(["chat", str(folder), "--seed", "1", "--tokens", "12"]) == 0
    chat = hf.read_folder(folder)[1].chat_template is not None
    assert ("no longer fit in the context window" in capsys.readouterr().err) == chat


def test_a_role_token_ends_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """All special tokens are stop tokens: after a role token another speaker's turn would follow."""
    from bardlet.inference import generate

    stop_ids: list[Any] = []
    stream = generate.stream
    monkeypatch.setattr(generate, "stream", lambda *a, **k: (stop_ids.append(k["stop_ids"]), stream(*a, **k))[1])
    "".join(new_session().ask("asks"))
    assert set(stop_ids[0]) == set(TOKENIZER.special)


def test_a_base_model_starts_a_new_document_after_a_separator(monkeypatch: pytest.MonkeyPatch) -> None:
    from bardlet.inference import generate

    seen: list[list[int]] = []

    def end_of_document(model: Any, prompts: Any, *a: Any, **k: Any) -> Any:
        seen.append(prompts[0])
        return iter([[80], [TOKENIZER.eos_id]])

    monkeypatch.setattr(generate, "stream", lambda *a, **k: (yield from end_of_document(*a, **k)))
    session = new_session(chat=False)
    "".join(session.ask("the user"))
    "".join(session.ask("asks"))
    "".join(session.regenerate())  # takes back the answer that ended the document
    assert seen == [[TOKENIZER.eos_id, *TOKENIZER.encode(text).tolist()] for text in ("the user", "asks", "asks")]
    "".join(session.ask("who"))
    assert seen[3] == [TOKENIZER.eos_id, *TOKENIZER.encode("who").tolist()]


def test_a_message_that_is_too_long_raises_and_is_dropped() -> None:
    session = new_session()
    with pytest.raises(BardletError, match=r"too long: \d+ tokens, but 36 fit .* 48, with 12 reserved"):
        session.ask("the user " * 60)
    assert session.messages == []
    "".join(session.ask("asks"))
    assert roles(session) == "ua"


def test_a_base_model_continues_the_text() -> None:
    session = new_session(chat=False, temperature=0.0)
    first = "".join(session.ask("the user"))
    ids = [TOKENIZER.eos_id, *TOKENIZER.encode("the user").tolist()]
    from bardlet.inference import generate

    [completion] = generate.generate(session.model, [ids], 12, temperature=0.0, stop_ids=[TOKENIZER.eos_id])
    assert TOKENIZER.decode([*ids, *completion], skip_special=True) == "the user" + first
    "".join(session.ask(" asks"))
    assert roles(session) == "uaua"


def test_sft_reads_a_saved_conversation(tmp_path: Path) -> None:
    from bardlet.data import forms, records

    session = new_session(system="be kind")
    with pytest.raises(BardletError, match="nothing to save"):
        session.save(tmp_path / "a.jsonl")
    for _ in range(2):
        "".join(session.ask("ü"))
        session.save(tmp_path / "a.jsonl")
    read = records.find([str(tmp_path / "a.jsonl")]).read(forms.dialogue)
    assert [len(messages) for messages in read] == [3, 5] and read[1][1:] == session.messages
    with pytest.raises(BardletError, match="cannot be written"):
        session.save(tmp_path / "no" / "a.jsonl")


@pytest.fixture(scope="module", params=[True, False], ids=["answers", "base"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    session, path = new_session(request.param), tmp_path_factory.mktemp("model")
    hf.write_folder(path, session.model, session.tokenizer)
    hf.write_weights(path, session.model.hf_state_dict())
    return path


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                     tmp_path: Path) -> None:  # fmt: skip
    """Piped input: each line is answered or run as a command; --json prints the conversation."""
    lines = f"asks\n\n/again\n/save {tmp_path / 'a.jsonl'}\nthe user\n/help\n/quit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert main(["chat", str(folder), "--seed", "1", "--tokens", "8", "--json"]) == 0
    out, err = capsys.readouterr()
    messages = json.loads(out.splitlines()[-1])["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2 and len(messages) == 4
    assert messages[1]["content"] in out and "/save FILE" in out and "never" not in out
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8"))["messages"] == messages[:2]
    assert ("was not fine-tuned to answer" in err) == (hf.read_folder(folder)[1].chat_template is None)


@pytest.mark.parametrize(("line", "message"), [("/save", "name the file"), ("/dance", "no such command"),
                                            ("/again", "the conversation is empty")])  # fmt: skip
def test_invalid_commands_are_one_line(line: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    """In a pipe, too, the conversation goes on after one."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{line}\n/help\n".encode())))
    assert main(["chat", str(folder)]) == 1
    output = capsys.readouterr()
    assert message in output.err and "/save FILE" in output.out


def test_ctrl_c_ends_the_answer_but_not_the_conversation(capsys: pytest.CaptureFixture[str],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from bardlet.inference import generate

    session, stream = new_session(), generate.stream

    def interrupted(*arguments: Any, **options: Any) -> Any:
        for number, ids in enumerate(stream(*arguments, **options)):
            if number == 3:
                raise KeyboardInterrupt
            yield ids

    with monkeypatch.context() as patched:
        patched.setattr(generate, "stream", interrupted)
        assert command.handle_command(session, "asks")
    assert capsys.readouterr().out.endswith(" ...\n")
    assert roles(session) == "ua"
    assert session.messages[1]["content"]
    assert command.handle_command(session, "the user") and roles(session) == "uaua"
