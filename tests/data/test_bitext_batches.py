from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bardlet.config.pretraining import TranslationConfig
from bardlet.config.stages import NAMED_PAIRS
from bardlet.data import bitext, bitext_batches
from bardlet.data.bitext_batches import PairBatches, PairFormat, TokenizedLines
from bardlet.errors import BardletError
from bardlet.training.losses import IGNORE

PAD, EOS = 1, 0


def lines_of(lengths: list[int], seed: int = 0) -> TokenizedLines:
    """Lines of such lengths, their separator among them, of ids from 2 on."""
    random = np.random.default_rng(seed)
    tokens = np.concatenate([[*random.integers(2, 60, n - 1), EOS] for n in lengths]).astype("<u2")
    return TokenizedLines(tokens, np.cumsum(lengths))


LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 300), st.integers(0, 5), st.integers(1, 3), st.booleans())
@settings(max_examples=60)
def test_an_epoch_has_every_pair_once(sizes: list[tuple[int, int]], tokens: int, seed: int, multiple: int,
                                      joined: bool) -> None:  # fmt: skip
    lines = lines_of([a for a, _ in sizes]), lines_of([b for _, b in sizes], 1)
    batches = PairBatches(lines, PairFormat(PAD, 80, joined), tokens, seed, multiple)
    for epoch in (0, 1, 7):
        made = batches.epoch(epoch)
        assert len(made) == batches.batches_per_epoch
        assert sorted(np.concatenate(made).tolist()) == list(range(len(sizes)))
    for step in range(2 * batches.batches_per_epoch):
        batch = batches.batch(step)
        rows, width = batch["target"].shape
        assert rows % multiple == 0
        real = rows - sum((row == IGNORE).all() for row in batch["target"])
        assert real * width <= max(tokens, width)
        again = PairBatches(lines, PairFormat(PAD, 80, joined), tokens, seed, multiple).batch(step)
        assert all(torch.equal(batch[name], again[name]) for name in batch)


@given(LENGTHS, st.integers(0, 5))
@settings(max_examples=40)
def test_a_batch_holds_its_pairs_whole(sizes: list[tuple[int, int]], seed: int) -> None:
    lines = lines_of([a for a, _ in sizes]), lines_of([b for _, b in sizes], 1)
    which = np.random.default_rng(seed).permutation(len(sizes))[:5]
    beside = PairFormat(PAD, 80).batch(lines, which)
    joined = PairFormat(PAD, 80, joined=True).batch(lines, which)
    for row, number in enumerate(which):
        source, target = (side.line(number).tolist() for side in lines)
        n = int(beside["source_length"][row])
        assert beside["source"][row, :n].tolist() == source and (beside["source"][row, n:] == PAD).all()
        goal = beside["target"][row]
        assert goal[goal != IGNORE].tolist() == target
        assert beside["idx"][row, : len(target)].tolist() == [PAD, *target[:-1]]
        both = source + target
        assert joined["idx"][row, : len(both) - 1].tolist() == both[:-1]
        goal = joined["target"][row]
        assert goal[goal != IGNORE].tolist() == target and int(joined["prefix"][row]) == len(source)
        assert (goal[: len(source) - 1] == IGNORE).all() and goal[len(source) - 1] == target[0]


def test_rows_that_fill_up_have_no_targets_and_real_sources() -> None:
    lines = lines_of([4, 5, 6]), lines_of([3, 3, 3], 1)
    batch = PairFormat(PAD, 80).batch(lines, np.array([0, 1, 2]), multiple=4)
    assert len(batch["source"]) == 4 and (batch["target"][3] == IGNORE).all() and int(batch["source_length"][3]) > 0


def test_pairs_that_are_too_long_are_left_out() -> None:
    lines = lines_of([4, 50, 6]), lines_of([3, 3, 60], 1)
    batches = PairBatches(lines, PairFormat(PAD, 40), 100, 0)
    assert batches.left_out == 2 and np.concatenate(batches.epoch(0)).tolist() == [0]
    with pytest.raises(BardletError, match="--block-size 2"):
        PairBatches(lines, PairFormat(PAD, 2), 100, 0)


def test_the_widest_batch_is_as_large_as_any() -> None:
    sizes = [(int(n), int(m)) for n, m in np.random.default_rng(0).integers(1, 40, (300, 2))]
    lines = lines_of([a for a, _ in sizes]), lines_of([b for _, b in sizes], 1)
    for joined in (False, True):
        batches = PairBatches(lines, PairFormat(PAD, 64, joined), 256, 0, multiple=2)
        widest, every = batches.widest(), [batches.batch(i) for i in range(batches.batches_per_epoch)]
        assert widest.keys() == every[0].keys() and len(widest["idx"]) % 2 == 0
        for name, x in widest.items():
            assert x.shape[1:] == tuple(np.max([batch[name].shape[1:] for batch in every], axis=0)), name
        full = [len(batch["idx"]) for batch in every if batch["target"].shape[1] == widest["target"].shape[1]]
        assert len(widest["idx"]) >= max(full) and (widest["target"] != IGNORE).all()


def test_held_out_pairs_are_there_once() -> None:
    sizes = [(int(n), int(m)) for n, m in np.random.default_rng(0).integers(1, 40, (50, 2))]
    lines = lines_of([a for a, _ in sizes]), lines_of([b for _, b in sizes], 1)
    made = bitext_batches.validation_batches(lines, PairFormat(PAD, 64), 200)
    assert sum(len(batch["target"]) for batch in made) == 50
    assert sum(int((batch["target"] != IGNORE).sum()) for batch in made) == sum(m for _, m in sizes)


# ---------------------------------------------------------------- files


def write(folder: Path, source: str, target: str) -> TranslationConfig:
    """Settings of two files with such content."""
    (folder / "a.de").write_text(source, encoding="utf-8")
    (folder / "a.en").write_text(target, encoding="utf-8")
    return TranslationConfig(source=str(folder / "a.de"), target=str(folder / "a.en"))


def test_lines_belong_together_by_number(tmp_path: Path) -> None:
    config = write(tmp_path, "".join(f"eins {i}\n" for i in range(30)), "".join(f"One {i}\r\n" for i in range(30)))
    found = bitext.find(config)
    train, val = list(found.pairs("train")), list(found.pairs("val"))
    assert len(train) == 27 and val == [(f"eins {i}", f"One {i}") for i in (9, 19, 29)]
    ready = bitext_batches.tokenize_pairs(found, cache=tmp_path)
    tokenizer = ready.tokenizer
    assert [tokenizer.decode(ready.val[1].line(i), skip_special=True) for i in range(3)] == ["One 9", "One 19", "One 29"]
    assert len(ready.train[0]) + len(ready.val[0]) == 30 and ready.leaked == 0
    again = bitext_batches.tokenize_pairs(bitext.find(config), cache=tmp_path)
    assert again.folder == ready.folder and np.array_equal(again.train[0].tokens, ready.train[0].tokens)


def test_what_is_wrong_with_files_is_said(tmp_path: Path) -> None:
    config = write(tmp_path, "eins\nzwei\n", "one\n")
    with pytest.raises(BardletError, match=r"a\.de has 2 lines and .*a\.en 1: "):
        list(bitext.find(config).pairs("train"))
    config = write(tmp_path, "eins\n" * 19, "one\n" * 19)
    with pytest.raises(BardletError, match="19 pairs are too few"):
        list(bitext.find(config).pairs("train"))
    (tmp_path / "a.en").write_bytes(b"one\n\xff\n")
    with pytest.raises(BardletError, match=r"a\.en: byte 4 \(line 2\)"):
        list(bitext.find(config).pairs("train"))
    with pytest.raises(BardletError, match="no such file"):
        list(bitext.find(TranslationConfig(source="nowhere", target="nowhere")).pairs("train"))
    for settings_ in ({"source": "a"}, {"source": "a", "target": "b", "pair": "de-en"}, {"pair": "de"},
                      {"pair": "de-xx"}, {"text": ("names",), "pair": "de-en"}):  # fmt: skip
        with pytest.raises(BardletError):
            bitext.find(TranslationConfig(**settings_))


def test_empty_lines_are_left_out_on_both_sides(tmp_path: Path) -> None:
    config = write(tmp_path, "eins\n\n" * 30, "one\ntwo\n" * 29 + "\n\n")
    assert sum(len(list(bitext.find(config).pairs(part))) for part in ("train", "val")) == 29


def test_lowercase_is_in_the_tokenizer_that_transformers_reads(tmp_path: Path) -> None:
    from dataclasses import replace

    from transformers import AutoTokenizer

    config = write(tmp_path, "".join(f"Größe ÄÖÜ {i}\n" for i in range(40)), "".join(f"Size {i}\n" for i in range(40)))
    for lowercase in (True, False):
        ready = bitext_batches.tokenize_pairs(bitext.find(replace(config, lowercase=lowercase)), cache=tmp_path)
        tokenizer = ready.tokenizer
        assert tokenizer.kind == "bpe" and tokenizer.lowercase == lowercase
        theirs = AutoTokenizer.from_pretrained(ready.folder)
        for text in ("Größe", "SIZE 3", "ÄÖÜ"):
            ids = tokenizer.encode(text).tolist()
            assert theirs(text).input_ids == [*ids, tokenizer.eos_id]
            assert tokenizer.decode(ids) == (text.lower() if lowercase else text)


def test_damaged_tokens_are_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = write(tmp_path, "".join(f"eins {i}\n" for i in range(30)), "".join(f"one {i}\n" for i in range(30)))
    ready = bitext_batches.tokenize_pairs(bitext.find(config), cache=tmp_path)
    whole = (ready.folder / "train.target.npy").read_bytes()
    (ready.folder / "train.target.npy").write_bytes(whole[:-1])
    bitext_batches.tokenize_pairs(bitext.find(config), cache=tmp_path)
    assert "built again" in caplog.text and (ready.folder / "train.target.npy").read_bytes() == whole


def test_named_corpora_are_those_of_the_settings() -> None:
    assert tuple(bitext.NAMED) == NAMED_PAIRS and bitext.DEFAULT in NAMED_PAIRS


@pytest.mark.skipif(not (Path(os.environ.get("BARDLET_DATA", "")) / "multi30k").is_dir(), reason="no multi30k here")
def test_multi30k() -> None:
    found = bitext.find(TranslationConfig(pair="de-en"))
    assert found.lowercase and found.name == "multi30k-de-en"
    train, val = list(found.pairs("train")), list(found.pairs("val"))
    assert (len(train), len(val)) == (29_000, 1_014)
    with gzip.open(Path(os.environ["BARDLET_DATA"]) / "multi30k" / "train.en.gz", "rt", encoding="utf-8") as file:
        assert file.readline().strip() == train[0][1]
