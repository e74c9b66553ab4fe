"""Models whose tokenizer begins each text with a token, as Llama's: prompts, tasks and evaluations begin with it."""

from __future__ import annotations

import json
from pathlib import Path

import foreign_tokenizers as foreign
import pytest
import torch
import transformers
from folders import write_model

from bardlet import tokenizer as tk
from bardlet.api.evaluation import encode_corpus
from bardlet.api.models import Model, load
from bardlet.config.model import ModelConfig
from bardlet.data import corpus, shard_file, shards
from bardlet.evaluation.likelihood import encode_pair
from bardlet.inference import text_generation
from bardlet.inference.chat_session import ChatSession
from bardlet.models.llama import Llama
from bardlet.run import hf

PROMPT = "the Who, 12345"


@pytest.fixture(scope="module", params=["llama2", "mistral", "llama3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the tokenizer of another family, as transformers writes it."""
    folder = write_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")
    tokenizer = tk.load(foreign.write(folder, request.param))
    torch.manual_seed(1)
    model = Llama(ModelConfig("qwen3", vocab_size=tokenizer.vocab_size, block_size=64, n_layer=1, n_head=2, n_kv_head=2,
                              n_embd=16, head_dim=8, n_inner=64, activation="silu")).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.7)  # small weights repeat the last token
    hf.write_folder(folder, model, tokenizer)
    hf.write_weights(folder, model.hf_state_dict())
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder)


def test_greedy_text_is_that_of_transformers(folder: Path, model: Model) -> None:
    """From the same prompt tokens, streamed and as a whole, with the space before the first new word."""
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = peer(PROMPT, return_tensors="pt")
    prompt = inputs["input_ids"][0].tolist()
    assert model.prompt_ids(PROMPT) == prompt and model.prompt_ids("") == model.tokenizer.prefix_ids
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder).generate(
        **inputs, do_sample=False, max_new_tokens=20)[0].tolist()
    [ids] = text_generation.complete(model.module, model.tokenizer, [prompt], 20, temperature=0.0)
    assert prompt + ids == expected
    streamed = "".join(model.stream(PROMPT, 20, temperature=0))
    assert streamed == model.complete([PROMPT], 20, temperature=0)[0][0]
    assert PROMPT + streamed == model.tokenizer.decode(expected, skip_special=True)


def test_each_id_of_generation_config_ends_a_text(folder: Path, model: Model, tmp_path: Path) -> None:
    [ids] = text_generation.complete(model.module, model.tokenizer, [model.prompt_ids(PROMPT)], 20, temperature=0.0)
    end = next(i for i in ids[2:] if i not in ids[:2])
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [2, end]}))
    (tmp_path / "manifest.json").unlink()
    again = load(tmp_path)
    [shorter] = text_generation.complete(again.module, again.tokenizer, [again.prompt_ids(PROMPT)], 20, temperature=0.0)
    assert shorter == ids[: ids.index(end) + 1] and hf.stop_ids(again.tokenizer) == [2, end]


def test_a_base_model_reads_its_first_token_however_long_the_chat(model: Model) -> None:
    session = ChatSession(model.module, model.tokenizer, tokens=8)
    session.messages = [{"role": "user", "content": PROMPT}]
    assert session._prompt() == model.prompt_ids(PROMPT)
    session.messages = [{"role": "user", "content": PROMPT * 20}]
    prompt, whole = session._prompt(), model.prompt_ids(PROMPT * 20)
    assert len(prompt) == 64 - 8 and prompt[:1] == model.tokenizer.prefix_ids and prompt[1:] == whole[-55:]


def test_tasks_and_texts_begin_with_it(model: Model, tmp_path: Path) -> None:
    tokenizer, prefix = model.tokenizer, model.tokenizer.prefix_ids
    context, continuation = encode_pair(tokenizer, "the day ", "Who")
    assert [*context, *continuation] == model.prompt_ids("the day Who") and context[0] == prefix[0]
    assert encode_pair(tokenizer, "", "the")[0] == prefix
    (tmp_path / "a.txt").write_text(foreign.PROSE)
    tokens, characters, size, _ = encode_corpus(corpus.find((str(tmp_path / "a.txt"),), "text"), tokenizer)
    assert tokens.tolist() == model.prompt_ids(foreign.PROSE)
    assert characters == len(foreign.PROSE) and tokenizer.measure(tokens) == (characters, size)


def test_each_document_of_a_training_text_begins_with_it(model: Model, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Short documents, which are encoded together, and long ones."""
    tokenizer = model.tokenizer
    (tmp_path / "a.txt").write_text("<|endoftext|>".join([foreign.PROSE, "the", "Who, the", foreign.PROSE] * 20))
    text = corpus.find((str(tmp_path / "a.txt"),), "text")
    expected = [[*model.prompt_ids(document), tokenizer.eos_id] for document in text.documents("train")]
    for limit in (shard_file.PIECE, 20):
        monkeypatch.setattr(shard_file, "PIECE", limit)
        data = shards.tokenize_corpus(text, tokenizer, cache=tmp_path / str(limit))
        assert data.train.tolist() == [i for ids in expected for i in ids]


def test_a_tokenizer_with_another_last_token_has_tokens_of_its_own(tmp_path: Path) -> None:
    """A base model and its chat model may share tokenizer.json, but end a text with different tokens."""
    (tmp_path / "a.txt").write_text((foreign.PROSE + "<|endoftext|>") * 50)
    text = corpus.find((str(tmp_path / "a.txt"),), "text")
    for eos in ("<|endoftext|>", "<|im_end|>", "<|endoftext|>"):
        tokenizer = foreign.load(tmp_path / eos.strip("<|>"), "smollm2", eos_token=eos)
        tokenizer.stop_ids = (*tokenizer.stop_ids, 3)
        data = shards.tokenize_corpus(text, tokenizer, cache=tmp_path / "cache")
        assert set(data.train[-1:].tolist()) == {tokenizer.vocab[eos]} and data.tokenizer is tokenizer
