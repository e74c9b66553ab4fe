"""The same tokens in every engine: ids of texts, and greedy completions of trained models.

transformers 5 and onnxruntime are in the test environment, and Node.js runs the page. Variables name the rest:

    BARDLET_TRANSFORMERS_4  a folder of `pip install --target`, with transformers 4.57 and what it needs
    BARDLET_NODE_MODULES    a folder node_modules, with node-llama-cpp and @huggingface/transformers
    BARDLET_ENGINE_MODELS   a folder for the trained models, to keep them
    BARDLET_ENGINES         a file to which each comparison adds a line, for `docs/engine_table.py`

`make engines` prepares the folders in .engines and sets the variables.

A first difference counts as equal only where bardlet's two best logits differ by less than 1e-4; at most five for an
engine over all models, and each is in the line.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import foreign_tokenizers
import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from browser import CHROMIUM, Browser
from engines import cases
from engines.cases import Case, Outcome, compare
from engines.programs import run
from export.test_page import RELATIVES, model_of
from tokenizers import AddedToken

from bardlet.errors import BardletError
from bardlet.export import export, gguf, html, onnx
from bardlet.inference import generate
from bardlet.tokenizer import train_char

HERE = Path(__file__).parent / "engines"
NODE, GO, MODULES = shutil.which("node"), shutil.which("go"), os.environ.get("BARDLET_NODE_MODULES")
TRANSFORMERS_4 = os.environ.get("BARDLET_TRANSFORMERS_4")
ALL = [*cases.BASES, *cases.CHATS, *cases.REWARDS, *cases.TRANSLATORS]
MOST_TIES = 5
TIES: defaultdict[str, list[float]] = defaultdict(list)
"""The near ties of each engine in this session, over all models."""
needs_node = pytest.mark.skipif(NODE is None, reason="needs Node.js")
needs_modules = pytest.mark.skipif(NODE is None or MODULES is None, reason="needs Node.js and BARDLET_NODE_MODULES")


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.KEPT or tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=ALL)
def case(request: pytest.FixtureRequest, parent: Path) -> Case:
    return cases.build(request.param, parent)


@pytest.fixture
def writes(case: Case) -> Case:
    """A case that writes text from left to right."""
    if case.name in (*cases.REWARDS, *cases.TRANSLATORS):
        pytest.skip("for language models")
    return case


def record(case: Case, engine: str, version: str, outcome: Outcome, **more: Any) -> None:
    """Add a line to the file of results, if there is one, and count the near ties of the engine."""
    if file := os.environ.get("BARDLET_ENGINES"):
        commit = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=HERE, capture_output=True, text=True)
        line = {"date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(),
                "model": case.name, "engine": engine, "version": version, "texts": outcome.texts,
                "prompts": outcome.prompts, "ties": outcome.ties, **more}
        with open(file, "a", encoding="utf-8") as results:
            results.write(json.dumps(line) + "\n")
    if outcome.ties:
        print(f"{engine}, {case.name}: first differences at near ties, gaps {outcome.ties}")
    TIES[engine] += outcome.ties
    assert len(TIES[engine]) <= MOST_TIES, f"{engine}: {TIES[engine]}"


# ---------------------------------------------------------------------------- engines


def test_transformers(case: Case) -> None:
    """One text at a time, and in padded batches, by the tokenizer's own padding."""
    pytest.importorskip("transformers")
    from engines import run_transformers

    check_transformers(case, run_transformers.answer(str(case.folder), case.request()))


@pytest.mark.skipif(TRANSFORMERS_4 is None, reason="needs BARDLET_TRANSFORMERS_4")
def test_transformers_4(case: Case) -> None:
    answer = run(sys.executable, HERE / "run_transformers.py", case.folder, request=case.request(),
                 PYTHONPATH=str(TRANSFORMERS_4))
    assert answer["version"].startswith("4.")
    check_transformers(case, answer)


def check_transformers(case: Case, answer: dict[str, Any]) -> None:
    """Compare what `run_transformers.py` answers."""
    engine = f"transformers {answer['version'].partition('.')[0]}"
    if case.name in cases.REWARDS:
        with torch.inference_mode():
            ours = [float(case.model(torch.tensor([ids]), torch.tensor([len(ids)]))[0]) for ids in case.ids]
        assert answer["ids"] == case.ids
        assert answer["scores"] == pytest.approx(ours, abs=1e-4)
        assert answer["padded"] == pytest.approx(ours, abs=1e-4)
        record(case, engine, answer["version"], Outcome(len(case.texts)))
        return
    record(case, engine, answer["version"], compare(case, answer))
    record(case, f"{engine}, padded", answer["version"], compare(case, answer, "padded"))


def test_onnxruntime(writes: Case, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    onnx.write(tmp_path / "model.onnx", writes.model)
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    config = writes.model.config
    got = [greedy_onnx(session, config, prompt, writes.stops) for prompt in writes.prompts]
    record(writes, "onnxruntime", ort.__version__, compare(writes, {"completions": got}))


def greedy_onnx(session: Any, config: Any, prompt: list[int], stops: list[int],
                tokens: int = cases.TOKENS) -> list[int]:
    """Continue a prompt, one token at a time with the cache."""
    names = [f"{n}.{kind}" for n in range(config.n_layer) for kind in ("key", "value")]
    cache: list[Any] = [np.zeros((1, config.n_kv_head, 0, config.head_dim), np.float32)] * len(names)
    ids, new = list(prompt), list(prompt)
    for _ in range(tokens):
        logits, *cache = session.run(None, {
            "input_ids": np.array([new]), "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids) - len(new), len(ids))[None],
            **{f"past_key_values.{name}": past for name, past in zip(names, cache, strict=True)}})
        new = [int(logits[0, -1].argmax())]
        ids += new
        if new[0] in stops:
            break
    return ids[len(prompt):]


@needs_modules
def test_llama_cpp(writes: Case, tmp_path: Path) -> None:
    """gpt2 against bardlet with ggml's GELU, which is a table of 16-bit numbers.

    In fp32, at most 5 of 100 prompts differ, and first where the two best logits differ by less than 2e-3: on these
    models, the table moves a logit by up to 1.5e-3.
    """
    gguf.write(tmp_path / "m.gguf", writes.model, writes.tokenizer, "m")
    answer = run(NODE, HERE / "llama.mjs", MODULES, tmp_path / "m.gguf", request=writes.request())
    gpt2 = writes.model.config.model == "gpt2"
    differ = compare(writes, answer, close=2e-3 if gpt2 else cases.CLOSE).ties
    assert len(differ) <= 0.05 * len(writes.prompts), differ
    case = with_ggml_gelu(writes) if gpt2 else writes
    record(writes, "llama.cpp", answer["version"], compare(case, answer), differ=len(differ))


def with_ggml_gelu(case: Case) -> Case:
    """Return the case with a model that computes GELU as ggml does on a processor, and with its answers."""
    def gelu(x: torch.Tensor) -> torch.Tensor:
        rounded = F.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, rounded))

    changed = dataclasses.replace(case, model=copy.deepcopy(case.model))
    for module in changed.model.modules():
        if hasattr(module, "act"):
            module.act = gelu
    changed.completions = cases.answers(changed)
    return changed


@pytest.fixture
def onnx_folder(writes: Case, tmp_path: Path) -> Path:
    """What `bardlet export --to onnx` writes, in a folder with the name of the case."""
    return export.export(writes.folder, "onnx", tmp_path / writes.name)[0]


def as_others_read(case: Case) -> Case:
    """Return the case with more texts, and ids of the library tokenizers.

    It reads "<|end|>" in a text as the special token, as transformers.js always does, and a tokenizer of characters
    replaces unknown ones there. All other ids are bardlet's.
    """
    library = tokenizers.Tokenizer.from_file(str(case.folder / "tokenizer.json"))
    texts = [*case.texts, *cases.OTHERS, "<|end|> is text", "a<|endoftext|>b"]
    ids = [library.encode(text).ids for text in texts]
    for text, ours, theirs in zip(case.texts, case.ids, ids, strict=False):
        assert ours == theirs or any(name in text for name in case.tokenizer.special.values())
    return dataclasses.replace(case, texts=texts, ids=ids)


@needs_modules
def test_transformers_js(writes: Case, onnx_folder: Path) -> None:
    case = as_others_read(writes)
    answer = run(NODE, HERE / "transformers.mjs", MODULES, onnx_folder, request=case.request())
    record(case, "transformers.js, Node", answer["version"], compare(case, answer))
    record(case, "transformers.js, Node, padded", answer["version"], compare(case, answer, "padded"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    running = Browser(tmp_path_factory.mktemp("profile"), loopback=True)
    yield running
    running.close()


@pytest.mark.skipif(CHROMIUM is None or MODULES is None, reason="needs Chromium on the path and BARDLET_NODE_MODULES")
def test_transformers_js_in_chromium(writes: Case, onnx_folder: Path, browser: Browser) -> None:
    """The file that a page loads from a CDN, and onnxruntime's WebAssembly; the first 20 prompts, for time."""
    case = as_others_read(writes)
    first = dataclasses.replace(case, prompts=case.prompts[:20], completions=case.completions[:20])
    root = onnx_folder.parent
    (root / "modules").symlink_to(MODULES or "")
    (root / "engines").symlink_to(HERE)
    with served(root) as address:
        browser.open(f"{address}/engines/transformers.html", 1280, "light")
        answer = browser.value(f"answer({json.dumps(writes.name)}, {json.dumps(first.request())})")
    sent = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert any(url.endswith("model.onnx") for url in sent)
    assert all(url.startswith((address, "blob:", "data:")) for url in sent), sent
    record(first, "transformers.js, Chromium", answer["version"], compare(first, answer))
    record(first, "transformers.js, Chromium, padded", answer["version"], compare(first, answer, "padded"))


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder at an address of this machine."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@needs_node
@pytest.mark.parametrize("dtype", ["fp32", "int8", "fp16"])
def test_page(case: Case, dtype: str, tmp_path: Path) -> None:
    """int8 and fp16 against bardlet with the same rounded weights."""
    if case.name in cases.REWARDS:
        pytest.skip("a reward model writes nothing")
    html.write(tmp_path / "page.html", case.model, case.tokenizer, {"title": "", "notes": []}, dtype=dtype)
    request = case.request()
    if case.name in cases.TRANSLATORS:
        request = {**request, "prompts": [], "sources": case.prompts}
    answer = run(NODE, HERE.parents[1] / "export" / "page.mjs", tmp_path / "page.html", request=request)
    answer = {"ids": answer["ids"], "completions": answer["completions"] or answer["translations"],
              "chat_ids": answer["chats"]}
    with rounded(case, dtype):
        record(case, f"page, {dtype}", "", compare(case, answer))


IN_CHROMIUM = """(async ({ texts, prompts, chats, tokens }) => {
  const { model, tokenizer, spec } = page, translates = spec.mode === "translate";
  Object.assign(page.temperature, { value: 0 });
  Object.assign(page.length, { value: tokens });
  const submit = (typed) => { // as a visitor does, at the beginning of a conversation
    Object.assign(page, { messages: [], answer: null });
    page.input.value = typed;
    page.submit();
    return page.answer;
  };
  const { constructor: Answer, choose } = submit(texts.find((text) => text.trim()));
  const completions = [];
  for (const prompt of prompts) {
    const answer = new Answer(page, "");
    page.answer = answer;
    await answer.write(translates ? [spec.tokenizer.special["<|pad|>"]] : prompt, translates ? prompt : null, choose,
      tokens);
    completions.push(answer.ids);
  }
  return { completions, ids: texts.map((text) => tokenizer.encode(text).ids),
    chat_ids: chats.map(([{ content }]) => submit(content).prompt) };
})"""
"""What the page's own objects answer, without the end token of a completion."""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the path")
def test_page_in_chromium(case: Case, browser: Browser, tmp_path: Path) -> None:
    """The file in a browser, from the disk, in fp32; the first 20 prompts, for time."""
    if case.name in cases.REWARDS:
        pytest.skip("a reward model writes nothing")
    html.write(tmp_path / "page.html", case.model, case.tokenizer, {"title": "", "notes": []}, dtype="fp32")
    ends = case.stops or [case.tokenizer.eos_id]
    ours = [row[:-1] if row[-1] in ends else row for row in case.completions[:20]]
    first = dataclasses.replace(case, prompts=case.prompts[:20], completions=ours)
    browser.open(tmp_path / "page.html", 1280, "light")
    while not browser.value("Boolean(globalThis.page)"):
        time.sleep(0.02)
    answer = browser.value(f"{IN_CHROMIUM}({json.dumps(first.request())})")
    version = browser.value("navigator.userAgent.match(/Chrome.([0-9]+)/)[1]")
    sent = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert sent == [(tmp_path / "page.html").as_uri()]
    record(first, "page, Chromium", f"Chromium {version}", compare(first, answer))


@contextlib.contextmanager
def rounded(case: Case, dtype: str) -> Iterator[None]:
    """Round the weights of the model as the page does, and let bardlet answer with them."""
    if dtype == "fp32":
        yield
        return
    weights, completions = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}, case.completions
    try:
        with torch.no_grad():
            for parameter in case.model.parameters():
                parameter.copy_(html.rounded(parameter, dtype))
        case.completions = cases.answers(case)
        yield
    finally:
        case.model.load_state_dict(weights)
        case.completions = completions


@pytest.mark.skipif(GO is None, reason="needs Go")
def test_modelfile(writes: Case, tmp_path: Path) -> None:
    """Ollama's prompt is the conversation in bardlet's template, and it stops where bardlet does."""
    tokenizer = writes.tokenizer
    (tmp_path / "Modelfile").write_text(gguf.modelfile("m.gguf", tokenizer, cases.CONTEXT), encoding="utf-8")
    chats = [*writes.chats, [{"role": "system", "content": "Be brief."},
                             {"role": "user", "content": 'Say "hi"\n{{ 1 }}'}, {"role": "assistant", "content": "hi"},
                             {"role": "user", "content": "再见 <b>"}]]
    answer = run(GO, "run", HERE / "ollama.go", tmp_path / "Modelfile", request=chats)
    assert set(answer["stops"]) == {tokenizer.special[i] for i in writes.stops}
    if not writes.chats:
        assert answer["prompts"] == [chat[-1]["content"] for chat in chats]
        return
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(writes.folder)
    assert answer["prompts"] == [theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
                                 for chat in chats]


@needs_modules
@pytest.mark.parametrize("name", ["smollm2", "llama3", "qwen2"])
def test_llama_cpp_has_the_ids_of_tokenizers_from_elsewhere(name: str, tmp_path: Path) -> None:
    """Added tokens in a text, too. A text of composed characters: llama.cpp does not compose them as Qwen2 does."""
    tokenizer = foreign_tokenizers.with_added(name, AddedToken("<tool_call>", normalized=False),
                                              AddedToken("</tool_call>", normalized=False), AddedToken("bards"))
    model = model_of("llama", tokenizer.vocab_size, activation="silu")
    gguf.write(tmp_path / "m.gguf", model, tokenizer, "m")
    texts = [*foreign_tokenizers.TEXTS, "a<tool_call> b</tool_call>\n<tool_call><tool_call", "the bards, bardsbards"]
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    request = {"texts": texts, "prompts": [], "tokens": 1, "context": 16, "chats": []}
    answer = run(NODE, HERE / "llama.mjs", MODULES, tmp_path / "m.gguf", request=request)
    assert answer["ids"] == [tokenizer.encode(text).tolist() for text in texts]
    assert all(tokenizer.vocab[token] in answer["ids"][n] for n, token in ((-2, "<tool_call>"), (-1, "bards")))


ODD = {
    "two tokens, width 8": ("gpt2", {"n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 8, "block_size": 8}),
    "untied, width 10": ("gpt2", {"n_head": 5, "n_kv_head": 5, "n_embd": 10, "head_dim": 2, "tie_embeddings": False}),
    "inner width 7": ("gpt2", {"n_inner": 7}),
    "rotary, two tokens, width 8": ("qwen3", {"activation": "silu", "n_layer": 1, "n_embd": 8, "n_head": 1,
                                              "n_kv_head": 1, "block_size": 8}),
    "grouped 6 to 1, heads of 6": ("qwen3", {"activation": "silu", "n_head": 6, "n_kv_head": 1, "head_dim": 6}),
    "untied, grouped 3 to 1": ("qwen3", {"activation": "silu", "n_head": 3, "n_kv_head": 1, "tie_embeddings": False,
                                         "n_inner": 5}),
    "a block of q8_0": ("qwen3", {"activation": "silu", "n_head": 1, "n_kv_head": 1, "n_embd": 32, "head_dim": 32,
                                  "n_inner": 32}),
    **RELATIVES,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes(name: str, tmp_path: Path) -> None:
    """Every engine writes the same in fp32, and loads the smaller formats; q8_0 needs widths divisible by 32."""
    ort = pytest.importorskip("onnxruntime")
    family, changes = ODD[name]
    tokenizer = train_char("ab" if "two tokens" in name else "abcdefg", separator=False)
    model = model_of(family, tokenizer.vocab_size, **changes)
    prompts = [[0], [1, 1], [1, 0, 1]]
    ours = [generate.generate(model, [prompt], 5, temperature=0)[0] for prompt in prompts]
    case = Case(name, tmp_path, model, tokenizer, ["abba"], prompts, [], ids=[[0, 1, 1, 0]], completions=ours)
    onnx.write(tmp_path / "model.onnx", model)
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    compare(case, {"completions": [greedy_onnx(session, model.config, prompt, [], 5) for prompt in prompts]})
    request = {**case.request(), "tokens": 5, "context": model.config.block_size}
    if NODE:
        for dtype in ("fp32", "int8", "fp16"):
            html.write(tmp_path / "page.html", model, tokenizer, {"title": "", "notes": []}, dtype=dtype)
            answer = run(NODE, HERE.parents[1] / "export" / "page.mjs", tmp_path / "page.html", request=request)
            same_or_loads(case, answer, dtype == "fp32")
    for dtype in gguf.DTYPES:
        if dtype == "q8_0" and name != "a block of q8_0":
            with pytest.raises(BardletError, match=f"{model.config.n_embd} .*cannot be divided by 32"):
                gguf.write(tmp_path / "m.gguf", model, tokenizer, "m", dtype)
            continue
        gguf.write(tmp_path / "m.gguf", model, tokenizer, "m", dtype)
        if NODE and MODULES:
            answer = run(NODE, HERE / "llama.mjs", MODULES, tmp_path / "m.gguf", request=request)
            same_or_loads(case, answer, dtype == "f32")


def same_or_loads(case: Case, answer: dict[str, Any], exact: bool) -> None:
    """Assert that an engine writes the same if its weights are exact, and otherwise has the ids and as many tokens."""
    if exact:
        compare(case, answer)
    else:
        assert answer["ids"] == case.ids
        assert [len(row) for row in answer["completions"]] == [5] * len(case.prompts)
