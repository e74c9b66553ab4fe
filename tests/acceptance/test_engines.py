"""The same tokens in every engine: ids of texts, and greedy continuations of trained models.

transformers and onnxruntime are in the test environment. Node.js runs the page. BARDLET_NODE_MODULES names a folder
node_modules with node-llama-cpp (llama.cpp). A first difference counts as equal only where bardlet's two best logits
differ by less than 1e-4; at most five for each engine and model, and each is printed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bardlet import tokenizer as tk
from bardlet.cli import main
from bardlet.export import export as exporting
from bardlet.export import gguf, html, onnx
from bardlet.inference import generate

NODE, MODULES = shutil.which("node"), os.environ.get("BARDLET_NODE_MODULES")
TOKENS, CONTEXT, CLOSE = 40, 64, 1e-4
TEXTS = {
    "english": "The bards of the village sang about rivers and kings. It's late, said 3 of them; they'll go home.\n",
    "russian": "Барды деревни пели о реках и королях. Уже поздно, сказали 3 из них; они пойдут домой.\n",
    "chinese": "村裡的詩人唱著河流和國王。天色已晚,其中三人說;他們會回家。\n",
}
MORE = ["def f(x):\n    return x * 2  # twice\n",
        "😀 emoji 👩‍👩‍👧 and naïve café", "  \n\n \t x", "東京 Москва Αθήνα", "I'LL 12345"]
MODELS = [(family, kind, language) for family in ("gpt2", "qwen3") for kind in ("char", "byte", "bpe")
          for language in (TEXTS if kind != "byte" else ("english", "chinese"))]


@dataclass
class Case:
    """A trained model, prompts, and bardlet's own answers."""

    folder: Path
    model: Any
    tokenizer: tk.Tokenizer
    texts: list[str]
    prompts: list[list[int]]
    completions: list[list[int]]


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Train a small model, and let bardlet continue 100 prompts."""
    family, kind, language = request.param
    folder = tmp_path_factory.mktemp("engine")
    lines = [TEXTS[language].replace("3", str(n % 10)) for n in range(400)]
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    assert main(["train", str(folder / "text.txt"), "--model", family, "--tokenizer", kind, "--steps", "60",
                 *(["--vocab-size", "400"] if kind == "bpe" else []), "--n-layer", "2", "--n-head", "4", "--n-embd",
                 "64", "--block-size", str(CONTEXT), "--batch-size", "16", "--compile", "off", "--dtype", "fp32",
                 "--out", str(folder / "run")]) == 0
    source = exporting.read(folder / "run")
    rng = np.random.default_rng(0)
    pool = "".join(lines) if kind == "char" else "".join(lines) + "".join(MORE) * 9
    texts = [pool[start:start + int(length)] for start, length in
             zip(rng.integers(0, len(pool) - 30, 100), rng.integers(1, 20, 100), strict=True)]
    texts += [] if kind == "char" else MORE
    prompts = [source.tokenizer.encode(text).tolist()[:20] for text in texts[:100]]
    completions = [generate.generate(source.model, [prompt], TOKENS, temperature=0)[0] for prompt in prompts]
    return Case(folder / "run", source.model, source.tokenizer, texts, prompts, completions)


def compare(case: Case, engine: str, got: list[list[int]]) -> None:
    """Assert that completions are bardlet's, but for near ties."""
    ties = []
    for prompt, ours, theirs in zip(case.prompts, case.completions, got, strict=True):
        if (at := next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)) is None:
            assert len(ours) == len(theirs), (engine, prompt)
            continue
        with torch.inference_mode():
            best = case.model(torch.tensor([[*prompt, *ours[:at]][-CONTEXT:]]))[0, -1].topk(2).values
        gap = float(best[0] - best[1])
        assert gap < CLOSE, f"{engine}: {prompt} differs at token {at}: {ours} {theirs}, where the gap is {gap}"
        ties.append(gap)
    if ties:
        print(f"{engine}: {len(ties)} near ties, gaps {ties}")
    assert len(ties) <= 5


def run_node(*command: str, **request: Any) -> dict[str, Any]:
    done = subprocess.run([str(NODE), *command], input=json.dumps(request), capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_transformers(case: Case) -> None:
    """One text at a time, and in padded batches, by the tokenizer's own padding."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(case.folder)
    assert [tokenizer(text)["input_ids"] for text in case.texts] == [
        case.tokenizer.encode(text).tolist() for text in case.texts]
    options = {"max_new_tokens": TOKENS, "do_sample": False, "temperature": None, "top_k": None}
    stops = case.tokenizer.eos_id
    assert stops is None or not any(stops in row for row in case.completions)
    alone = [model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                            **options)[0, len(prompt):].tolist() for prompt in case.prompts[:20]]
    few = Case(case.folder, case.model, case.tokenizer, [], case.prompts[:20], case.completions[:20])
    compare(few, "transformers", alone)
    padded = tokenizer.pad({"input_ids": case.prompts}, return_tensors="pt")
    batch = model.generate(**padded, **options)
    compare(case, "transformers, padded", batch[:, padded["input_ids"].shape[1]:].tolist())


def test_onnxruntime(case: Case, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    onnx.write(tmp_path / "model.onnx", case.model)
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    compare(case, "onnxruntime", [greedy_onnx(session, case.model.config, prompt) for prompt in case.prompts])


def greedy_onnx(session: Any, config: Any, prompt: list[int]) -> list[int]:
    """Continue a prompt, one token at a time with the cache."""
    names = [f"{n}.{kind}" for n in range(config.n_layer) for kind in ("key", "value")]
    cache: list[Any] = [np.zeros((1, config.n_kv_head, 0, config.head_dim), np.float32)] * len(names)
    ids, new = list(prompt), list(prompt)
    while len(ids) < len(prompt) + TOKENS:
        logits, *cache = session.run(None, {
            "input_ids": np.array([new]), "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids) - len(new), len(ids))[None],
            **{f"past_key_values.{name}": past for name, past in zip(names, cache, strict=True)}})
        new = [int(logits[0, -1].argmax())]
        ids += new
    return ids[len(prompt):]


@pytest.mark.skipif(NODE is None, reason="needs Node.js")
@pytest.mark.parametrize("dtype", ["fp32", "int8", "fp16"])
def test_page(case: Case, dtype: str, tmp_path: Path) -> None:
    """int8 and fp16 against bardlet with the same rounded weights."""
    html.write(tmp_path / "page.html", case.model, case.tokenizer, {"title": "", "notes": []}, dtype=dtype)
    script = str(Path(__file__).parents[1] / "export" / "page.mjs")
    got = run_node(script, str(tmp_path / "page.html"), prompts=case.prompts, texts=case.texts, tokens=TOKENS)
    assert got["ids"] == [case.tokenizer.encode(text).tolist() for text in case.texts]
    if dtype == "fp32":
        compare(case, "page", got["completions"])
        return
    original = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    try:
        with torch.no_grad():
            for parameter in case.model.parameters():
                parameter.copy_(html.rounded(parameter, dtype))
        ours = [generate.generate(case.model, [prompt], TOKENS, temperature=0)[0] for prompt in case.prompts]
        compare(Case(case.folder, case.model, case.tokenizer, [], case.prompts, ours), f"page {dtype}",
                got["completions"])
    finally:
        case.model.load_state_dict(original)


@pytest.mark.skipif(NODE is None or MODULES is None, reason="needs Node.js and BARDLET_NODE_MODULES")
def test_llama_cpp(case: Case, tmp_path: Path) -> None:
    gguf.write(tmp_path / "m.gguf", case.model, case.tokenizer, "m")
    stop = [] if case.tokenizer.eos_id is None else [case.tokenizer.eos_id]
    got = run_node(str(Path(__file__).with_name("llama.mjs")), str(MODULES), str(tmp_path / "m.gguf"), texts=case.texts,
                   prompts=case.prompts, tokens=TOKENS, context=CONTEXT, stop=stop)
    assert got["ids"] == [case.tokenizer.encode(text).tolist() for text in case.texts]
    compare(case, "llama.cpp", got["completions"])


