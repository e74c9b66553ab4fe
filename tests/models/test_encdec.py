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
            "other activation": replace(CONFIG, activation="relu", n_head=2, n_kv_head=2, head_dim=16)}  # fmt: skip


def lively(config: ModelConfig = CONFIG, seed: int = 0) -> EncDec:
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


def some(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, CONFIG.vocab_size, (rows, width), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_parity_with_transformers_in_both_directions(variant: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    config = VARIANTS[variant]
    ours = lively(config)
    src, tgt, length = some(3, 20), some(3, 15, seed=1), torch.tensor([20, 7, 1])
    seen = torch.arange(20) < length[:, None]
    write_folder(ours, tmp_path / "ours")
    theirs, told = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told.values()), told
    want = theirs.eval()(input_ids=src, attention_mask=seen.long(), decoder_input_ids=tgt).logits
    torch.testing.assert_close(ours(src, tgt, length), want, **CLOSE)

    for name, parameter in theirs.named_parameters():  # other weights, so that the way back is seen to carry them
        if "embed_positions" not in name:
            parameter.mul_(1.5)
    theirs.save_pretrained(tmp_path / "theirs")
    back = EncDec.from_hf(json.loads((tmp_path / "theirs" / "config.json").read_text(encoding="utf-8")))
    assert back == config
    loaded = EncDec(back).eval()
    loaded.load_hf_state_dict(load_file(tmp_path / "theirs" / "model.safetensors"))
    want = theirs(input_ids=src, attention_mask=seen.long(), decoder_input_ids=tgt).logits
    torch.testing.assert_close(loaded(src, tgt, length), want, **CLOSE)
    assert not torch.allclose(loaded(src, tgt, length), ours(src, tgt, length))


@torch.no_grad()
def test_the_same_greedy_translations_as_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    ours = lively()
    write_folder(ours, tmp_path)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    sources = [[*some(1, n, seed=n)[0].tolist(), EOS] for n in (1, 3, 9, 9, 12)]
    for source, made in zip(sources, translate.translate(ours, sources, EOS, PAD), strict=True):
        src = torch.tensor([source])
        most = min(2 * len(source) + 20, CONFIG.block_size)
        want = theirs.generate(src, attention_mask=torch.ones_like(src), max_new_tokens=most, do_sample=False)
        assert made == [i for i in want[0, 1:].tolist() if i != EOS][: len(made)]
        assert len(made) == most or want[0, len(made) + 1] == EOS


def test_what_bardlet_does_not_compute_is_refused() -> None:
    hf = EncDec.to_hf(CONFIG) | IDS
    for key, value in (("scale_embedding", False), ("decoder_ffn_dim", 7), ("activation_function", "swish2"),
                       ("decoder_attention_heads", 1), ("d_model", 33), ("decoder_start_token_id", 5)):  # fmt: skip
        with pytest.raises(BardletError, match="config"):
            EncDec.from_hf(hf | {key: value})
    model, weights = lively(), lively().hf_state_dict()
    learned = {name: x + 0.1 if "embed_positions" in name else x for name, x in weights.items()}
    with pytest.raises(BardletError, match="sinusoids"):
        model.load_hf_state_dict(learned)
    with pytest.raises(BardletError, match="final_logits_bias"):
        model.load_hf_state_dict(weights | {"final_logits_bias": torch.ones(1, CONFIG.vocab_size)})


def test_positions_are_the_papers() -> None:
    table = sinusoids(50, 8)
    assert table.shape == (50, 8) and table.dtype == torch.float32
    torch.testing.assert_close(table[7, 1], torch.tensor(7 / 10_000 ** (2 / 8)).sin())
    torch.testing.assert_close(table[7, 4 + 3], torch.tensor(7 / 10_000 ** (6 / 8)).cos())


# ---------------------------------------------------------------- masks


@torch.no_grad()
def test_the_encoder_sees_both_ways_and_the_decoder_never_ahead() -> None:
    model, src, tgt = lively(), some(1, 12), some(1, 10, seed=1)
    before = model(src, tgt)
    for place in (0, 5, 11):  # every place of the source is seen by the first token of the target
        other = src.clone()
        other[0, place] = (other[0, place] - 1) % 27 + 2
        assert not torch.equal(model(other, tgt)[0, 0], before[0, 0])
    for place in range(10):
        other = tgt.clone()
        other[0, place] = (other[0, place] - 1) % 27 + 2
        after = model(src, other)
        torch.testing.assert_close(after[0, :place], before[0, :place], rtol=0, atol=1e-6)
        assert not torch.allclose(after[0, place], before[0, place])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 9), st.integers(0, 2**31))
@settings(max_examples=25)
def test_padding_changes_nothing_and_a_batch_is_its_rows(lengths: list[int], more: int, seed: int) -> None:
    model = lively()
    width = max(lengths) + more
    src, tgt, length = some(len(lengths), width, seed), some(len(lengths), 8, seed + 1), torch.tensor(lengths)
    with torch.no_grad():
        batched = model(src, tgt, length)
        for row, n in enumerate(lengths):
            alone = model(src[row : row + 1, :n], tgt[row : row + 1, :5])
            torch.testing.assert_close(batched[row : row + 1, :5], alone, **CLOSE)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 2**31))
@settings(max_examples=15)
def test_a_cache_changes_nothing(pieces: list[int], seed: int) -> None:
    model, src, length = lively(), some(2, 9, seed), torch.tensor([9, 4])
    tgt = some(2, sum(pieces), seed + 1)
    with torch.no_grad():
        memory, cache, start = model.encode(src, length), model.new_cache(2), 0
        whole = model.decode(tgt, memory)
        for n in pieces:
            part = model.decode(tgt[:, start : start + n], memory, cache)
            torch.testing.assert_close(part, whole[:, start : start + n], **CLOSE)
            start += n
        assert cache.length_B.tolist() == [start, start]


@torch.inference_mode()
def test_the_fast_decoder_is_the_decoder() -> None:
    model, src, length, tgt = lively(), some(3, 9), torch.tensor([9, 4, 1]), some(3, 40, seed=1)
    memory = model.encode(src, length)
    decode, whole = decoders.decoder(model), model.decode(tgt, memory)
    written = decode.begin(memory, 40)
    for t in range(40):
        torch.testing.assert_close(decode(tgt[:, t], written), whole[:, t], **CLOSE)
    with pytest.raises(BardletError, match="room for 40"):
        decode(tgt[:, 0], written)


@torch.inference_mode()
def test_beams_of_the_fast_decoder_move_with_their_history() -> None:
    model, src, length, tgt = lively(), some(2, 9), torch.tensor([9, 4]), some(2, 6, seed=1)
    memory = model.encode(src, length)
    decode = decoders.decoder(model)
    written = decode.begin(memory, 40)
    for t in range(3):
        decode(tgt[:, t], written)
    written.reorder(torch.tensor([0, 0, 1, 1]))  # two beams for each
    decode(torch.stack((tgt[0, 3], tgt[0, 4], tgt[1, 3], tgt[1, 4])), written)
    written.reorder(torch.tensor([1, 0, 2, 2]))
    written.select(torch.tensor([0]), 2)
    logits = decode(torch.tensor([5, 6]), written)
    alone = model.encode(src[:1], length[:1])
    for row, history in enumerate(([*tgt[0, :3], tgt[0, 4], 5], [*tgt[0, :4], 6])):
        want = model.decode(torch.tensor([history]), alone)[0, -1]
        torch.testing.assert_close(logits[row], want, **CLOSE)


@torch.no_grad()
def test_cross_attention_is_what_the_decoder_computes_with() -> None:
    model, src, length, tgt = lively(), some(2, 9), torch.tensor([9, 4]), some(2, 6, seed=1)
    maps = model.cross_attention(src, tgt, length)
    assert maps.shape == (2, 2, 4, 6, 9)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 4, 6))
    assert not maps[:, 1, :, :, 4:].any()
    block: Any = model.model.decoder.layers[0]
    seen: list[Any] = []
    hook = block.encoder_attn.out_proj.register_forward_hook(lambda m, x, y: seen.append(x[0]))
    memory = model.encode(src, length)
    model.decode(tgt, memory)
    hook.remove()
    want = (maps[0] @ memory.keys[0][1]).transpose(1, 2).reshape(2, 6, -1)
    torch.testing.assert_close(seen[0], want, **CLOSE)


# ---------------------------------------------------------------- search


def probable(model: EncDec, source: list[int], tokens: list[int]) -> float:
    """The sum of log p of a translation and its end."""
    src, tgt = torch.tensor([source]), torch.tensor([[PAD, *tokens]])
    logp = model(src, tgt)[0].log_softmax(-1)
    return float(sum(logp[t, i] for t, i in enumerate([*tokens, EOS])))


SOURCES = [[5, 9, 3, EOS], [7, EOS], [11, 12, 13, 14, 15, 16, EOS], [3, 3, EOS], [EOS]]


@given(st.lists(st.lists(st.integers(2, 28), max_size=9), min_size=1, max_size=6), st.integers(1, 5),
       st.integers(0, 2**31))  # fmt: skip
@settings(max_examples=15)
def test_beam_1_is_greedy_and_a_batch_is_one_by_one(lines: list[list[int]], beams: int, seed: int) -> None:
    from bardlet.inference import beam_search

    model, sources = lively(seed=seed), [[*line, EOS] for line in lines]
    with torch.no_grad():  # the end is likelier than elsewhere: of some lines at once, of some never
        end = model.model.shared.weight[EOS]
        model.model.decoder.layer_norm.bias.add_(end / end.norm())
    most = [2 * len(source) + 20 for source in sources]
    one = beam_search.beam(translate.EncDecReader(model, decoders.decoder(model), sources, PAD, max(most)), EOS, most, 1)
    assert one == translate.translate(model, sources, EOS, PAD, TranslateOptions())
    batched = translate.translate(model, sources, EOS, PAD, TranslateOptions(beams=beams))
    for source, made in zip(sources, batched, strict=True):
        assert [made] == translate.translate(model, [source], EOS, PAD, TranslateOptions(beams=beams))


@torch.no_grad()
def test_beam_search_finds_the_best_of_all_there_are() -> None:
    """With as many beams as there are prefixes nothing is lost: the result is the argmax over every translation."""
    from itertools import product

    from bardlet.inference import beam_search

    config = replace(CONFIG, vocab_size=5)
    torch.manual_seed(3)
    model = EncDec(config).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    most, source = 3, [3, 4, 2, EOS]
    others = [i for i in range(5) if i != EOS]
    for penalty in (0.0, 1.0):
        every = [list(p) for n in range(most) for p in product(others, repeat=n)]  # those that end within `most`
        best = max(every, key=lambda tokens: probable(model, source, tokens) / (len(tokens) + 1) ** penalty)
        cut = [list(p) for p in product(others, repeat=most)]

        def unended(tokens: list[int], penalty: float = penalty) -> float:
            logp = model(torch.tensor([source]), torch.tensor([[PAD, *tokens[:-1]]]))[0].log_softmax(-1)
            return float(sum(logp[t, i] for t, i in enumerate(tokens))) / most**penalty

        best_cut = max(cut, key=unended)
        score = probable(model, source, best) / (len(best) + 1) ** penalty
        wanted = best if score >= unended(best_cut) else best_cut
        wide = _Wide(translate.EncDecReader(model, decoders.decoder(model), [source], PAD, most), 200)
        assert beam_search.beam(wide, EOS, [most], 100, penalty) == [wanted]


@given(st.integers(1, 4), st.integers(1, 900), st.integers(1, 12), st.sampled_from([2, 1000]), st.integers(0, 2**31))
@settings(max_examples=200)
def test_the_largest_by_pieces_are_the_largest(rows: int, length: int, number: int, values: int, seed: int) -> None:
    """Of rows with few values, many of them equal, and of rows with -inf in them; each place is named once."""
    from bardlet.inference import beam_search

    for wide in (length, 16 * length):
        random = torch.Generator().manual_seed(seed)
        x = torch.randint(values, (rows, max(wide, number)), generator=random).float()
        x[x < values // 4] = -math.inf
        value, place = beam_search.largest(x, number)
        assert torch.equal(value, x.topk(number, dim=1)[0]) and torch.equal(x.gather(1, place), value)
        assert all(len(set(row)) == number for row in place.tolist())


class _Wide:
    """A reader with a vocabulary padded by tokens that are never taken, so that a search may have many beams."""

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


def test_too_long_and_damaged_are_said() -> None:
    model = lively()
    with pytest.raises(BardletError, match="65 tokens"):
        model.encode(some(1, 65))
    with torch.no_grad():
        model.model.shared.weight[3, 3] = float("nan")
    with pytest.raises(BardletError, match="not finite"):
        translate.translate(model, SOURCES, EOS, PAD)
