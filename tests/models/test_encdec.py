from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bardlet.config.model import ModelConfig
from bardlet.errors import BardletError
from bardlet.inference import decoders, translate
from bardlet.inference.translate import TranslateOptions
from bardlet.models.encdec import EncDec, sinusoids

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PAD, EOS = 1, 0
IDS = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD, "decoder_start_token_id": PAD,
       "forced_eos_token_id": None}  # fmt: skip
CONFIG = ModelConfig("encdec", vocab_size=29, block_size=64, n_layer=2, n_encoder_layer=3, n_head=4, n_kv_head=4,
                     n_embd=32, head_dim=8, n_inner=48, activation="gelu_new", norm_eps=1e-5)  # fmt: skip
VARIANTS = {"deeper encoder": CONFIG, "deeper decoder": replace(CONFIG, n_encoder_layer=1, n_layer=3),
            "other activation": replace(CONFIG, activation="relu", n_head=2, n_kv_head=2, head_dim=16),
            "unscaled embedding": replace(CONFIG, scale_embedding=False),
            "unscaled, deeper decoder": replace(CONFIG, scale_embedding=False, n_encoder_layer=1, n_layer=3),
            "unscaled, wider": replace(CONFIG, scale_embedding=False, n_embd=64, head_dim=16)}  # fmt: skip


def random_model(config: ModelConfig = CONFIG, seed: int = 0) -> EncDec:
    torch.manual_seed(seed)
    model = EncDec(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def write_folder(model: Any, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.to_hf(model.config) | IDS), encoding="utf-8")
    save_file(model.hf_state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def random_ids(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, CONFIG.vocab_size, (rows, width), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_parity_with_transformers_in_both_directions(variant: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    config = VARIANTS[variant]
    ours = random_model(config)
    src, tgt, length = random_ids(3, 20), random_ids(3, 15, seed=1), torch.tensor([20, 7, 1])
    seen = torch.arange(20) < length[:, None]
    write_folder(ours, tmp_path / "ours")
    theirs, loading_info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(loading_info.values()), loading_info
    expected = theirs.eval()(input_ids=src, attention_mask=seen.long(), decoder_input_ids=tgt).logits
    torch.testing.assert_close(ours(src, tgt, length), expected, **CLOSE)

    for name, parameter in theirs.named_parameters():  # change the weights, so that the way back has to carry them
        if "embed_positions" not in name:
            parameter.mul_(1.5)
    theirs.save_pretrained(tmp_path / "theirs")
    restored = EncDec.from_hf(json.loads((tmp_path / "theirs" / "config.json").read_text(encoding="utf-8")))
    assert restored == config
    loaded = EncDec(restored).eval()
    loaded.load_hf_state_dict(load_file(tmp_path / "theirs" / "model.safetensors"))
    expected = theirs(input_ids=src, attention_mask=seen.long(), decoder_input_ids=tgt).logits
    torch.testing.assert_close(loaded(src, tgt, length), expected, **CLOSE)
    assert not torch.allclose(loaded(src, tgt, length), ours(src, tgt, length))


@pytest.mark.parametrize("scale", [True, False])
@torch.no_grad()
def test_greedy_translations_match_transformers(scale: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    ours = random_model(replace(CONFIG, scale_embedding=scale))
    write_folder(ours, tmp_path)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    sources = [[*random_ids(1, n, seed=n)[0].tolist(), EOS] for n in (1, 3, 9, 9, 12)]
    for source, translation in zip(sources, translate.translate(ours, sources, EOS, PAD), strict=True):
        src = torch.tensor([source])
        max_tokens = min(2 * len(source) + 20, CONFIG.block_size)
        expected = theirs.generate(src, attention_mask=torch.ones_like(src), max_new_tokens=max_tokens, do_sample=False)
        assert translation == [i for i in expected[0, 1:].tolist() if i != EOS][: len(translation)]
        assert len(translation) == max_tokens or expected[0, len(translation) + 1] == EOS


def test_unsupported_checkpoints_are_refused() -> None:
    hf = EncDec.to_hf(CONFIG) | IDS
    for key, value in (("scale_embedding", "no"), ("decoder_ffn_dim", 7), ("activation_function", "swish2"),
                       ("decoder_attention_heads", 1), ("d_model", 33), ("decoder_start_token_id", 5)):  # fmt: skip
        with pytest.raises(BardletError, match="config"):
            EncDec.from_hf(hf | {key: value})
    model, weights = random_model(), random_model().hf_state_dict()
    learned_positions = {name: x + 0.1 if "embed_positions" in name else x for name, x in weights.items()}
    with pytest.raises(BardletError, match="sinusoids"):
        model.load_hf_state_dict(learned_positions)
    with pytest.raises(BardletError, match="final_logits_bias"):
        model.load_hf_state_dict(weights | {"final_logits_bias": torch.ones(1, CONFIG.vocab_size)})


def test_without_the_key_embeddings_are_not_scaled() -> None:
    """As in transformers, whose PegasusConfig has the default false; bardlet always writes the key."""
    from transformers import PegasusConfig

    hf = EncDec.to_hf(CONFIG) | IDS
    for values, scaled in ((hf, True), (hf | {"scale_embedding": False}, False),
                           ({name: value for name, value in hf.items() if name != "scale_embedding"}, False)):
        assert EncDec.from_hf(values).scale_embedding is PegasusConfig(**values).scale_embedding is scaled


def test_sinusoids_match_the_paper() -> None:
    table = sinusoids(50, 8)
    assert table.shape == (50, 8) and table.dtype == torch.float32
    torch.testing.assert_close(table[7, 1], torch.tensor(7 / 10_000 ** (2 / 8)).sin())
    torch.testing.assert_close(table[7, 4 + 3], torch.tensor(7 / 10_000 ** (6 / 8)).cos())


# ---------------------------------------------------------------- masks


@torch.no_grad()
def test_encoder_is_bidirectional_and_decoder_is_causal() -> None:
    model, src, tgt = random_model(), random_ids(1, 12), random_ids(1, 10, seed=1)
    before = model(src, tgt)
    for position in (0, 5, 11):  # the first token of the target sees the whole source
        other = src.clone()
        other[0, position] = (other[0, position] - 1) % 27 + 2
        assert not torch.equal(model(other, tgt)[0, 0], before[0, 0])
    for position in range(10):
        other = tgt.clone()
        other[0, position] = (other[0, position] - 1) % 27 + 2
        after = model(src, other)
        torch.testing.assert_close(after[0, :position], before[0, :position], rtol=0, atol=1e-6)
        assert not torch.allclose(after[0, position], before[0, position])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 9), st.integers(0, 2**31))
@settings(max_examples=25)
def test_padding_has_no_effect_and_a_batch_equals_its_rows(lengths: list[int], padding: int, seed: int) -> None:
    model = random_model()
    width = max(lengths) + padding
    src, tgt = random_ids(len(lengths), width, seed), random_ids(len(lengths), 8, seed + 1)
    length = torch.tensor(lengths)
    with torch.no_grad():
        batched = model(src, tgt, length)
        for row, n in enumerate(lengths):
            alone = model(src[row : row + 1, :n], tgt[row : row + 1, :5])
            torch.testing.assert_close(batched[row : row + 1, :5], alone, **CLOSE)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 2**31))
@settings(max_examples=15)
def test_cached_logits_equal_uncached(chunks: list[int], seed: int) -> None:
    model, src, length = random_model(), random_ids(2, 9, seed), torch.tensor([9, 4])
    tgt = random_ids(2, sum(chunks), seed + 1)
    with torch.no_grad():
        memory, cache, start = model.encode(src, length), model.new_cache(2), 0
        whole = model.decode(tgt, memory)
        for n in chunks:
            chunk = model.decode(tgt[:, start : start + n], memory, cache)
            torch.testing.assert_close(chunk, whole[:, start : start + n], **CLOSE)
            start += n
        assert cache.length_B.tolist() == [start, start]


@pytest.mark.parametrize("scale", [True, False])
@torch.inference_mode()
def test_fast_decoder_matches_the_model(scale: bool) -> None:
    model = random_model(replace(CONFIG, scale_embedding=scale))
    src, length, tgt = random_ids(3, 9), torch.tensor([9, 4, 1]), random_ids(3, 40, seed=1)
    memory = model.encode(src, length)
    decode, whole = decoders.decoder(model), model.decode(tgt, memory)
    cache = decode.new_cache(memory, 40)
    for t in range(40):
        torch.testing.assert_close(decode(tgt[:, t], cache), whole[:, t], **CLOSE)
    with pytest.raises(BardletError, match="full after 40 tokens"):
        decode(tgt[:, 0], cache)


@torch.inference_mode()
def test_fast_decoder_reorders_beams_with_their_history() -> None:
    model, src, length, tgt = random_model(), random_ids(2, 9), torch.tensor([9, 4]), random_ids(2, 6, seed=1)
    memory = model.encode(src, length)
    decode = decoders.decoder(model)
    cache = decode.new_cache(memory, 40)
    for t in range(3):
        decode(tgt[:, t], cache)
    cache.reorder(torch.tensor([0, 0, 1, 1]))  # two beams per source
    decode(torch.stack((tgt[0, 3], tgt[0, 4], tgt[1, 3], tgt[1, 4])), cache)
    cache.reorder(torch.tensor([1, 0, 2, 2]))
    cache.select(torch.tensor([0]), 2)
    logits = decode(torch.tensor([5, 6]), cache)
    alone = model.encode(src[:1], length[:1])
    for row, history in enumerate(([*tgt[0, :3], tgt[0, 4], 5], [*tgt[0, :4], 6])):
        expected = model.decode(torch.tensor([history]), alone)[0, -1]
        torch.testing.assert_close(logits[row], expected, **CLOSE)


@torch.no_grad()
def test_cross_attention_returns_the_weights_that_the_decoder_uses() -> None:
    model, src, length, tgt = random_model(), random_ids(2, 9), torch.tensor([9, 4]), random_ids(2, 6, seed=1)
    maps = model.cross_attention(src, tgt, length)
    assert maps.shape == (2, 2, 4, 6, 9)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 4, 6))
    assert not maps[:, 1, :, :, 4:].any()
    block: Any = model.model.decoder.layers[0]
    inputs: list[Any] = []
    hook = block.encoder_attn.out_proj.register_forward_hook(lambda m, x, y: inputs.append(x[0]))
    memory = model.encode(src, length)
    model.decode(tgt, memory)
    hook.remove()
    expected = (maps[0] @ memory.keys[0][1]).transpose(1, 2).reshape(2, 6, -1)
    torch.testing.assert_close(inputs[0], expected, **CLOSE)


# ---------------------------------------------------------------- search


def log_probability(model: EncDec, source: list[int], tokens: list[int]) -> float:
    """Return log p of a translation and its end."""
    src, tgt = torch.tensor([source]), torch.tensor([[PAD, *tokens]])
    logp = model(src, tgt)[0].log_softmax(-1)
    return float(sum(logp[t, i] for t, i in enumerate([*tokens, EOS])))


SOURCES = [[5, 9, 3, EOS], [7, EOS], [11, 12, 13, 14, 15, 16, EOS], [3, 3, EOS], [EOS]]


@given(st.lists(st.lists(st.integers(2, 28), max_size=9), min_size=1, max_size=6), st.integers(1, 5),
       st.integers(0, 2**31))  # fmt: skip
@settings(max_examples=15)
def test_beam_1_is_greedy_and_batching_changes_nothing(lines: list[list[int]], beams: int, seed: int) -> None:
    from bardlet.inference import beam_search

    model, sources = random_model(seed=seed), [[*line, EOS] for line in lines]
    with torch.no_grad():  # make the end likely: some translations end at once, some never
        end = model.model.shared.weight[EOS]
        model.model.decoder.layer_norm.bias.add_(end / end.norm())
    max_tokens = [2 * len(source) + 20 for source in sources]
    reader = translate.EncDecReader(model, decoders.decoder(model), sources, PAD, max(max_tokens))
    beam_1 = beam_search.beam(reader, EOS, max_tokens, 1)
    assert beam_1 == translate.translate(model, sources, EOS, PAD, TranslateOptions())
    batched = translate.translate(model, sources, EOS, PAD, TranslateOptions(beams=beams))
    for source, translation in zip(sources, batched, strict=True):
        assert [translation] == translate.translate(model, [source], EOS, PAD, TranslateOptions(beams=beams))


@torch.no_grad()
def test_wide_beam_search_is_exhaustive() -> None:
    """With as many beams as prefixes, the result is the argmax over all translations."""
    from itertools import product

    from bardlet.inference import beam_search

    config = replace(CONFIG, vocab_size=5)
    torch.manual_seed(3)
    model = EncDec(config).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    max_tokens, source = 3, [3, 4, 2, EOS]
    others = [i for i in range(5) if i != EOS]
    for penalty in (0.0, 1.0):
        ended = [list(p) for n in range(max_tokens) for p in product(others, repeat=n)]
        best = max(ended, key=lambda tokens: log_probability(model, source, tokens) / (len(tokens) + 1) ** penalty)
        cut = [list(p) for p in product(others, repeat=max_tokens)]

        def score_cut(tokens: list[int], penalty: float = penalty) -> float:
            logp = model(torch.tensor([source]), torch.tensor([[PAD, *tokens[:-1]]]))[0].log_softmax(-1)
            return float(sum(logp[t, i] for t, i in enumerate(tokens))) / max_tokens**penalty

        best_cut = max(cut, key=score_cut)
        score = log_probability(model, source, best) / (len(best) + 1) ** penalty
        expected = best if score >= score_cut(best_cut) else best_cut
        reader = _PaddedReader(translate.EncDecReader(model, decoders.decoder(model), [source], PAD, max_tokens), 200)
        assert beam_search.beam(reader, EOS, [max_tokens], 100, penalty) == [expected]


@given(st.integers(1, 4), st.integers(1, 900), st.integers(1, 12), st.sampled_from([2, 1000]), st.integers(0, 2**31))
@settings(max_examples=200)
def test_chunked_largest_matches_topk(rows: int, length: int, number: int, values: int, seed: int) -> None:
    """Rows with many equal values and with -inf; no index appears twice."""
    from bardlet.inference import beam_search

    for wide in (length, 16 * length):
        random = torch.Generator().manual_seed(seed)
        x = torch.randint(values, (rows, max(wide, number)), generator=random).float()
        x[x < values // 4] = -math.inf
        value, index = beam_search.largest(x, number)
        assert torch.equal(value, x.topk(number, dim=1)[0]) and torch.equal(x.gather(1, index), value)
        assert all(len(set(row)) == number for row in index.tolist())


class _PaddedReader:
    """A reader with a vocabulary padded by impossible tokens, so that a search can have many beams."""

    def __init__(self, reader: Any, width: int) -> None:
        self.reader, self.width = reader, width

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader, name)

    def first(self) -> torch.Tensor:
        return self._pad(self.reader.first())

    def next(self, idx: torch.Tensor) -> torch.Tensor:
        return self._pad(self.reader.next(idx.clamp(max=4)))

    def _pad(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(logits, (0, self.width - logits.shape[1]), value=-1e4)


def test_too_long_sources_and_nan_weights_raise() -> None:
    model = random_model()
    with pytest.raises(BardletError, match="65 tokens"):
        model.encode(random_ids(1, 65))
    with torch.no_grad():
        model.model.shared.weight[3, 3] = float("nan")
    with pytest.raises(BardletError, match="not finite"):
        translate.translate(model, SOURCES, EOS, PAD)
