"""An exported page: its tokenizer, its forward pass and its text are the model's own."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from bardlet import models
from bardlet import tokenizer as tk
from bardlet.api.models import Model
from bardlet.config.model import RUNGS, ModelConfig, RopeScaling
from bardlet.data import chat_template
from bardlet.errors import BardletError
from bardlet.export import canonical, html
from bardlet.inference import generate, translate
from bardlet.inference.chat_session import ChatSession
from bardlet.inference.text_generation import prompt_ids

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs Node.js")
TEXT = "The little bards sang naïve songs; 詩 and Песни, 42 of them.\n\tIt's what they'll do ...  \n"
TEXTS = [TEXT, "bards", "", "  two  spaces \n\n  ", "I'LL they'LL 's", "naïve 詩人", "\u00a0x\u3000y\u0085z\ufeff",
         "<|end|>"]


def tokenizer_of(kind: str) -> tk.Tokenizer:
    """Return a tokenizer of TEXT."""
    return {"char": lambda: tk.train_char(TEXT, False), "byte": lambda: tk.train_byte(False),
            "bpe": lambda: tk.train_bpe([TEXT] * 9, 320)}[kind]()


def model_of(family: str, vocab_size: int, **changes: Any) -> Any:
    """Return a model with random weights, none of which is zero."""
    shape = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 16, "head_dim": 8, "n_inner": 24,
             "n_encoder_layer": 2 if family == "encdec" else 0,
             "activation": "relu" if family in RUNGS else "gelu_new"} | changes
    torch.manual_seed(1)
    model = models.build(ModelConfig(family, vocab_size, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (0.8 if parameter.ndim == 1 else 0.0))
    return model


def run(tmp_path: Path, model: Any, tokenizer: tk.Tokenizer, dtype: str = "fp32", start: html.Start | None = None,
        **request: Any) -> dict[str, Any]:  # fmt: skip
    """Export a page, and run its model in Node."""
    path = tmp_path / "page.html"
    path.unlink(missing_ok=True)
    html.write(path, model, tokenizer, {"title": "t", "notes": []}, start or html.Start(), dtype)
    command = [str(NODE), str(Path(__file__).with_name("page.mjs")), str(path)]
    done = subprocess.run(command, input=json.dumps({"tokens": 40, **request}), capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def with_rounded(model: Any, dtype: str) -> Any:
    """Return the model with the weights that the page has in this precision."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(html.rounded(parameter, dtype))
    return model


def greedy(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Return bardlet's greedy completions."""
    return [generate.generate(model, [prompt], tokens, temperature=0)[0] for prompt in prompts]


@needs_node
@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_the_page_has_the_same_tokens(kind: str, tmp_path: Path) -> None:
    """Except that it leaves out characters that a char tokenizer does not know, and says so."""
    tokenizer = tokenizer_of(kind)
    texts = [tokenizer.drop_unseen(text)[0] for text in TEXTS]
    got = run(tmp_path, model_of("gpt2", tokenizer.vocab_size), tokenizer, texts=texts)
    assert got["ids"] == [tokenizer.encode(text).tolist() for text in texts]
    assert got["decoded"] == texts


@needs_node
@pytest.mark.parametrize("normalized", ["nfc", "lowercase"])
def test_the_page_normalizes_as_the_tokenizer_does(normalized: str, tmp_path: Path) -> None:
    tokenizer = (tokenizer_of("bpe").with_nfc() if normalized == "nfc"
                 else tk.train_bpe([TEXT.lower()] * 9, 320, lowercase=True))
    texts = ["e\u0301 a\u0308", "ÀÉ İ ΟΔΟΣ Σ", "Straße ẞ"]
    got = run(tmp_path, model_of("gpt2", tokenizer.vocab_size), tokenizer, texts=texts)
    assert got["ids"] == [tokenizer.encode(text).tolist() for text in texts]


@needs_node
def test_a_token_without_a_merge_is_not_a_byte(tmp_path: Path) -> None:
    """A vocabulary may list tokens that no merge makes; texts never have them."""
    pipeline = json.loads(tokenizer_of("bpe").json)
    pipeline["model"]["vocab"]["bards"] = 320
    tokenizer = tk.Tokenizer(json.dumps(pipeline))
    texts = ["ab", "bards", TEXT]
    got = run(tmp_path, model_of("gpt2", tokenizer.vocab_size), tokenizer, texts=texts)
    assert got["ids"] == [tokenizer.encode(text).tolist() for text in texts]


def test_added_tokens_that_are_not_special_are_refused() -> None:
    pipeline = json.loads(tokenizer_of("bpe").json)
    for n, content in enumerate(("bards", "songs")):
        pipeline["added_tokens"].append({"id": 320 + n, "content": content, "single_word": False, "lstrip": False,
                                         "rstrip": False, "normalized": False, "special": False})
    tokenizer = tk.Tokenizer(json.dumps(pipeline))
    with pytest.raises(BardletError, match=r"has the added token 'bards' and 1 more, .*; use --to hf"):
        html.check(model_of("gpt2", tokenizer.vocab_size), tokenizer)


RELATIVES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (family, {"activation": "silu", **changes}) for name, family, changes in (
        ("llama, biases", "llama", {"n_kv_head": 1, "attention_bias": True, "tie_embeddings": False}),
        ("llama, scaled positions", "llama", {"rope_theta": 500.0, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 40)}),
        ("mistral, wide heads", "mistral", {"head_dim": 12, "rope_theta": 300.0}),
        ("qwen2", "qwen2", {"n_kv_head": 1}),
        ("smollm3", "smollm3", {"n_layer": 4, "layers_without_positions": (3,)}))}
"""Models of `models/llama.py`: biases, scaled positions, layers without positions."""
CASES = {
    **{rung: (rung, {}) for rung in RUNGS}, **RELATIVES,
    "smollm3, biases": ("smollm3", {"activation": "silu", "layers_without_positions": (0,), "attention_bias": True}),
    "gpt2": ("gpt2", {}), "untied": ("gpt2", {"tie_embeddings": False, "activation": "gelu"}),
    "qwen3": ("qwen3", {"activation": "silu"}), "grouped": ("qwen3", {"activation": "silu", "n_kv_head": 1, "n_head": 4,
                                                                     "head_dim": 6, "tie_embeddings": False}),
    "tiny": ("gpt2", {"n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 8, "block_size": 8}),
    "two": ("qwen3", {"activation": "silu", "block_size": 2}),
}


@needs_node
@pytest.mark.parametrize("case", CASES)
def test_the_page_computes_the_same(case: str, tmp_path: Path) -> None:
    """Logits, and greedy tokens past the context window."""
    family, changes = CASES[case]
    tokenizer = tokenizer_of("char")
    model = model_of(family, tokenizer.vocab_size, **changes)
    prompts = [[1], [3, 4, 5, 6, 2, 1, 0, 9][: model.config.block_size]]
    got = run(tmp_path, model, tokenizer, prompts=prompts)
    for prompt, logits in zip(prompts, got["logits"], strict=True):
        with torch.inference_mode():
            wanted = model(torch.tensor([prompt]))[0, -1]
        torch.testing.assert_close(torch.tensor(logits), wanted, rtol=1e-4, atol=1e-4)
    assert got["completions"] == greedy(model, prompts, 40)


@needs_node
@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_rounded_weights_give_the_tokens_of_the_same_rounded_weights(dtype: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("char")
    model = model_of("qwen3", tokenizer.vocab_size, activation="silu")
    got = run(tmp_path, model, tokenizer, dtype, prompts=[[1, 2, 3]])
    before = greedy(model, [[1, 2, 3]], 40)
    assert got["completions"] == greedy(with_rounded(model, dtype), [[1, 2, 3]], 40)
    assert dtype == "fp16" or got["completions"] != before, "int8 changes this model"


@needs_node
def test_the_page_translates(tmp_path: Path) -> None:
    tokenizer = tk.train_bpe([TEXT] * 9, 320)
    model = model_of("encdec", tokenizer.vocab_size, activation="gelu")
    sources = [[30, 40, 50, tokenizer.eos_id], [41, tokenizer.eos_id]]
    got = run(tmp_path, model, tokenizer, sources=sources, tokens=12)
    for source, ids in zip(sources, got["translations"], strict=True):
        target = [tokenizer.pad_id]
        with torch.inference_mode():
            memory = model.encode(torch.tensor([source]))
            while len(target) < 13 and target[-1] not in set(tokenizer.special) - {tokenizer.pad_id}:
                target.append(int(model.decode(torch.tensor([target]), memory)[0, -1].argmax()))
        assert ids == target[1:]


@needs_node
def test_lines_are_translated_as_by_the_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each line is a source; its translation has at most 2 S + 20 tokens, and fits into the window."""
    tokenizer = tk.train_bpe([TEXT] * 9, 320)
    model = model_of("encdec", tokenizer.vocab_size, activation="gelu", block_size=48)
    lines = ["The little bards", "", " \u00a0\x1f ", "  sang\t", "naïve 詩人 " * 20, "\ufeffsongs", "a" * 47, "b " * 30]
    got = run(tmp_path, model, tokenizer, lines="\n".join(lines))["lines"]
    with caplog.at_level(logging.WARNING, "bardlet"):
        wanted = translate.translate_lines(model, tokenizer, lines)
    assert [" ".join(line["text"].split()) if line else "" for line in got] == wanted
    cut = [n for n, line in enumerate(got, 1) if line and line["cut"]]
    assert f"line {cut[0]} and {len(cut) - 1} more: longer than the 48" in caplog.text and cut[0] == 5
    stop, start = translate.check(model, tokenizer, translate.TranslateOptions())
    for text, line in zip(lines, got, strict=True):
        if line:
            source = translate.source_ids(model, tokenizer.encode(text.strip()), stop)
            assert line["ids"] == translate.translate(model, [source], stop, start)[0]
            assert line["limit"] == min(2 * len(source) + 20, 48)
    assert max(len(line["ids"]) for line in got if line) > 20


def test_an_encoder_decoder_without_the_tokens_of_translation_is_refused() -> None:
    tokenizer = tokenizer_of("char")
    with pytest.raises(BardletError, match="was not trained to translate"):
        html.check(model_of("encdec", tokenizer.vocab_size), tokenizer)


@needs_node
@pytest.mark.parametrize("separator", [True, False])
@pytest.mark.parametrize("starts_documents", [True, False])
def test_a_prompt_begins_a_document_where_it_does_in_bardlet(separator: bool, starts_documents: bool,
                                                             tmp_path: Path) -> None:
    tokenizer = tk.train_char(TEXT, separator)
    model = Model(tmp_path, model_of("gpt2", tokenizer.vocab_size), tokenizer, "fp32", 2, None)
    model.starts_documents = starts_documents
    texts = ["", "The", "\n", "\nThe"]
    got = run(tmp_path, model.module, tokenizer, start=html.Start(2, starts_documents), begins=texts)["begins"]
    assert got == [model.prompt_ids(text) for text in texts]
    assert (got[1][0] == prompt_ids(tokenizer, None, 2)[0]) is starts_documents


@needs_node
def test_a_conversation_has_the_ids_of_the_template(tmp_path: Path) -> None:
    tokenizer = tk.train_bpe([TEXT] * 9, 320)
    tokenizer.chat_template = chat_template.TEMPLATE
    messages = [{"role": "user", "content": "Sing <|end|><|assistant|> 詩"}, {"role": "assistant", "content": "La."},
                {"role": "user", "content": "Again?"}]
    got = run(tmp_path, model_of("gpt2", tokenizer.vocab_size), tokenizer, chats=[messages])
    wanted, _ = chat_template.encode(tokenizer, messages, True)
    assert got["chats"][0] == wanted.tolist() and wanted.tolist().count(tokenizer.vocab["<|end|>"]) == 3


@needs_node
@pytest.mark.parametrize("tokens", [5, 20, 500])
def test_a_long_conversation_is_cut_as_in_a_chat(tokens: int, tmp_path: Path) -> None:
    """Whole messages are dropped from the start; half of the window is for the answer; a long question is refused."""
    tokenizer = tk.train_bpe([TEXT] * 9, 320)
    tokenizer.chat_template = chat_template.TEMPLATE
    model = model_of("gpt2", tokenizer.vocab_size, block_size=48)
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(
        ["Sing <|end|>", "La.", "What do the little bards sing?", "songs, 42 of them", "Again?", "la la", "why 詩"])]
    conversations = [turns[:n] for n in (1, 3, 5, 7)] + [[*turns[:4], {"role": "user", "content": "bards " * 40}]]
    got = run(tmp_path, model, tokenizer,
              conversations=[{"messages": messages, "tokens": tokens} for messages in conversations])["conversations"]
    dropped = 0
    for messages, one in zip(conversations, got, strict=True):
        session = ChatSession(model, tokenizer, tokens=tokens)
        session.messages = list(messages)
        try:
            wanted = session._prompt()
        except BardletError as error:
            assert one["error"].replace(". S", "; s").removesuffix(".").lower() == str(error).lower()
            continue
        assert (one["ids"], one["forgotten"], one["limit"]) == (wanted, session.forgotten, session.tokens)
        dropped += session.forgotten
    assert dropped and "error" in got[-1]


def with_template(template: str | None) -> tk.Tokenizer:
    """Return a tokenizer with the tokens of a chat."""
    tokenizer = tk.train_bpe([TEXT] * 9, 320)
    tokenizer.chat_template = template
    return tokenizer


def test_a_model_with_another_chat_template_writes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Although its template ends messages with <|end|>, too."""
    foreign = "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    modes = {}
    for name, template in {"ours": chat_template.TEMPLATE, "none": None, "foreign": foreign}.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING, "bardlet"):
            html.write(tmp_path / name, model_of("gpt2", 320), with_template(template), {"title": "t", "notes": []})
        modes[name] = json.loads(re.search(r'id="spec">(.*?)</script>', (tmp_path / name).read_text(), re.S)[1])["mode"]
        assert ("the page continues texts instead of answering" in caplog.text) is (name == "foreign")
    assert modes == {"ours": "chat", "none": "write", "foreign": "write"}


# ---------------------------------------------------------------- an answer, token by token


@needs_node
def test_a_branch_goes_on_from_another_token(tmp_path: Path) -> None:
    """It keeps the limit, and it has the greedy tokens that follow; the token that ends texts ends this one."""
    tokenizer = tk.train_char(TEXT, True)
    model = model_of("gpt2", tokenizer.vocab_size, block_size=64)
    end = tokenizer.eos_id
    with torch.no_grad():
        model.transformer.wte.weight[end] = 0  # so that the model does not end by itself
    branches = [[4, 7], [11, 3], [6, end], [2, 5], [0, end]]
    got = run(tmp_path, model, tokenizer, branched={"prompt": [1], "limit": 12, "branches": branches})["branched"]
    ids = greedy(model, [[1]], 12)[0]
    for state, branch in zip(got, [None, *branches], strict=True):
        if branch:
            ids = ids[: branch[0]] + ([] if branch[1] == end else [branch[1]])
            ids += [] if branch[1] == end else greedy(model, [[1, *ids]], 12 - len(ids))[0] if len(ids) < 12 else []
        assert state == {"ids": ids, "shown": tokenizer.decode(ids), "text": tokenizer.decode(ids), "finished": True}


@needs_node
def test_a_branch_inside_a_character(tmp_path: Path) -> None:
    """The bytes of a character show when it is whole; what is left of one at the end is U+FFFD."""
    tokenizer = tokenizer_of("byte")
    first, second, third = "詩".encode()
    branches = [[0, first], [1, second], [2, third], [1, 65], [2, first]]
    got = run(tmp_path, model_of("gpt2", 256, block_size=64), tokenizer,
              branched={"prompt": [1], "limit": 3, "branches": branches})["branched"]
    assert got[3]["shown"] == "詩" and got[5]["shown"] == "\ufffdA\ufffd"
    for state in got:
        assert state["shown"] == state["text"] == bytes(state["ids"]).decode("utf-8", "replace")


@needs_node
@pytest.mark.parametrize("family", ["gpt2", "encdec", "dropout"])
def test_looks_that_were_dropped_are_computed_again(family: str, tmp_path: Path) -> None:
    """A page keeps those of the newest tokens; past the window, too, the others come out the same."""
    tokenizer = tk.train_bpe([TEXT] * 9, 320) if family == "encdec" else tokenizer_of("char")
    request = {"prompt": [tokenizer.pad_id], "source": [30, 40, tokenizer.eos_id]} if family == "encdec" else {
        "prompt": [1, 2, 3]}
    model = model_of(family, tokenizer.vocab_size)
    kept, again = run(tmp_path, model, tokenizer, looks={**request, "limit": 40})["looks"]
    assert kept["kept"] == len(kept["looks"]) and again["kept"] == 1 and len(kept["looks"]) > 1
    assert kept["looks"] == again["looks"]
    for width, look in zip(kept["widths"], kept["looks"], strict=True):
        assert {len(weights) for heads in look["attention"] for weights in heads} == {width}


@needs_node
def test_the_largest_numbers(tmp_path: Path) -> None:
    """Without sorting all; the first of equal numbers comes first, as in a stable sort."""
    numbers = torch.randn(2000, generator=torch.Generator().manual_seed(1)).mul(20).round().tolist()
    lists = [(numbers, 10), (numbers, 50), ([3.0, 1.0], 10), ([1.0, 1.0, 2.0, 2.0], 3)]
    got = run(tmp_path, model_of("gpt2", 4), tk.train_char("abcd", False), largest=lists)
    wanted = [sorted(range(len(x)), key=lambda i: -x[i])[:count] for x, count in lists]
    assert got["largest"] == wanted and got["argmax"] == [order[0] for order in wanted]


@needs_node
def test_the_error_function(tmp_path: Path) -> None:
    points = [x / 7 for x in range(-50, 51)]
    got = run(tmp_path, model_of("gpt2", 4), tk.train_char("abcd", False), erf=points)["erf"]
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64),
                               torch.erf(torch.tensor(points, dtype=torch.float64)), rtol=1e-13, atol=1e-15)


HOSTILE = ["</script><script>alert(1)</script>", "<!--", "\u202edlrow", "a\0b", "{{WEIGHTS}}", "]]>", "\ud800"]


def test_text_cannot_leave_its_place_in_the_page(tmp_path: Path) -> None:
    """In names and in tokens; the page may load nothing and run no other script."""
    tokenizer = tk.train_bpe(["".join(HOSTILE[:-1])] * 9, 400)
    model = model_of("gpt2", tokenizer.vocab_size)
    for text in HOSTILE:
        html.write(tmp_path / "a.html", model, tokenizer, {"title": text, "notes": [text]})
        page = (tmp_path / "a.html").read_text(encoding="utf-8")
        assert page.count("<script") == page.count("</script>") == 4 and "<!--" not in page
        spec = re.search(r'id="spec">(.*?)</script>', page, re.S)
        assert spec and json.loads(spec[1])["about"]["title"] == text
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
        assert policy and policy[1].startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy[1]


def test_the_page_is_little_more_than_the_weights(tmp_path: Path) -> None:
    """Base64 adds a third."""
    tokenizer = tokenizer_of("char")
    model = model_of("qwen3", tokenizer.vocab_size, n_embd=256, n_head=4, n_kv_head=4, head_dim=64, n_inner=1024)
    for dtype in html.DTYPES:
        html.write(tmp_path / "a.html", model, tokenizer, {"title": "t", "notes": []}, dtype=dtype)
        stored = len(html.pack(canonical.weights(model), dtype)[1])
        assert (tmp_path / "a.html").stat().st_size <= 1.36 * stored + 300_000


def test_what_the_page_cannot_run_is_one_sentence() -> None:
    tokenizer = tokenizer_of("char")
    with pytest.raises(BardletError, match="a reward model gives scores"):
        html.check(model_of("gpt2", tokenizer.vocab_size, scores=True), tokenizer)


def test_weights_that_no_browser_can_read_are_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It names a precision that fits."""
    tokenizer = tokenizer_of("char")
    model = model_of("gpt2", tokenizer.vocab_size)
    named = canonical.weights(model)
    sizes = {dtype: html.stored_bytes(named, dtype) for dtype in html.DTYPES}
    assert sizes == {dtype: len(html.pack(named, dtype)[1]) for dtype in html.DTYPES}
    for limit, dtype, advice in ((sizes["fp32"], "fp32", None), (sizes["fp16"], "fp32", "--dtype fp16"),
                                 (sizes["int8"], "fp16", "--dtype int8"), (sizes["int8"] - 4, "int8", "--to hf")):
        monkeypatch.setattr(html, "MAX_CHARACTERS", (limit + 2) // 3 * 4)
        if advice is None:
            html.check(model, tokenizer, dtype)
            continue
        with pytest.raises(BardletError, match=rf"MB in {dtype}, and .* MB from a page; use {advice}$"):
            html.write(tmp_path / "a.html", model, tokenizer, {"title": "t", "notes": []}, dtype=dtype)
    assert not (tmp_path / "a.html").exists()


@needs_node
def test_node_reads_as_long_a_text_as_the_check_says() -> None:
    done = subprocess.run([str(NODE), "-p", "buffer.constants.MAX_STRING_LENGTH"], capture_output=True, text=True)
    assert int(done.stdout) >= html.MAX_CHARACTERS


def test_a_weight_beyond_fp16_is_one_sentence(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("char")
    model = model_of("gpt2", tokenizer.vocab_size)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = -1e5
    for dtype in ("int8", "fp32"):
        html.write(tmp_path / dtype, model, tokenizer, {"title": "t", "notes": []}, dtype=dtype)
    with pytest.raises(BardletError, match=r"blocks.1.up.weight has a weight of size 100,000, .* use --dtype fp32"):
        html.write(tmp_path / "fp16", model, tokenizer, {"title": "t", "notes": []}, dtype="fp16")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = 65_504
    html.check(model, tokenizer, "fp16")
