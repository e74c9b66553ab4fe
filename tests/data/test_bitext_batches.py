"""Sentence pairs: batches with every pair once, files that match line by line, and errors in one line."""

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
    """Return random lines of these lengths, separator included, with ids from 2."""
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
        in_order = batches.epoch(epoch)
        assert len(in_order) == batches.batches_per_epoch
        assert sorted(np.concatenate(in_order).tolist()) == list(range(len(sizes)))
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
def test_a_batch_has_complete_pairs(sizes: list[tuple[int, int]], seed: int) -> None:
    lines = lines_of([a for a, _ in sizes]), lines_of([b for _, b in sizes], 1)
    indices = np.random.default_rng(seed).permutation(len(sizes))[:5]
    separate = PairFormat(PAD, 80).batch(lines, indices)
    joined = PairFormat(PAD, 80, joined=True).batch(lines, indices)
    for row, number in enumerate(indices):
        source, target = (side.line(number).tolist() for side in lines)
        n = int(separate["source_length"][row])
        assert separate["source"][row, :n].tolist() == source and (separate["source"][row, n:] == PAD).all()
        goal = separate["target"][row]
        assert goal[goal != IGNORE].tolist() == target
        assert separate["idx"][row, : len(target)].tolist() == [PAD, *target[:-1]]
        both = source + target
        assert joined["idx"][row, : len(both) - 1].tolist() == both[:-1]
        goal = joined["target"][row]
        assert goal[goal != IGNORE].tolist() == target and int(joined["prefix"][row]) == len(source)
        assert (goal[: len(source) - 1] == IGNORE).all() and goal[len(source) - 1] == target[0]


def test_padding_rows_have_a_source_but_no_targets() -> None:
    lines = lines_of([4, 5, 6]), lines_of([3, 3, 3], 1)
    batch = PairFormat(PAD, 80).batch(lines, np.array([0, 1, 2]), multiple=4)
    assert len(batch["source"]) == 4 and (batch["target"][3] == IGNORE).all() and int(batch["source_length"][3]) > 0


def test_pairs_longer_than_the_block_are_left_out() -> None:
    lines = lines_of([4, 50, 6]), lines_of([3, 3, 60], 1)
    batches = PairBatches(lines, PairFormat(PAD, 40), 100, 0)
    assert batches.left_out == 2 and np.concatenate(batches.epoch(0)).tolist() == [0]
    with pytest.raises(BardletError, match="--block-size 2"):
        PairBatches(lines, PairFormat(PAD, 2), 100, 0)


def test_widest_is_at_least_as_large_as_any_batch() -> None:
    sizes = [(int(n), int(m)) for n, m in np.random.default_rng(0).integers(1, 40, (300, 2))]
    lines = lines_of([a for a, _ in sizes]), lines_of([b for _, b in sizes], 1)
    for joined in (False, True):
        batches = PairBatches(lines, PairFormat(PAD, 64, joined), 256, 0, multiple=2)
        widest, epoch = batches.widest(), [batches.batch(i) for i in range(batches.batches_per_epoch)]
        assert widest.keys() == epoch[0].keys() and len(widest["idx"]) % 2 == 0
        for name, x in widest.items():
            assert x.shape[1:] == tuple(np.max([batch[name].shape[1:] for batch in epoch], axis=0)), name
        full = [len(batch["idx"]) for batch in epoch if batch["target"].shape[1] == widest["target"].shape[1]]
        assert len(widest["idx"]) >= max(full) and (widest["target"] != IGNORE).all()


def test_validation_has_every_pair_once() -> None:
    sizes = [(int(n), int(m)) for n, m in np.random.default_rng(0).integers(1, 40, (50, 2))]
    lines = lines_of([a for a, _ in sizes]), lines_of([b for _, b in sizes], 1)
    batches = bitext_batches.validation_batches(lines, PairFormat(PAD, 64), 200)
    assert sum(len(batch["target"]) for batch in batches) == 50
    assert sum(int((batch["target"] != IGNORE).sum()) for batch in batches) == sum(m for _, m in sizes)


# ---------------------------------------------------------------- files


def write(folder: Path, source: str, target: str) -> TranslationConfig:
    """Write a source and a target file; return the settings that name them."""
    (folder / "a.de").write_text(source, encoding="utf-8")
    (folder / "a.en").write_text(target, encoding="utf-8")
    return TranslationConfig(source=str(folder / "a.de"), target=str(folder / "a.en"))


def test_line_n_of_one_file_is_paired_with_line_n_of_the_other(tmp_path: Path) -> None:
    config = write(tmp_path, "".join(f"eins {i}\n" for i in range(30)), "".join(f"One {i}\r\n" for i in range(30)))
    corpus = bitext.find(config)
    train, val = list(corpus.pairs("train")), list(corpus.pairs("val"))
    assert len(train) == 27 and val == [(f"eins {i}", f"One {i}") for i in (9, 19, 29)]
    dataset = bitext_batches.tokenize_pairs(corpus, cache=tmp_path)
    tokenizer = dataset.tokenizer
    decoded = [tokenizer.decode(dataset.val[1].line(i), skip_special=True) for i in range(3)]
    assert decoded == ["One 9", "One 19", "One 29"]
    assert len(dataset.train[0]) + len(dataset.val[0]) == 30 and dataset.leaked == 0
    again = bitext_batches.tokenize_pairs(bitext.find(config), cache=tmp_path)
    assert again.folder == dataset.folder and np.array_equal(again.train[0].tokens, dataset.train[0].tokens)


def test_errors_name_the_files_and_the_problem(tmp_path: Path) -> None:
    config = write(tmp_path, "eins\nzwei\n", "one\n")
    with pytest.raises(BardletError, match=r"a\.de has 2 lines but .*a\.en has 1; "):
        list(bitext.find(config).pairs("train"))
    config = write(tmp_path, "eins\n" * 19, "one\n" * 19)
    with pytest.raises(BardletError, match="19 pairs are too few"):
        list(bitext.find(config).pairs("train"))
    (tmp_path / "a.en").write_bytes(b"one\n\xff\n")
    with pytest.raises(BardletError, match=r"a\.en: not valid UTF-8 at byte 4 \(line 2\)"):
        list(bitext.find(config).pairs("train"))
    with pytest.raises(BardletError, match="no such file"):
        list(bitext.find(TranslationConfig(source="nowhere", target="nowhere")).pairs("train"))
    for settings_ in ({"source": "a"}, {"source": "a", "target": "b", "pair": "de-en"}, {"pair": "de"},
                      {"pair": "de-xx"}, {"text": ("names",), "pair": "de-en"}):  # fmt: skip
        with pytest.raises(BardletError):
            bitext.find(TranslationConfig(**settings_))


def test_a_pair_with_an_empty_side_is_left_out(tmp_path: Path) -> None:
    config = write(tmp_path, "eins\n\n" * 30, "one\ntwo\n" * 29 + "\n\n")
    assert sum(len(list(bitext.find(config).pairs(part))) for part in ("train", "val")) == 29


def test_transformers_lowercases_as_the_tokenizer_does(tmp_path: Path) -> None:
    from dataclasses import replace

    from transformers import AutoTokenizer

    config = write(tmp_path, "".join(f"Größe ÄÖÜ {i}\n" for i in range(40)), "".join(f"Size {i}\n" for i in range(40)))
    for lowercase in (True, False):
        dataset = bitext_batches.tokenize_pairs(bitext.find(replace(config, lowercase=lowercase)), cache=tmp_path)
        tokenizer = dataset.tokenizer
        assert tokenizer.kind == "bpe" and tokenizer.lowercase == lowercase
        theirs = AutoTokenizer.from_pretrained(dataset.folder)
        for text in ("Größe", "SIZE 3", "ÄÖÜ"):
            ids = tokenizer.encode(text).tolist()
            assert theirs(text).input_ids == [*ids, tokenizer.eos_id]
            assert tokenizer.decode(ids) == (text.lower() if lowercase else text)


def test_damaged_tokens_are_rebuilt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = write(tmp_path, "".join(f"eins {i}\n" for i in range(30)), "".join(f"one {i}\n" for i in range(30)))
    dataset = bitext_batches.tokenize_pairs(bitext.find(config), cache=tmp_path)
    whole = (dataset.folder / "train.target.npy").read_bytes()
    (dataset.folder / "train.target.npy").write_bytes(whole[:-1])
    bitext_batches.tokenize_pairs(bitext.find(config), cache=tmp_path)
    assert "rebuilding" in caplog.text and (dataset.folder / "train.target.npy").read_bytes() == whole


def test_named_corpora_match_the_settings() -> None:
    assert tuple(bitext.NAMED) == NAMED_PAIRS and bitext.DEFAULT in NAMED_PAIRS


@pytest.mark.skipif(not (Path(os.environ.get("BARDLET_DATA", "")) / "multi30k").is_dir(),
                    reason="multi30k is not in $BARDLET_DATA")
def test_multi30k() -> None:
    corpus = bitext.find(TranslationConfig(pair="de-en"))
    assert corpus.lowercase and corpus.name == "multi30k-de-en"
    train, val = list(corpus.pairs("train")), list(corpus.pairs("val"))
    assert (len(train), len(val)) == (29_000, 1_014)
    with gzip.open(Path(os.environ["BARDLET_DATA"]) / "multi30k" / "train.en.gz", "rt", encoding="utf-8") as file:
        assert file.readline().strip() == train[0][1]
