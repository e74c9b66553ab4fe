from __future__ import annotations

import itertools

import pytest
import torch

from bardlet.config import ModelConfig
from bardlet.errors import BardletError
from bardlet.models import FAMILIES, build, load_class
from bardlet.models.ladder import Bigram

CONFIG = ModelConfig("bigram", vocab_size=7, block_size=5)


def test_a_bigram_looks_up_the_row_of_the_current_token() -> None:
    torch.manual_seed(0)
    model = Bigram(CONFIG)
    idx = torch.tensor([[3, 1, 3], [0, 6, 2]])
    assert torch.equal(model(idx), model.token_embedding_table.weight[idx])
    assert torch.equal(model.logits(model.states(idx)), model(idx))


def test_a_bigram_counts_as_it_goes() -> None:
    model = Bigram(CONFIG)
    cache = model.new_cache(2)
    model(torch.zeros(2, 3, dtype=torch.int64), cache=cache)
    assert cache.length_B.tolist() == [3, 3] and cache.k.numel() == 0
    with pytest.raises(BardletError, match="6 tokens do not fit in a context of 5"):
        model(torch.zeros(2, 3, dtype=torch.int64), cache=cache)


def test_a_bigram_learns_the_counts_of_its_text() -> None:
    """The best table holds the log-frequencies of the pairs: gradient descent must find them."""
    torch.manual_seed(0)
    text = torch.tensor([0, 1, 2, 0, 1, 1, 2, 0, 2, 2, 0, 1, 2])
    model = Bigram(ModelConfig("bigram", vocab_size=3, block_size=16))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(400):
        loss = torch.nn.functional.cross_entropy(model(text[None, :-1])[0], text[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    counts = torch.zeros(3, 3)
    for a, b in itertools.pairwise(text):
        counts[a, b] += 1
    learned = model.token_embedding_table.weight.softmax(-1)
    torch.testing.assert_close(learned, counts / counts.sum(-1, keepdim=True), rtol=0, atol=0.01)


def test_a_bigram_goes_through_its_files_unchanged() -> None:
    model, other = Bigram(CONFIG), Bigram(Bigram.from_hf(Bigram.to_hf(CONFIG)))
    assert Bigram.to_hf(other.config) == Bigram.to_hf(CONFIG)
    other.load_hf_state_dict(model.hf_state_dict())
    assert torch.equal(model.token_embedding_table.weight, other.token_embedding_table.weight)
    with pytest.raises(BardletError, match=r"no 'token_embedding_table\.weight'"):
        model.load_hf_state_dict({})
    with pytest.raises(BardletError, match="model_type"):
        Bigram.from_hf({"model_type": "gpt2", "vocab_size": 7, "max_position_embeddings": 5})


def test_families_are_found_by_name() -> None:
    for name in FAMILIES:
        model = build(ModelConfig(name, vocab_size=7, block_size=4, n_layer=1, n_head=2, n_kv_head=2, n_embd=8,
                                  head_dim=4, n_inner=16))  # fmt: skip
        assert type(model) is load_class(name) and model(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, 7)
    with pytest.raises(BardletError, match="no model 'gpt5': choose one of bigram, gpt2, qwen3"):
        load_class("gpt5")
