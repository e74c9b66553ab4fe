"""Bad and unusual input for every command: a helpful one-line error, or a run that reports what it repaired.

Each row of BAD exits with 1 and one line `bardlet: ...` that names the file or setting, the position and the remedy;
nothing on disk changes. Each row of UNUSUAL succeeds and reports what it did to the input.
"""

from __future__ import annotations

import ctypes
import gzip
import json
import lzma
import os
import resource
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from bardlet.cli import main
from bardlet.run import hf, lock
from bardlet.runtime import manifest

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 12
SMALL = "--n-layer 1 --n-embd 16 --n-head 2 --block-size 8 --batch-size 2 --compile off --dtype fp32 --threads 1"
TINY = f"--model gpt2 --steps 2 {SMALL}"
TRAIN = f"train bad.txt {TINY} --out out"
GOOD = f"train text.txt {TINY} --out out"

Arrange = Callable[[], object]


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with text.txt and run/, a finished run of two steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("trained")
    with environment(folder, folder / "cache"):
        Path("text.txt").write_text(TEXT, encoding="utf-8")
        assert main(shlex.split(f"train text.txt {TINY} --save-every 1 --out run")) == 0
    return folder


@contextmanager
def environment(folder: Path, cache: Path) -> Iterator[None]:
    """Work in `folder`, with a cache and without $BARDLET_DATA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("BARDLET_CACHE", str(cache))
        patch.delenv("BARDLET_DATA", raising=False)
        yield


@pytest.fixture
def workspace(tmp_path, trained) -> Iterator[Path]:
    """The working directory of a row: text.txt, and the finished run in run/."""
    folder = tmp_path / "workspace"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("cache"))
    with environment(folder, trained / "cache"):
        yield folder


def on_disk(folder: Path) -> dict[str, object]:
    """Return each path below `folder` with its contents, or with its type if it is not a regular file."""
    contents: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        contents[str(path.relative_to(folder))] = path.read_bytes() if stat.S_ISREG(mode) else stat.S_IFMT(mode)
    return contents


def error_line(err: str) -> str:
    """Return the error line of standard error; only notices may precede it."""
    *notes, last = err.splitlines() or [""]
    assert last.startswith("bardlet: "), err
    assert all(line.startswith("note: ") for line in notes), err
    assert "internal error" not in err
    assert "Traceback" not in err
    assert not any(sign in last for sign in ("Errno", "<class", "│", "  ")), f"unreadable: {last}"
    return last


# ------------------------------------------------------------------------------- arrangements


def write(name: str, content: str | bytes) -> Arrange:
    def arrange() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)

    return arrange


def bad(content: str | bytes) -> Arrange:
    return write("bad.txt", content)


def jsonl(*lines: object) -> Arrange:
    return write("bad.jsonl", "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))


def edit(name: str, change: Callable[[bytes], bytes]) -> Arrange:
    return lambda: Path(name).write_bytes(change(Path(name).read_bytes()))


def cut(name: str, share: float = 0.5) -> Arrange:
    return edit(name, lambda raw: raw[: int(len(raw) * share)])


def flip(name: str, position: int) -> Arrange:
    """Flip a bit of the byte at `position`; -1 is the last byte."""
    def change(raw: bytes) -> bytes:
        at = position % len(raw)
        return raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :]

    return edit(name, change)


def config(**changes: object) -> Arrange:
    """Change values in run/config.json; None removes a key."""
    def change(raw: bytes) -> bytes:
        values = {**json.loads(raw), **changes}
        return json.dumps({k: v for k, v in values.items() if v is not None}).encode()

    return edit("run/config.json", change)


def other_tokenizer(alphabet: str) -> Arrange:
    from bardlet.tokenizer import train_char

    return lambda: train_char(alphabet, separator=False).save("run")


def remove(name: str) -> Arrange:
    return lambda: shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


def link(name: str, target: str) -> Arrange:
    return lambda: Path(name).symlink_to(target)


def both(*arrangements: Arrange) -> Arrange:
    return lambda: [arrange() for arrange in arrangements]


def nothing() -> None:
    """Change nothing: the command line itself is at fault."""


NEWEST, OLDEST = "run/checkpoints/step-00000002", "run/checkpoints/step-00000001"
GZ, XZ = gzip.compress(TEXT.encode() * 50, mtime=0), lzma.compress(os.urandom(5000).hex().encode())
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256))
ELF = b"\x7fELF\x02\x01\x01\x00" + bytes(64)

# ------------------------------------------------------------------------------- id, arrangement, argv, fragments

BAD: list[tuple[str, Arrange, str, tuple[str, ...]]] = [
    # a text
    ("missing file", nothing, TRAIN, ("bad.txt: no such file", "bardlet data")),
    ("empty file", bad(""), TRAIN, ("bad.txt", "empty", "name a file")),
    ("one byte", bad("a"), TRAIN, ("bad: the text has 1 character", "use 10,000 or more")),
    ("only a byte order mark", bad(b"\xef\xbb\xbf"), TRAIN, ("bad.txt", "no text", "name a file")),
    ("shorter than the context", bad("To be, or not to be"), TRAIN.replace("size 8", "size 64"),
     ("17 tokens", "--block-size 8")),
    ("UTF-16 without BOM", bad(TEXT.encode("utf-16-le")), TRAIN,
     ("bad.txt: looks like UTF-16 without a byte order mark", "iconv -f UTF-16LE -t UTF-8 bad.txt > bad-utf8.txt")),
    ("UTF-16 cut inside a character", bad("héé".encode("utf-16") + b"x"), TRAIN,
     ("bad.txt", "UTF-16", "byte 8", "as UTF-8")),
    ("invalid UTF-8", bad(b"a line\nca" + "fé\n".encode("latin-1") + TEXT.encode()), TRAIN,
     ("bad.txt: not valid UTF-8 at byte 10 (line 2): 0xE9", "iconv")),
    ("Latin-1", bad((TEXT + "café\n").encode("latin-1")), TRAIN, ("not valid UTF-8", "0xE9", "iconv")),
    ("UTF-8 cut inside its last character", bad((TEXT + "é").encode()[:-1]), TRAIN,
     (f"bad.txt: not valid UTF-8 at byte {len(TEXT)} (line 25): 0xC3",)),
    ("half a surrogate pair in UTF-8", bad(TEXT.encode() + b"\xed\xa0\x80"), TRAIN, ("not valid UTF-8", "0xED")),
    ("overlong UTF-8", bad(b"a\xc0\x80" + TEXT.encode()), TRAIN,
     ("bad.txt: not valid UTF-8 at byte 1 (line 1): 0xC0",)),
    ("half a surrogate pair in jsonl", jsonl({"text": TEXT}, '{"text": "a\\ud800"}'), TRAIN.replace(".txt", ".jsonl"),
     ("bad.jsonl, line 2: has half of a surrogate pair in it",)),
    ("jsonl: invalid UTF-8", write("bad.jsonl", b'{"text": "one"}\n{"text": "\xff"}\n'),
     TRAIN.replace(".txt", ".jsonl"), ("bad.jsonl: not valid UTF-8 at byte 26 (line 2): 0xFF",)),
    ("jsonl: only empty texts", jsonl(*[{"text": ""}] * 30), TRAIN.replace(".txt", ".jsonl"),
     ("bad.jsonl: has no text",)),
    ("only line breaks", bad("\n" * 3000), TRAIN, ("bad.txt: has no text, only white space",)),
    ("a gz bomb", write("bad.gz", gzip.compress(bytes(1 << 28), 1, mtime=0)),
     TRAIN.replace("bad.txt", "bad.gz"), ("bad.gz: NUL at byte 0 (line 1)",)),
    ("NUL", bad("one\ntwo\n\0three"), TRAIN, ("bad.txt: NUL at byte 8 (line 3)", "leave the file out")),
    ("PNG", bad(PNG), TRAIN, ("bad.txt: NUL at byte 8", "binary")),
    ("ELF", bad(ELF), TRAIN, ("bad.txt: NUL at byte 7 (line 1)", "binary")),
    ("empty folder", lambda: Path("bad.txt").mkdir(), TRAIN, ("bad.txt: no text files in the folder", ".jsonl")),
    ("folder without text", write("bad.txt/a.png", PNG), TRAIN,
     ("bad.txt: no text files in the folder", "name a file")),
    ("binary in a folder", both(write("bad.txt/a.txt", TEXT), write("bad.txt/b.txt", ELF)), TRAIN,
     ("bad.txt/b.txt: NUL at byte 7", "leave the file out")),
    ("pattern without match", nothing, f"train 'no-*.txt' {TINY} --out out", ("no-*.txt", "no file matches", "ls")),
    ("FIFO", lambda: os.mkfifo("bad.txt"), TRAIN, ("bad.txt", "FIFO", "to a file first")),
    ("device", nothing, f"train /dev/zero {TINY} --out out", ("/dev/zero", "not a regular file", "to a file first")),
    ("broken symlink", link("bad.txt", "gone"), TRAIN, ("bad.txt", "No such file", "still exists")),
    ("symlink loop", link("bad.txt", "bad.txt"), TRAIN, ("bad.txt", "symbolic links")),
    ("damaged gz", write("bad.gz", GZ[:40] + b"\xff\xff\xff" + GZ[43:]), TRAIN.replace("bad.txt", "bad.gz"),
     ("bad.gz: the compressed data is damaged", "get the file again")),
    ("text named .gz", write("bad.gz", TEXT), TRAIN.replace("bad.txt", "bad.gz"), ("bad.gz", "damaged", "again")),
    ("cut xz", write("bad.xz", XZ[: len(XZ) // 2]), TRAIN.replace("bad.txt", "bad.xz"),
     ("bad.xz: the compressed data is damaged", "get the file again")),
    ("jsonl: bad line", jsonl({"text": "one"}, '{"text": "two"'), TRAIN.replace(".txt", ".jsonl"),
     ("bad.jsonl, line 2: is not JSON at column", "one object per line")),
    ("jsonl: field missing", jsonl({"title": "one", "body": "two"}), TRAIN.replace(".txt", ".jsonl"),
     ('bad.jsonl, line 1: has no field "text"', "--field: title, body")),
    ("jsonl: not a string", jsonl({"text": "one"}, {"text": 2}), TRAIN.replace(".txt", ".jsonl"),
     ('bad.jsonl, line 2: "text" is a number', "--field")),
    ("jsonl: not an object", jsonl([1]), TRAIN.replace(".txt", ".jsonl"), ("bad.jsonl, record 1", '{"text"')),
    ("jsonl: number of 5,000 digits", jsonl('{"text": ' + "1" * 5000 + "}"), TRAIN.replace(".txt", ".jsonl"),
     ("bad.jsonl, line 1",)),
    ("jsonl: nested 100,000 deep", jsonl("[" * 100_000), TRAIN.replace(".txt", ".jsonl"), ("bad.jsonl, line 1",)),
    ("empty name", nothing, f"train '' {TINY} --out out", ("name",)),
    ("unknown corpus", nothing, f"train tinyshakespear {TINY} --out out",
     ("tinyshakespear", 'did you mean "tinyshakespeare"', "bardlet data")),
    ("unknown corpus to get", nothing, "data get factbok", ('"factbok"', 'did you mean "factbook"')),
    ("corpus not downloaded", nothing, f"train factbook {TINY} --out out", ("factbook", "$BARDLET_DATA")),
    ("eval: missing file", nothing, "eval run bad.txt", ("bad.txt: no such file", "bardlet data")),
    ("eval: empty file", bad(""), "eval run bad.txt", ("bad.txt", "empty", "name a file")),
    ("eval: only unknown characters", bad("日本語"), "eval run bad.txt", ("bad: 0 tokens are too few", "longer text")),
    # the command line
    ("unknown command", nothing, "trian", ("'trian'", "did you mean `bardlet train`")),
    ("unknown word for data", nothing, "data fetch names", ("data fetch names", "bardlet data get NAME")),
    ("unknown setting", nothing, f"{TRAIN} --stepz 3", ("--stepz", "did you mean --steps?")),
    ("unknown short setting", nothing, "sample run -t 3", ("unknown setting -t", "bardlet sample --help")),
    ("extra word", nothing, "sample run --prompt To be", ("be: unexpected", "quote a text that has spaces")),
    ("run missing", nothing, "sample", ("RUN is missing", "for example: bardlet sample runs/")),
    ("value missing", nothing, "train text.txt --lr --steps 3", ("--lr needs a value: a number",)),
    ("wrong type", nothing, "train text.txt --steps 1.5", ("--steps 1.5: must be a whole number",)),
    ("not a number", nothing, "train text.txt --dropout much", ("--dropout much: must be a number",)),
    ("not a choice", nothing, "train text.txt --model gpt3",
     ("--model gpt3: must be one of qwen3, gpt2,", "did you mean gpt2?")),
    ("value for a flag", nothing, "train text.txt --json=yes", ("--json takes no value", "--no-json")),
    ("value for a flag that is on by default", nothing, "train text.txt --tie-embeddings=no",
     ("--tie-embeddings takes no value", "or --no-tie-embeddings")),
    ("value missing at the end", nothing, "train text.txt --keep",
     ("--keep needs a value: one of best, last, average", "bardlet train --help-all")),
    ("value that begins with a dash", nothing, "sample run --prompt -to", ("--prompt needs a value", "--prompt=-to")),
    ("positional as a flag", nothing, "train --text text.txt",
     ("--text: type TEXT without a flag", "bardlet train my.txt")),
    ("setting that only a file holds", nothing, "train text.txt --replans 3", ("--replans", "--config FILE")),
    ("model of a stage as a flag", nothing, "sft --init run", ("--init: name the model first", "bardlet sft runs/")),
    ("lowercase of another value", nothing, "train --pair de-en --lowercase yes",
     ("--lowercase yes: must be true or false",)),
    ("negative steps", nothing, "train text.txt --steps -3", ("--steps -3: must be more than 0",)),
    ("zero batch", nothing, "train text.txt --batch-size 0", ("--batch-size 0: must be at least 1",)),
    ("dropout 1.5", nothing, "train text.txt --dropout 1.5", ("--dropout 1.5", "below 1")),
    ("infinite minutes", nothing, "train text.txt --minutes inf", ("--minutes inf",)),
    ("learning rate nan", nothing, "train text.txt --lr nan", ("--lr nan",)),
    ("absurd seed", nothing, f"train text.txt --seed {10**30}", ("--seed", "at most")),
    ("absurd width", nothing, f"{GOOD} --n-embd {10**12}", ("does not fit into memory", "--n-embd")),
    ("absurd batch", nothing, f"{GOOD} --batch-size {10**13}",
     ("does not fit into memory", "smaller --batch-size")),
    ("steps and minutes", nothing, "train text.txt --steps 2 --minutes 1",
     ("--steps and --minutes: give one of them, not both",)),
    ("heads do not divide", nothing, "train text.txt --n-embd 100 --n-head 6", ("--n-embd 100", "--n-head 5")),
    ("gpt2 with kv heads", nothing, "train text.txt --model gpt2 --n-kv-head 2", ("--n-kv-head 2", "qwen3")),
    ("odd head for qwen3", nothing, "train text.txt --n-embd 12 --n-head 4", ("--n-embd 12", "even")),
    ("a rung without dropout", nothing, "train text.txt --model feed-forward --dropout 0.1",
     ("--dropout 0.1: does not apply to feed-forward", "drop it", "--model dropout, rotary")),
    ("a rung without a width", nothing, "train text.txt --model feed-forward --n-inner=64",
     ("--n-inner 64: does not apply to feed-forward", "--model residual")),
    ("a rung with a single layer", nothing, "train text.txt --model multi-head --n-layer 2",
     ("--n-layer 2: does not apply to multi-head", "--model residual", "or qwen3")),
    ("a rung of one head", nothing, "train text.txt --model one-head --n-head 2", ("--n-head 2", "--model multi-head")),
    ("a rung with an untied head", nothing, "train text.txt --model dropout --tie-embeddings",
     ("--tie-embeddings: does not apply to dropout", "use --model gpt2 or qwen3")),
    ("muon for a bigram table", nothing, "train text.txt --model bigram --optimizer muon",
     ("--optimizer muon: does not apply to bigram", "--model one-head")),
    ("ladder: rungs above the last", nothing, "ladder text.txt --rungs 3-20", ("--rungs 3-20", "13 rungs; use 3-13")),
    ("ladder: descending rungs", nothing, "ladder text.txt --rungs 3-1", ("--rungs 3-1", "use 1-3")),
    ("ladder: a misspelled rung", nothing, "ladder text.txt --rungs one-haed",
     ("'one-haed'", "did you mean one-head?")),
    ("ladder: steps", nothing, "ladder text.txt --steps 5", ("--steps", "did you mean --minutes")),
    ("ladder: a file as out", nothing, "ladder text.txt --rungs 1 --out text.txt", ("text.txt", "another --out")),
    ("char with vocab size", nothing, f"train text.txt --tokenizer char --vocab-size 99 {TINY} --out out",
     ("--vocab-size is for bpe", "--tokenizer char")),
    ("vocab too small for bpe", nothing, f"train text.txt --tokenizer bpe --vocab-size 100 {TINY} --out out",
     ("--vocab-size 100", "at least 262", "--tokenizer byte")),
    ("init missing", nothing, f"train text.txt --init gone {TINY} --out out", ("gone: no such folder",)),
    ("unknown device", nothing, f"train text.txt {TINY} --device gpu --out out", ("--device gpu", "--device cpu")),
    ("device without memory", nothing, f"train text.txt {TINY} --device meta --out out",
     ("--device meta", "--device cpu")),
    ("tokens 0", nothing, "sample run --tokens 0", ("--tokens 0: must be at least 1",)),
    ("temperature -1", nothing, "sample run --temperature -1", ("--temperature -1: must be 0 or more",)),
    ("temperature inf", nothing, "sample run --temperature inf", ("--temperature inf",)),
    ("top_p 2", nothing, "sample run --top-p 2", ("--top-p 2:", "at most 1")),
    ("top_k 0", nothing, "sample run --top-k 0", ("--top-k 0: must be at least 1",)),
    ("num 0", nothing, "sample run --num 0", ("--num 0: must be at least 1",)),
    ("unknown character in a prompt", nothing, "sample run --prompt 'To bé'",
     ("--prompt", '"é" (U+00E9) at line 1, column 5', "--tokenizer byte")),
    ("unknown task", nothing, "eval run --task arc_easy", ("--task arc_easy", "did you mean arc-easy?", "hellaswag")),
    ("a task without its file", nothing, "eval run --task copa gsm8k",
     ("--task copa: its questions are not on this machine", "put copa.jsonl.gz", "$BARDLET_DATA/eval-gauntlet")),
    ("a task without a name", nothing, "eval run --task", ("--task needs a value", "bardlet eval --help")),
    ("a task and a text", nothing, "eval run text.txt --task copa",
     ("text.txt: --task brings its own text", "drop it")),
    ("a task and pairs", nothing, "eval run --source text.txt --task copa",
     ("--source: does not go with --task", "drop it")),
    ("a limit without a task", nothing, "eval run --limit 3", ("--limit: needs --task", "drop it")),
    ("limit 0", nothing, "eval run --task copa --limit 0", ("--limit 0: must be at least 1",)),
    ("context 0", nothing, "eval run --context 0", ("--context 0: must be at least 1",)),
    ("context too long", nothing, "eval run --context 9", ("--context 9", "use --context 8 or less")),
    # --config
    ("config missing", nothing, "train --config bad.toml", ("bad.toml: no such file", "--config")),
    ("config is a folder", nothing, "train --config run",
     ("run: cannot be read (Is a directory)", "name a TOML settings file")),
    ("config: syntax", write("bad.toml", "steps = 3\nlr = \n"), "train --config bad.toml", ("bad.toml", "line 2")),
    ("config: unknown key", write("bad.toml", "n_layers = 3\n"), "train --config bad.toml",
     ("bad.toml: unknown setting 'n_layers'", "'n_layer'")),
    ("config: unknown key, far", write("bad.toml", "zzz = 3\n"), "train --config bad.toml",
     ("bad.toml: unknown setting 'zzz'", "bardlet train --help")),
    ("config: wrong type", write("bad.toml", 'n_layer = "3"\n'), "train --config bad.toml",
     ("bad.toml: n_layer = '3'", "a whole number")),
    ("config: text is not a list", write("bad.toml", "text = 5\n"), "train --config bad.toml",
     ("bad.toml: text = 5", "must be a list")),
    ("config: short replan", write("bad.toml", "replans = [[1]]\n"), "train --config bad.toml",
     ("bad.toml: replans", "2 entries")),
    ("config: out of range", write("bad.toml", "dropout = 2.0\n"), "train --config bad.toml",
     ("bad.toml: --dropout 2:", "below 1")),
    ("config: not UTF-8", write("bad.toml", b'text = ["\xe9"]'), "train --config bad.toml",
     ("bad.toml: not valid UTF-8 at byte 9", "save the file as UTF-8")),
    # where the run goes
    ("out: a finished run", nothing, f"train text.txt {TINY} --out run",
     ("run: already contains a run", "bardlet resume run", "--out")),
    ("out: a foreign folder", write("out/mine.txt", "x"), GOOD,
     ("out: exists and is not empty", "--out")),
    ("out: a file", write("out", "x"), GOOD, ("out: exists and is not a folder", "another --out")),
    ("out: below a file", nothing, f"train text.txt {TINY} --out text.txt/x",
     ("text.txt/x: text.txt is not a folder", "another --out")),
    ("out: broken symlink", link("out", "gone"), GOOD, ("out: exists and is not a folder", "another --out")),
    ("out: name too long", nothing, f"train text.txt {TINY} --out {'x' * 300}", ("xxx", "file name too long")),
    # a model folder
    ("no such run", nothing, "sample gone", ("gone: no such folder", "bardlet train")),
    ("weights: a flipped bit", flip("run/model.safetensors", -1), "sample run",
     ("run/model.safetensors: damaged: it is not the file that was saved", "remove run/manifest.json")),
    ("weights of another run", write("run/model.safetensors", "x"), "eval run", ("run/model.safetensors: damaged",)),
    ("tokenizer settings: a flipped bit", flip("run/tokenizer_config.json", 30), "sample run",
     ("run/tokenizer_config.json: damaged",)),
    ("weights missing, but in the manifest", remove("run/model.safetensors"), "sample run",
     ("run/model.safetensors", "no such file")),
    ("manifest: a flipped bit", flip("run/manifest.json", 99), "sample run", ("run/manifest.json: damaged",)),
    ("manifest cut", cut("run/manifest.json"), "sample run", ("run/manifest.json: damaged",)),
    ("a manifest that names a file outside the folder",
     lambda: manifest.write_manifest(Path("run"), ["../text.txt"]), "sample run",
     ("run: a file in it refers to '../text.txt'", "not in this folder")),
    ("a damaged tokenizer_config.json without a manifest",
     both(edit("run/tokenizer_config.json", lambda raw: raw[1:]), remove("run/manifest.json"), remove("run/run.toml")),
     "sample run", ("run/tokenizer_config.json: damaged at line 2",)),
    ("--init with a damaged run", flip("run/model.safetensors", -1), f"train text.txt {TINY} --out out --init run",
     ("run/model.safetensors: damaged",)),
    # resume
    ("resume: no such folder", nothing, "resume gone", ("gone: no such folder",)),
    ("resume: an empty folder", lambda: Path("empty").mkdir(), "resume empty",
     ("empty: no run.toml", "not a run folder")),
    ("resume: a file", nothing, "resume text.txt", ("text.txt: a file, not a model", "name a run folder")),
    *((f"{command}: a name below runs/", write("runs/mine/run.toml", ""), f"{command} mine",
       ("mine: no such folder; did you mean runs/mine?",)) for command in ("sample", "eval", "resume", "doctor")),
    *((f"{command}: a folder of runs", write("runs/mine/run.toml", ""), f"{command} runs",
       ("runs: a folder of runs (mine); name one of them",)) for command in ("sample", "eval", "resume", "doctor")),
    *((f"{command}: a folder without a model", write("docs/a.md", "x"), f"{command} docs",
       ("docs: no run.toml, so this is not a run folder;",)) for command in ("sample", "eval", "resume")),
    ("resume: a folder of a ladder", write("runs/l/1-bigram/seed-1/run.toml", ""), "resume runs/l",
     ("runs/l: a folder of ladder runs; name one of them, for example runs/l/1-bigram/seed-1",)),
    ("sample: a file", nothing, "sample text.txt", ("text.txt: a file, not a run", "sample RUN --prompt TEXT")),
    ("eval: a file first", nothing, "eval text.txt", ("text.txt: a file, not a model; name a run folder", "first")),
    ("train: a run as the text", nothing, "train run", ("run: a run folder, not a text", "`bardlet resume run`",
                                                        "--init run")),
    ("sft: a name below runs/", both(write("runs/mine/run.toml", ""), write("bad.jsonl", "{}")), "sft mine bad.jsonl",
     ("mine: no such folder; did you mean runs/mine?",)),
    ("resume: run.toml edited, and no checkpoint", both(edit("run/run.toml", lambda raw: raw + b"\n"),
                                                         remove("run/checkpoints")), "resume run",
     ("run/run.toml: edited", "restore it")),
    ("resume: finished", nothing, "resume run",
     ("run: finished, all 2 steps are done", "--allow-change", "--init run")),
    ("resume: every checkpoint damaged",
     both(flip(f"{NEWEST}/model.safetensors", -1), flip(f"{OLDEST}/trainer.json", 5)),
     "resume run", ("run: no intact checkpoint", f"{NEWEST}/model.safetensors: damaged", "--config run/run.toml")),
    ("resume: no checkpoint", remove("run/checkpoints"), "resume run", ("run: no intact checkpoint", "--config")),
    ("resume: the text changed", edit("text.txt", lambda raw: raw + b"."), "resume run",
     ("run: the text text changed since the run started", "--allow-change")),
    ("resume: the text is gone", remove("text.txt"), "resume run", ("text.txt: no such file",)),
    ("resume: other tokenizer", other_tokenizer("abc"), "resume run", ("run/tokenizer.json", "restore a copy")),
    ("resume: other shape", config(n_layer=2), "resume run", ("run/config.json", "restore a copy")),
    ("resume: steps without --allow-change", nothing, "resume run --steps 4", ("--steps 4", "--allow-change")),
    *((f"resume: --steps {argv}", nothing, f"resume run --steps {argv}", (f"--steps {argv[:2].strip()}: {why}",))
      for argv, why in (("2", "2 steps of run are already done; name a larger number"), ("1 --allow-change", "2 steps"),
                        ("2 --allow-change", "2 steps"), ("0 --allow-change", "must be more than 0"),
                        ("-1 --allow-change", "must be more than 0"))),
    ("resume: steps not a number", nothing, "resume run --steps x", ("--steps x: must be a whole number",)),
    ("eval: the run's text is unknown", remove("run/run.toml"), "eval run", ("run: no run.toml", "with TEXT")),
]

# a Hugging Face folder from elsewhere, which has no manifest
FOREIGN: list[tuple[str, Arrange, str, tuple[str, ...]]] = [
    ("config.json missing", remove("run/config.json"), "sample run",
     ("run/config.json", "not a complete model folder")),
    ("config.json cut", cut("run/config.json"), "sample run", ("run/config.json: damaged at line", "copy it again")),
    ("config.json empty", write("run/config.json", ""), "sample run", ("run/config.json: damaged at line 1",)),
    ("config.json: a list", write("run/config.json", "[]"), "sample run",
     ("run/config.json", "a list, not an object", "copy it again")),
    ("config.json: 5,000 digits", write("run/config.json", '{"a": ' + "1" * 5000 + "}"), "sample run",
     ("run/config.json: damaged",)),
    ("config.json: deep", write("run/config.json", "[" * 100_000), "sample run", ("run/config.json: damaged",)),
    ("config.json: key missing", config(n_embd=None), "sample run", ("run/config.json has no 'n_embd'", "damaged")),
    ("config.json: text for a number", config(n_layer="1"), "sample run", ("run/config.json: 'n_layer' is '1'",)),
    ("config.json: other family", config(model_type="gemma"), "sample run",
     ("run/config.json", "'gemma'", "gpt2", "use transformers")),
    ("config.json: absurd width", config(n_embd=10**12), "sample run", ("run/config.json: damaged", "copy it again")),
    ("config.json: overflowing width", config(n_embd=10**25), "sample run", ("run/config.json: damaged",)),
    ("config.json: absurd depth", config(n_layer=10**12), "sample run",
     ("run/config.json: damaged", "1000000000000 layers")),
    ("config.json: absurd vocabulary", config(vocab_size=10**12), "sample run", ("run", "do not belong together")),
    ("config.json: absurd context", config(n_positions=10**12), "sample run", ("run/config.json: damaged", "context")),
    ("config.json: other width", config(n_embd=32, n_inner=64), "sample run",
     ("run/model.safetensors", "transformer.wte.weight", "32]", "config.json")),
    ("weights missing", remove("run/model.safetensors"), "sample run", ("run/model.safetensors", "no such file")),
    ("weights cut", cut("run/model.safetensors"), "sample run",
     ("run/model.safetensors: damaged or truncated", "copy it again")),
    ("weights cut in the header", cut("run/model.safetensors", 0.01), "sample run",
     ("run/model.safetensors: damaged",)),
    ("weights empty", write("run/model.safetensors", ""), "sample run", ("run/model.safetensors: damaged",)),
    ("weights: a flipped bit in the length", flip("run/model.safetensors", 5), "sample run",
     ("run/model.safetensors: damaged",)),
    ("weights: a flipped bit in a name", flip("run/model.safetensors", 60), "sample run", ("run/model.safetensors",)),
    ("weights: index damaged", both(remove("run/model.safetensors"),
                                    write("run/model.safetensors.index.json", '{"weight_map": 3}')), "sample run",
     ("run/model.safetensors.index.json: damaged", "weight_map")),
    ("tokenizer missing", remove("run/tokenizer.json"), "sample run",
     ("run/tokenizer.json", "no such file", "copy the file there")),
    ("tokenizer cut", cut("run/tokenizer.json"), "sample run", ("run/tokenizer.json: damaged", "copy it again")),
    ("tokenizer not JSON", write("run/tokenizer.json", PNG), "sample run", ("run/tokenizer.json", "not UTF-8")),
    ("tokenizer: an empty object", write("run/tokenizer.json", "{}"), "sample run", ("run/tokenizer.json: damaged",)),
    ("tokenizer of a larger model", other_tokenizer("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ"), "sample run",
     ("run: its tokenizer has 36 tokens", "do not belong together")),
    ("tokenizer: absurd id", edit("run/tokenizer.json", lambda raw: raw.replace(b'": 3', b'": 4000000000', 1)),
     "sample run", ("run/tokenizer.json: damaged",)),
]
BAD += [(f"foreign: {name}", both(arrange, remove("run/manifest.json"), remove("run/run.toml")), argv, fragments)
        for name, arrange, argv, fragments in FOREIGN]


@pytest.mark.parametrize(("arrange", "argv", "fragments"),
                         [pytest.param(*row[1:], id=row[0]) for row in BAD])
def test_bad_input_is_one_line_and_changes_nothing(workspace, capsys, arrange, argv, fragments):
    arrange()
    before = on_disk(workspace)
    assert main(shlex.split(argv)) == 1
    line = error_line(capsys.readouterr().err)
    for fragment in fragments:
        assert fragment in line
    assert on_disk(workspace) == before


# ------------------------------------------------------------------------------- id, arrangement, argv, fragments

UNUSUAL: list[tuple[str, Arrange, str, tuple[str, ...]]] = [
    ("CRLF", bad(TEXT.replace("\n", "\r\n")), TRAIN, ("note: bad.txt: has Windows line endings (CR LF)",)),
    ("BOM", bad(b"\xef\xbb\xbf" + TEXT.encode()), TRAIN, ("note: bad.txt: starts with a byte order mark",)),
    ("UTF-16 with BOM", bad(TEXT.encode("utf-16")), TRAIN, ("note: bad.txt: is UTF-16, not UTF-8",)),
    ("UTF-32 with BOM", bad(TEXT.encode("utf-32")), TRAIN, ("note: bad.txt: is UTF-32, not UTF-8",)),
    ("BOM in the middle", bad(TEXT + "\ufeff" + TEXT), TRAIN, ("saved to out",)),
    ("classic Mac line endings", bad(TEXT.replace("\n", "\r")), TRAIN, ("saved to out",)),
    ("one character", bad("a" * 3000), TRAIN, ("note: most of the text is duplicated", "saved to out")),
    ("one line of a megabyte", bad(TEXT.replace("\n", " ") * 1000), TRAIN, ("saved to out",)),
    ("every character different", bad("".join(map(chr, range(0x4E00, 0x5E00)))), TRAIN, ("saved to out",)),
    ("control characters", bad((TEXT + "\x07\x0c\x1b[31m") * 3), TRAIN, ("saved to out",)),
    ("emoji, right to left, and marks", bad("👩‍👩‍👧 مرحبا e\u0301\u0301 \u202eabc\u202c\n" * 200), TRAIN,
     ("saved to out",)),
    ("jsonl with blank lines, empty texts and a key twice",
     jsonl("", {"text": ""}, '{"text": "no", "text": "' + TEXT.replace("\n", " ") + '"}', "", {"text": TEXT}),
     TRAIN.replace(".txt", ".jsonl"), ("saved to out",)),
    ("UTF-16 in a gz", write("bad.gz", gzip.compress(TEXT.encode("utf-16"))), TRAIN.replace("bad.txt", "bad.gz"),
     ("note: bad.gz: is UTF-16, not UTF-8",)),
    ("empty file in a folder", both(write("bad.txt/a.txt", TEXT), write("bad.txt/b.txt", "")), TRAIN,
     ("note: bad.txt/b.txt: the file is empty; skipping it",)),
    ("a file named like a corpus", write("factbook", TEXT), f"train ./factbook {TINY} --out out", ("text: factbook",)),
    ("out is an empty folder", lambda: Path("out").mkdir(), GOOD, ("saved to out",)),
    ("settings with underscores", nothing, GOOD + " --log_every 1", ("saved to out",)),
    ("channels not divisible by heads", nothing,
     "train text.txt --model one-head --n-embd 10 --steps 2 --block-size 8 --out out", ("10 channels",)),
    ("config: settings that the rung lacks", write("bad.toml", 'model = "one-head"\nn_layer = 3\ndropout = 0.1\n'),
     "train text.txt --config bad.toml --steps 2 --block-size 8 --n-embd 16 --out out",
     ("note: n_layer, dropout: ignored, does not apply to one-head", "saved to out")),
    ("config with a BOM", write("bad.toml", b"\xef\xbb\xbfminutes = 1.0\n"),
     GOOD + " --config bad.toml", ("plan: 2 steps",)),
    ("unknown characters in eval", bad("日本" + TEXT), "eval run bad.txt --json",
     ("note: skipped 2 characters that the tokenizer does not know", '"skipped_characters": 2')),
    ("eval: the training text", nothing, "eval run text.txt", ("note: text.txt: the run trained on this text",)),
    ("eval after the text changed", edit("text.txt", lambda raw: raw + b"to be"), "eval run",
     ("note: text changed since the run trained on it",)),
    ("resume: run.toml damaged", edit("run/run.toml", lambda raw: raw.replace(b"seed = ", b"seed ", 1)),
     "resume run",
     ("note: run/run.toml: edited or damaged; using the settings saved in step-00000002",
      "after step 2 of 2")),
    ("resume: run.toml with a changed digit",
     edit("run/run.toml", lambda raw: raw.replace(b"seed = 1", b"seed = 2", 1)), "resume run",
     ("note: run/run.toml: edited or damaged",)),
    ("resume: run.toml without [record]", edit("run/run.toml", lambda raw: raw.split(b"\n[record]")[0]), "resume run",
     ("note: run/run.toml: edited or damaged",)),
    ("resume: run.toml missing", remove("run/run.toml"), "resume run", ("note: run/run.toml: missing; using",)),
    ("resume: root weights damaged", flip("run/model.safetensors", -1), "resume run",
     ("note: run/model.safetensors: damaged", "will replace them", "(last weights, step 2)")),
    ("resume: root manifest missing", remove("run/manifest.json"), "resume run --steps 3 --allow-change",
     ("note: run/manifest.json: no such file", "assuming the other files are intact")),
    ("resume: root weights missing, as the manifest says",
     both(remove("run/model.safetensors"), lambda: manifest.write_manifest(Path("run"), hf.TOKENIZER_AND_CONFIG)),
     "resume run",
     ("note: run/model.safetensors: missing; the weights of the run folder are lost", "(last weights, step 2)")),
    ("sample: a manifest of another tool",
     both(write("run/manifest.json", '{"name": "a web page"}'), remove("run/run.toml")), "sample run --tokens 5", ()),
    ("sample: manifest missing", remove("run/manifest.json"), "sample run --tokens 5",
     ("note: run: its manifest.json is missing",)),
    ("newest checkpoint damaged", flip(f"{NEWEST}/model.safetensors", -1), "resume run",
     (f"note: {NEWEST}/model.safetensors: damaged", "falling back to step-00000001", "continuing after step 1 of 2")),
    ("newest checkpoint without manifest", remove(f"{NEWEST}/manifest.json"), "resume run --json",
     (f"note: {NEWEST}/manifest.json", "falling back to step-00000001", '"resumed_from": 1')),
    ("metrics: a flipped bit", flip("run/metrics.jsonl", 30), "resume run --steps 3 --allow-change",
     ("note: run/metrics.jsonl: line 1 is damaged; skipping it", "after step 2 of 3")),
    ("metrics: a cut line", cut("run/metrics.jsonl", 0.9), "resume run --steps 3 --allow-change",
     ("after step 2 of 3",)),
]


@pytest.mark.parametrize(("arrange", "argv", "fragments"), [pytest.param(*row[1:], id=row[0]) for row in UNUSUAL])
def test_unusual_input_works_and_is_reported(workspace, capsys, arrange, argv, fragments):
    arrange()
    assert main(shlex.split(argv)) == 0
    out, err = capsys.readouterr()
    for fragment in fragments:
        assert fragment in out + err
    assert all(line.startswith("note: ") for line in err.splitlines())
    if "--out out" in argv:
        assert hf.read_folder(Path("out"))


# ------------------------------------------------------------------------------- cases that need more than a row


def test_cuda_without_a_gpu_is_one_line(workspace, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert main(shlex.split(f"train text.txt {TINY} --device cuda --out out")) == 1
    line = error_line(capsys.readouterr().err)
    assert "--device cuda" in line and "use --device cpu" in line
    assert not Path("out").exists()


def test_resume_refuses_a_run_that_is_in_use(workspace, capsys):
    before = on_disk(workspace)
    with lock.locked(Path("run")):
        assert main(["resume", "run"]) == 1
        line = error_line(capsys.readouterr().err)
        assert f"run: in use by process {os.getpid()}" in line and "wait for it" in line
    assert on_disk(workspace) == before


def test_two_runs_that_choose_the_same_folder(workspace, capsys, monkeypatch):
    """Both find the folder free; the later one must not write into the other's run."""
    from bardlet import runner

    before, run_to_end = on_disk(workspace), runner.run_to_end

    def late(trainer, *args, **kwargs):
        trainer.run = Path("run")
        return run_to_end(trainer, *args, **kwargs)

    monkeypatch.setattr(runner, "run_to_end", late)
    assert main(shlex.split(GOOD)) == 1
    assert "run: already contains a run" in error_line(capsys.readouterr().err)
    assert on_disk(workspace) == before


FULL = "No space left on device"


@pytest.mark.parametrize("error", [OSError(28, FULL, "out/x"), SafetensorError(f"I/O error: {FULL} (os error 28)")],
                         ids=["system", "library"])
def test_a_full_disk_is_one_line(workspace, capsys, monkeypatch, error):
    def full(*args: object, **kwargs: object) -> None:
        raise error

    before = on_disk(workspace)
    monkeypatch.setattr(hf, "save_file", full)
    assert main(shlex.split(GOOD)) == 1
    line = error_line(capsys.readouterr().err)
    assert "o space left on device" in line and "out/" in line and "free some space, or choose another --out" in line
    assert on_disk(workspace) == before


def run_cli(argv: str, workspace: Path, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "bardlet", *shlex.split(argv)], cwd=workspace, timeout=600,
                          capture_output=True, check=False, **options)  # type: ignore[call-overload]


def test_file_size_limit_while_saving(workspace):
    """The system refuses to write the weights: the new run folder is removed, the rest stays."""
    before = on_disk(workspace)
    done = run_cli(GOOD, workspace, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)))
    assert done.returncode == 1
    line = error_line(done.stderr.decode())
    assert "out/" in line and "too large" in line.lower()
    assert on_disk(workspace) == before


def obey_permissions() -> None:
    """Drop CAP_DAC_*, so that the program started next obeys file permissions even as root."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        if os.geteuid() == 0 and libc.prctl(24, capability, 0, 0, 0) != 0:  # PR_CAPBSET_DROP
            os._exit(77)


def test_missing_permissions_are_one_line(workspace):
    """An unreadable file, a folder that cannot be listed, and one that cannot be written to."""
    script = """
import json, sys
from bardlet.cli import main
for argv in json.loads(sys.argv[1]):
    print("code", main(argv), file=sys.stderr, flush=True)
"""
    cases = [("train secret.txt --out out", ("secret.txt: permission denied", "chmod")),
             ("train closed --out out", ("closed: cannot be read (Permission denied)", "change its permissions")),
             (f"train text.txt {TINY} --out theirs/out",
              ("theirs/out: theirs is not writable", "another --out")),
             ("train --config secret.txt", ("secret.txt: cannot be read (Permission denied)",)),
             ("sample run", ("run/config.json: cannot be read (Permission denied)", "change its permissions"))]
    for folder in ("closed", "theirs"):
        Path(folder).mkdir()
    Path("secret.txt").write_text(TEXT, encoding="utf-8")
    before = on_disk(workspace)
    for name, mode in (("secret.txt", 0), ("closed", 0), ("run/config.json", 0), ("theirs", 0o555)):
        Path(name).chmod(mode)
    done = subprocess.run([sys.executable, "-c", script, json.dumps([shlex.split(argv) for argv, _ in cases])],
                          cwd=workspace, preexec_fn=obey_permissions, capture_output=True, text=True, timeout=600,
                          check=False)
    for name in ("secret.txt", "closed", "run/config.json", "theirs"):
        Path(name).chmod(0o755)
    if done.returncode == 77:
        pytest.skip("cannot drop root's capabilities")
    errors = done.stderr.split("code 1\n")
    assert len(errors) == len(cases) + 1 and not errors[-1], done.stderr
    for error, (_, fragments) in zip(errors, cases, strict=False):
        for fragment in fragments:
            assert fragment in error_line(error)
    assert on_disk(workspace) == before


def test_chinese_text_and_file_names_in_an_ascii_locale(workspace, trained):
    poem = "床前明月光疑是地上霜舉頭望明月低頭思故鄉\n" * 60
    Path("靜夜思.txt").write_text(poem, encoding="utf-8")
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = run_cli(f"train 靜夜思.txt {TINY} --out 詩", workspace, env=ascii_only)
    assert done.returncode == 0, done.stderr.decode()
    assert "詩" in done.stdout.decode()
    done = run_cli("sample 詩 --prompt 明月 --tokens 20 --seed 1", workspace, env=ascii_only)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().startswith("明月")


def test_a_closed_pipe_is_no_error(workspace):
    """`bardlet sample ... | head -c 10` prints no message and exits with 0."""
    with subprocess.Popen([sys.executable, "-m", "bardlet", "sample", "run", "--tokens", "20000"], cwd=workspace,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as sample:
        assert sample.stdout and sample.stderr
        assert len(sample.stdout.read(10)) == 10
        sample.stdout.close()
        assert sample.stderr.read() == b""
        assert sample.wait(timeout=600) == 0


def test_plan_writes_nothing(workspace, capsys):
    before = on_disk(workspace)
    assert main(shlex.split(GOOD + " --plan")) == 0
    assert "plan: 2 steps of 16 tokens" in capsys.readouterr().out
    assert on_disk(workspace) == before


@pytest.mark.parametrize("argv", [GOOD, "resume run --steps 3 --allow-change", "eval run",
                                  "sample run --tokens 5", "data"])
def test_json_is_an_object_on_the_last_line(workspace, capsys, argv):
    assert main([*shlex.split(argv), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert isinstance(json.loads(lines[-1]), dict)
    assert not any(line.startswith("{") for line in lines[:-1])


def test_the_weights_have_the_permissions_of_the_other_files(workspace):
    """The safetensors library alone writes a file that only its owner can read."""
    assert Path("run/model.safetensors").stat().st_mode == Path("run/config.json").stat().st_mode
