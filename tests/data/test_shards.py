"""Token shards, built once and checked, and windows as pure functions of seed and step."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bardlet import tokenizer as tk
from bardlet.data import corpus as cp
from bardlet.data import shard_file, shards, windows
from bardlet.errors import BardletError

DATA = os.environ.get("BARDLET_DATA")
POEM = "Full many a glorious morning have I seen\nFlatter the mountain-tops with sovereign eye,\n" * 30
MANY = settings(max_examples=200)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "poem.txt"
    path.write_text(POEM, encoding="utf-8")
    return path


def tokenize(path: Path, *arguments: object, **named: object) -> shards.TextDataset:
    return shards.tokenize_corpus(cp.find([str(path)]), *arguments, cache=path.parent / "cache", **named)  # type: ignore[arg-type]


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_shards_are_the_encoded_parts(text, kind):
    p = tokenize(text, kind, 300 if kind == "bpe" else None)
    cut = int(0.9 * len(POEM))
    for tokens, part in ((p.train, POEM[:cut]), (p.val, POEM[cut:])):
        assert tokens.dtype == np.uint16 and isinstance(tokens, np.memmap) and not tokens.flags.writeable
        assert tokens.tolist() == p.tokenizer.encode(part).tolist()
    assert (p.train_chars, p.val_chars) == (p.train_bytes, p.val_bytes) == (cut, len(POEM) - cut)
    assert (p.tokenizer.kind, p.documents, p.skipped) == (kind, 1, 0)
    assert p.tokenizer.hash == tk.load(p.folder).hash and p.reason.startswith(kind)


def test_auto_chooses_by_the_text_and_gives_the_reason(text):
    p = tokenize(text)
    assert p.tokenizer.alphabet == "".join(sorted(set(POEM))) and "one token per character" in p.reason


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_a_separator_ends_each_of_several_documents(tmp_path, kind):
    texts = [f"Gedicht Nummer {i} für Zoë\n" for i in range(30)]
    p = tokenize(jsonl(tmp_path / "a.jsonl", texts), kind)
    decoded = p.tokenizer.decode(p.train), p.tokenizer.decode(p.val)
    held_out = texts[9::10]
    train = [t for t in texts if t not in held_out]
    assert decoded == tuple("".join(t + tk.SEPARATOR for t in part) for part in (train, held_out))
    assert p.documents == 30 and p.train_chars == sum(map(len, train))
    assert p.val_bytes == sum(len(t.encode()) for t in held_out)


def test_bpe_never_sees_the_validation_part(tmp_path):
    first, last = "the cat sat on the mat " * 400, "qqqzqqqz" * 100
    path = tmp_path / "a.txt"
    path.write_text(first[:7200] + last)
    p = tokenize(path, "bpe", 400)
    assert p.val_chars == 800 and not any("qz" in token for token in p.tokenizer.vocab)
    assert set("qz") <= set(tokenize(path, "char").tokenizer.vocab), "the char alphabet comes from the whole text"


def test_ids_over_65536_need_32_bits(tmp_path):
    alphabet = [chr(i) for i in range(0x20000, 0x20000 + 70_000)]
    path = tmp_path / "a.txt"
    path.write_text("".join(alphabet), encoding="utf-8")
    p = tokenize(path, "char")
    assert p.train.dtype == np.uint32
    assert p.tokenizer.decode(p.train) + p.tokenizer.decode(p.val) == "".join(alphabet)


def test_a_given_tokenizer_is_used_as_it_is(text, tmp_path):
    own = tk.train_char(set(POEM) - {"y"}, separator=False)
    with pytest.raises(BardletError, match=r'poem.txt: "y" \(U\+0079\) at line 1, column 9'):
        tokenize(text, own)
    p = tokenize(text, own, skip_unseen=True)
    assert p.tokenizer.hash == own.hash and p.skipped == POEM.count("y")
    assert own.decode(p.train) + own.decode(p.val) == POEM[: int(0.9 * len(POEM))].replace("y", "") + POEM[
        int(0.9 * len(POEM)) :
    ].replace("y", "")
    several = tokenize(jsonl(tmp_path / "a.jsonl", ["Full many a"] * 4), own, skip_unseen=True)
    assert own.decode(several.train) == "Full man" * 4, "a tokenizer without a separator gets none"


# -------------------------------------------------------------------------------------------- cache


def test_a_second_call_reads_the_cache(text, monkeypatch):
    first = tokenize(text)
    monkeypatch.setattr(shards, "_build", lambda *_: pytest.fail("rebuilt"))
    again = tokenize(text)
    assert again.folder == first.folder and np.array_equal(again.train, first.train)
    assert (again.reason, again.val_bytes) == (first.reason, first.val_bytes)


def test_another_text_or_tokenizer_has_its_own_shards(text):
    folders = {tokenize(text, kind).folder for kind in ("auto", "char", "byte", "bpe")}
    folders.add(tokenize(text, "bpe", 300).folder)
    text.write_text(POEM + "!")
    folders.add(tokenize(text, "auto").folder)
    assert len(folders) == 6
    assert tokenize(text, "auto").train_chars == int(0.9 * (len(POEM) + 1))


def _truncate(folder: Path) -> None:
    with open(folder / "train.npy", "r+b") as file:
        file.truncate(128 + 100)


def _append(folder: Path) -> None:
    with open(folder / "val.npy", "ab") as file:
        file.write(b"ab")


def _replace_magic(folder: Path) -> None:
    with open(folder / "val.npy", "r+b") as file:
        file.write(b"bardlet")


def _replace_tokenizer(folder: Path) -> None:
    tk.train_byte(separator=False).save(folder)


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _append,
        _replace_magic,
        _replace_tokenizer,
        lambda folder: (folder / "val.npy").write_bytes(b""),
        lambda folder: (folder / "train.npy").unlink(),
        lambda folder: (folder / "val.npy").write_bytes((folder / "val.npy").read_bytes()[:-1] + b"\1"),
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        lambda folder: (folder / "prepared.json").write_text('{"reason": 1}'),
        lambda folder: [shutil.rmtree(folder), folder.write_text("a file")],
    ],
)
def test_a_damaged_cache_is_rebuilt_with_a_warning(text, damage, caplog):
    good = tokenize(text)
    tokens = good.train.tolist()
    damage(good.folder)
    with caplog.at_level(logging.WARNING, "bardlet"):
        again = tokenize(text)
    assert again.train.tolist() == tokens and again.folder == good.folder
    assert str(good.folder) in caplog.text and "rebuilding" in caplog.text
    assert [f.name for f in good.folder.parent.iterdir()] == [good.folder.name], "no other folder remains"


def test_a_shard_is_a_numpy_array(text):
    p = tokenize(text)
    ids = np.load(p.folder / "train.npy")
    assert ids.dtype == np.dtype("<u2") and ids.tolist() == p.train.tolist()


@pytest.mark.parametrize("width", [2, 4])
def test_a_shard_of_the_previous_version_is_read(width, tmp_path):
    """bardlet 0.2 wrote a header of 128 bytes, then the ids."""
    ids = np.arange(5, dtype=f"<u{width}")
    for count in (5, 0):
        head = struct.pack("<8sIIQ32s", b"bardlet\0", 1, width, count, bytes(32)).ljust(128, b"\0")
        (tmp_path / "train.bin").write_bytes(head + ids[:count].tobytes())
        assert shard_file.open_shard(tmp_path / "train.npy").tolist() == ids[:count].tolist()
    for damaged in (b"", head[:100], b"x" + head[1:], head + b"1"):
        (tmp_path / "train.bin").write_bytes(damaged)
        with pytest.raises(BardletError, match=r"train\.bin"):
            shard_file.open_shard(tmp_path / "train.npy")


def _tokenize_together(path: Path, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    p = tokenize(path, "bpe", 400)
    results.put((str(p.folder), p.train[:].tolist()))  # type: ignore[attr-defined]


def test_concurrent_processes_agree(text):
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    barrier, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_tokenize_together, args=(text, barrier, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    outcomes = [results.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert [str(f) for f in (text.parent / "cache" / "tokens").iterdir()] == [outcomes[0][0]]


def test_the_slower_process_uses_the_shards_of_the_faster(text, monkeypatch):
    build = shards._build

    def overtaken(*arguments: object) -> None:
        monkeypatch.setattr(shards, "_build", build)
        winner.append(tokenize(text))
        os.utime(winner[0].folder / "train.npy", (1, 1))
        build(*arguments)  # type: ignore[arg-type]

    winner: list[shards.TextDataset] = []
    monkeypatch.setattr(shards, "_build", overtaken)
    loser = tokenize(text)
    assert loser.folder == winner[0].folder and (loser.folder / "train.npy").stat().st_mtime == 1


def test_a_failed_build_leaves_nothing_behind(text):
    with pytest.raises(BardletError):
        tokenize(text, tk.train_char("abc", separator=False))
    assert list((text.parent / "cache" / "tokens").iterdir()) == []


def test_an_unwritable_cache_is_one_line(text, monkeypatch):
    (text.parent / "file").write_text("")
    with pytest.raises(BardletError, match=r"cannot write tokens here.*BARDLET_CACHE"):
        shards.tokenize_corpus(cp.find([str(text)]), cache=text.parent / "file")
    if Path("/dev/full").exists():
        monkeypatch.setattr(shard_file.os, "fsync", lambda _: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        with pytest.raises(BardletError, match=r"No space left.*free some space"):
            tokenize(text)
        assert list((text.parent / "cache" / "tokens").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [("x", "a: the text has 1 character; use 10,000 or more"), ("0123456789", "the text has 10 characters; ")],
)
def test_a_text_too_short_to_split_is_one_line(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_text(content)
    with pytest.raises(BardletError, match=message):
        tokenize(path)


def test_wrong_settings_are_one_line(text):
    with pytest.raises(BardletError, match="choose from auto, char, byte, bpe"):
        tokenize(text, "bytes")
    with pytest.raises(BardletError, match="--vocab-size is for bpe"):
        tokenize(text, "char", 100)
    assert tokenize(text, "auto", 280).tokenizer.vocab_size == 280


def test_progress_grows_to_the_whole_text(text):
    steps: list[tuple[str, int, int | None]] = []
    tokenize(text, progress=lambda *step: steps.append(step))
    assert ("measuring poem.txt", len(POEM), None) in steps
    assert [s for s in steps if s[0] == "tokenizing"][-1] == ("tokenizing", len(POEM), len(POEM))
    done = [s[1] for s in steps if s[0] == "tokens"]
    assert done == sorted(done)


@pytest.mark.skipif(not DATA, reason="BARDLET_DATA is not set")
def test_real_shakespeare_has_the_lectures_counts(tmp_path):
    p = shards.tokenize_corpus(cp.find(["tinyshakespeare"]), cache=tmp_path)
    assert (p.tokenizer.vocab_size, len(p.train), len(p.val)) == (65, 1_003_854, 111_540)


# ------------------------------------------------------------------------------------------- windows

sizes = st.tuples(st.integers(2, 400), st.integers(1, 20), st.integers(1, 9), st.integers(0, 2**32))


@MANY
@given(sizes, st.integers(0, 3))
def test_an_epoch_has_each_window_once(size, epoch):
    count, block, batch, seed = size
    assume(count >= 2 * block)
    w = windows.Windows(np.arange(count, dtype=np.uint16), block, batch, seed)
    per_epoch = w.windows_per_epoch
    assert per_epoch == (count - block) // block
    steps = range(epoch * per_epoch // batch, ((epoch + 1) * per_epoch - 1) // batch + 1)
    rows = torch.cat([w.batch(step)["idx"] for step in steps])[epoch * per_epoch - steps[0] * batch :][:per_epoch]
    starts = sorted(rows[:, 0].tolist())
    assert 0 <= starts[0] < block and starts == list(range(starts[0], starts[0] + per_epoch * block, block))
    assert starts[-1] + block < count


@MANY
@given(sizes, st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_a_batch_is_a_function_of_seed_and_step(size, steps):
    count, block, batch, seed = size
    assume(count >= 2 * block)
    tokens = np.random.default_rng(0).integers(0, 65_536, count).astype(np.uint16)
    ordered, shuffled = (windows.Windows(tokens, block, batch, seed) for _ in range(2))
    expected = {step: ordered.batch(step) for step in sorted(steps)}
    for step in steps:
        idx, target = shuffled.batch(step).values()
        assert idx.shape == target.shape == (batch, block) and idx.dtype == target.dtype == torch.int64
        assert torch.equal(idx, expected[step]["idx"]) and torch.equal(target, expected[step]["target"])
        assert torch.equal(idx[:, 1:], target[:, :-1])


def test_targets_are_the_next_tokens_and_seeds_and_epochs_differ():
    tokens = np.arange(10_000, dtype=np.uint16)
    w = windows.Windows(tokens, 16, 8, seed=1)
    idx, target = w.batch(3).values()
    assert torch.equal(target, idx + 1)
    assert not torch.equal(idx, windows.Windows(tokens, 16, 8, seed=2).batch(3)["idx"])
    assert not np.array_equal(w.starts(0), w.starts(1))
    assert len({int(w.starts(epoch).min()) for epoch in range(40)}) > 8, "the offset changes with the epoch"


def test_batches_do_not_touch_the_global_generators():
    tokens = np.arange(1000, dtype=np.uint16)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    windows.Windows(tokens, 16, 8, seed=1).batch(0)
    windows.random_windows(tokens, 16, 2, 4)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]


def test_a_text_shorter_than_two_windows_names_the_block_size_that_fits():
    tokens = np.arange(63, dtype=np.uint16)
    with pytest.raises(BardletError, match=r"63 tokens.*--block-size 31 or less"):
        windows.Windows(tokens, 32, 4, seed=0)
    assert windows.Windows(tokens, 31, 4, seed=0).batch(0)["idx"].shape == (4, 31)


@MANY
@given(st.integers(2, 500), st.integers(1, 40), st.integers(1, 7))
def test_validation_predicts_every_token_but_the_first_once(count, block, batch):
    tokens = np.arange(count, dtype=np.uint16)
    batches = [tuple(item.values()) for item in windows.validation_windows(tokens, block, batch)]
    assert torch.cat([target.flatten() for _, target in batches]).tolist() == list(range(1, count))
    assert all(torch.equal(target, idx + 1) for idx, target in batches)
    assert all(idx.shape[1] == block and len(idx) <= batch for idx, _ in batches[:-1])
    assert [idx.shape for idx, _ in batches][-1][1] in (block, (count - 1) % block)


def test_random_windows_are_seeded_and_reach_both_ends():
    tokens = np.arange(20, dtype=np.uint16)
    batches = [tuple(item.values()) for item in windows.random_windows(tokens, 8, 50, 4, seed=3)]
    assert len(batches) == 50 and batches[0][0].shape == (4, 8)
    starts = torch.cat([idx[:, 0] for idx, _ in batches])
    assert (int(starts.min()), int(starts.max())) == (0, 11)
    assert all(torch.equal(target, idx + 1) for idx, target in batches)
    again = [tuple(item.values()) for item in windows.random_windows(tokens, 8, 50, 4, seed=3)]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, again, strict=True))
    other = [tuple(item.values()) for item in windows.random_windows(tokens, 8, 50, 4, seed=4)]
    assert not torch.equal(starts, torch.cat([idx[:, 0] for idx, _ in other]))


def test_a_validation_part_too_short_is_one_line():
    with pytest.raises(BardletError, match="1 tokens but needs 2"):
        windows.validation_windows(np.zeros(1, np.uint16), 8)
    with pytest.raises(BardletError, match="--block-size 7 or less"):
        windows.random_windows(np.zeros(8, np.uint16), 8)


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_documents_encoded_together_have_the_ids_of_each_alone(kind, tmp_path):
    """Short documents are encoded in batches, long ones by themselves."""
    documents = ["", "a", "short 詩", "long and more, " * 3_000, "é\n" * 40, *(f"line {n}" for n in range(500))]
    text = "".join(documents)
    tokenizer = {"char": lambda: tk.train_char(text, True), "byte": lambda: tk.train_byte(True),
                 "bpe": lambda: tk.train_bpe([text], 400)}[kind]()
    counts = shard_file.write_shard(tmp_path / "x.npy", ((n, (d,)) for n, d in enumerate(documents)), tokenizer, True)
    wanted = [[*tokenizer.encode(document).tolist(), tokenizer.eos_id] for document in documents]
    assert shard_file.open_shard(tmp_path / "x.npy").tolist() == [id for ids in wanted for id in ids]
    assert counts == (len(text), len(text.encode()), sum(map(len, wanted)))


def test_a_batch_of_documents_names_the_one_with_an_unknown_character(tmp_path):
    tokenizer, documents = tk.train_char("abc \n", True), ["a", "b", "a\nb x c", "c"]
    with pytest.raises(BardletError, match=r'^2: "x" \(U\+0078\) at line 2, column 3 is not among'):
        shard_file.write_shard(tmp_path / "x.npy", ((n, (d,)) for n, d in enumerate(documents)), tokenizer, True)
