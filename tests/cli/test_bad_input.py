"""Bad and odd input over all commands: it works and says what it mended, or it is one line that helps.

Each row of BAD ends with a code that is not 0 and one line `bardlet: ...` that names the file or setting, the place
and the remedy; nothing on disk has changed. Each row of ODD does its work, and says what it did to the input.
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
    """A folder with text.txt and a finished run of two steps on it, each with a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    with environment(folder, folder / "cache"):
        Path("text.txt").write_text(TEXT, encoding="utf-8")
        assert main(shlex.split(f"train text.txt {TINY} --save-every 1 --out run")) == 0
    return folder


@contextmanager
def environment(folder: Path, cache: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("BARDLET_CACHE", str(cache))
        patch.delenv("BARDLET_DATA", raising=False)
        yield


@pytest.fixture
def here(tmp_path, trained) -> Iterator[Path]:
    """The folder that a row works in: text.txt, and the finished run in run/."""
    folder = tmp_path / "here"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("cache"))
    with environment(folder, trained / "cache"):
        yield folder


def on_disk(folder: Path) -> dict[str, object]:
    """Everything below `folder`: what kind it is, and the content of files."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        found[str(path.relative_to(folder))] = path.read_bytes() if stat.S_ISREG(mode) else stat.S_IFMT(mode)
    return found


def complaint(err: str) -> str:
    """The one line of an error, after notices; anything else on standard error fails."""
    *notes, last = err.splitlines() or [""]
    assert last.startswith("bardlet: "), err
    assert all(line.startswith("note: ") for line in notes), err
    assert "should not have happened" not in err
    assert "Traceback" not in err
    assert not any(sign in last for sign in ("Errno", "<class", "│", "  ")), f"not for people: {last}"
    return last


# ------------------------------------------------------------------------------- how input gets bad


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


def flip(name: str, place: int) -> Arrange:
    """One bit of the byte at `place` is another; -1 is the last byte."""
    def change(raw: bytes) -> bytes:
        at = place % len(raw)
        return raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :]

    return edit(name, change)


def config(**changes: object) -> Arrange:
    """run/config.json with other values; None takes a key out."""
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
    """The command line alone is what is bad."""


NEWEST, OLDEST = "run/checkpoints/step-00000002", "run/checkpoints/step-00000001"
GZ, XZ = gzip.compress(TEXT.encode() * 50, mtime=0), lzma.compress(os.urandom(5000).hex().encode())
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256))
ELF = b"\x7fELF\x02\x01\x01\x00" + bytes(64)

# ------------------------------------------------------------------------------- id, arrangement, argv, fragments

BAD: list[tuple[str, Arrange, str, tuple[str, ...]]] = [
    # a text
    ("missing file", nothing, TRAIN, ("bad.txt: no such file", "bardlet data")),
    ("empty file", bad(""), TRAIN, ("bad.txt", "empty", "name a file")),
    ("one byte", bad("a"), TRAIN, ("bad", "0 tokens", "longer text")),
    ("only a byte order mark", bad(b"\xef\xbb\xbf"), TRAIN, ("bad.txt", "no text", "name a file")),
    ("shorter than the context", bad("To be, or not to be"), TRAIN.replace("size 8", "size 64"),
     ("17 tokens", "--block-size 8")),
    ("UTF-16 without BOM", bad(TEXT.encode("utf-16-le")), TRAIN, ("bad.txt: NUL at byte 1 (line 1)", "as UTF-8")),
    ("UTF-16 cut in a character", bad("héé".encode("utf-16") + b"x"), TRAIN,
     ("bad.txt", "UTF-16", "byte 8", "as UTF-8")),
    ("invalid UTF-8", bad(b"a line\nca" + "fé\n".encode("latin-1") + TEXT.encode()), TRAIN,
     ("bad.txt: not valid UTF-8 at byte 10 (line 2): 0xE9", "iconv")),
    ("Latin-1", bad((TEXT + "café\n").encode("latin-1")), TRAIN, ("not valid UTF-8", "0xE9", "iconv")),
    ("UTF-8 cut in its last character", bad((TEXT + "é").encode()[:-1]), TRAIN,
     (f"bad.txt: not valid UTF-8 at byte {len(TEXT)} (line 25): 0xC3",)),
    ("half a surrogate pair in UTF-8", bad(TEXT.encode() + b"\xed\xa0\x80"), TRAIN, ("not valid UTF-8", "0xED")),
    ("an overlong UTF-8", bad(b"a\xc0\x80" + TEXT.encode()), TRAIN, ("bad.txt: not valid UTF-8 at byte 1 (line 1): 0xC0",)),
    ("half a surrogate pair in jsonl", jsonl({"text": TEXT}, '{"text": "a\\ud800"}'), TRAIN.replace(".txt", ".jsonl"),
     ('bad.jsonl, line 2: character 1 of "text" is half of a surrogate pair',)),
    ("jsonl: invalid UTF-8", write("bad.jsonl", b'{"text": "one"}\n{"text": "\xff"}\n'),
     TRAIN.replace(".txt", ".jsonl"), ("bad.jsonl: not valid UTF-8 at byte 26 (line 2): 0xFF",)),
    ("jsonl: only empty texts", jsonl(*[{"text": ""}] * 30), TRAIN.replace(".txt", ".jsonl"), ("no text in it",)),
    ("a gz that grows a thousandfold", write("bad.gz", gzip.compress(bytes(1 << 28), 1, mtime=0)),
     TRAIN.replace("bad.txt", "bad.gz"), ("bad.gz: NUL at byte 0 (line 1)",)),
    ("NUL", bad("one\ntwo\n\0three"), TRAIN, ("bad.txt: NUL at byte 8 (line 3)", "leave the file out")),
    ("PNG", bad(PNG), TRAIN, ("bad.txt: NUL at byte 8", "binary")),
    ("ELF", bad(ELF), TRAIN, ("bad.txt: NUL at byte 7 (line 1)", "binary")),
    ("empty folder", lambda: Path("bad.txt").mkdir(), TRAIN, ("bad.txt: no text files in the folder", ".jsonl")),
    ("folder without text", write("bad.txt/a.png", PNG), TRAIN, ("bad.txt: no text files in the folder", "name a file")),
    ("binary in a folder", both(write("bad.txt/a.txt", TEXT), write("bad.txt/b.txt", ELF)), TRAIN,
     ("bad.txt/b.txt: NUL at byte 7", "leave the file out")),
    ("pattern without match", nothing, f"train 'no-*.txt' {TINY} --out out", ("no-*.txt", "no file matches", "ls")),
    ("FIFO", lambda: os.mkfifo("bad.txt"), TRAIN, ("bad.txt", "FIFO", "to a file first")),
    ("device", nothing, f"train /dev/zero {TINY} --out out", ("/dev/zero", "not a regular file", "to a file first")),
    ("broken symlink", link("bad.txt", "gone"), TRAIN, ("bad.txt", "No such file", "still exists")),
    ("symlink loop", link("bad.txt", "bad.txt"), TRAIN, ("bad.txt", "symbolic links")),
    ("damaged gz", write("bad.gz", GZ[:40] + b"\xff\xff\xff" + GZ[43:]), TRAIN.replace("bad.txt", "bad.gz"),
     ("bad.gz: the compressed data is damaged", "get the file again")),
    ("gz that is none", write("bad.gz", TEXT), TRAIN.replace("bad.txt", "bad.gz"), ("bad.gz", "damaged", "again")),
    ("cut xz", write("bad.xz", XZ[: len(XZ) // 2]), TRAIN.replace("bad.txt", "bad.xz"),
     ("bad.xz: the compressed data is damaged", "get the file again")),
    ("jsonl: bad line", jsonl({"text": "one"}, '{"text": "two"'), TRAIN.replace(".txt", ".jsonl"),
     ("bad.jsonl, line 2: is not JSON at column", "one object per line")),
    ("jsonl: no field", jsonl({"title": "one", "body": "two"}), TRAIN.replace(".txt", ".jsonl"),
     ('bad.jsonl, line 1: has no field "text"', "--field: title, body")),
    ("jsonl: not a string", jsonl({"text": "one"}, {"text": 2}), TRAIN.replace(".txt", ".jsonl"),
     ('bad.jsonl, line 2: "text" is int', "--field")),
    ("jsonl: not an object", jsonl(["one"]), TRAIN.replace(".txt", ".jsonl"), ("bad.jsonl, line 1", '{"text"')),
    ("jsonl: number of 5,000 digits", jsonl('{"text": ' + "1" * 5000 + "}"), TRAIN.replace(".txt", ".jsonl"),
     ("bad.jsonl, line 1",)),
    ("jsonl: nested 100,000 deep", jsonl("[" * 100_000), TRAIN.replace(".txt", ".jsonl"), ("bad.jsonl, line 1",)),
    ("empty name", nothing, f"train '' {TINY} --out out", ("name",)),
    ("unknown corpus", nothing, f"train tinyshakespear {TINY} --out out",
     ("tinyshakespear", 'did you mean "tinyshakespeare"', "bardlet data")),
    ("unknown corpus to get", nothing, "data get factbok", ('"factbok"', 'did you mean "factbook"')),
    ("corpus that is not here", nothing, f"train factbook {TINY} --out out", ("factbook", "$BARDLET_DATA")),
    ("eval: missing file", nothing, "eval run bad.txt", ("bad.txt: no such file", "bardlet data")),
    ("eval: empty file", bad(""), "eval run bad.txt", ("bad.txt", "empty", "name a file")),
    ("eval: nothing known in it", bad("日本語"), "eval run bad.txt", ("bad: 0 tokens are too few", "longer text")),
    # the command line
    ("unknown command", nothing, "trian", ("'trian'", "did you mean `bardlet train`")),
    ("unknown word for data", nothing, "data fetch names", ("data fetch names", "bardlet data get NAME")),
    ("unknown setting", nothing, f"{TRAIN} --stepz 3", ("--stepz", "did you mean --steps", "bardlet train --help")),
    ("unknown short setting", nothing, "sample run -t 3", ("no setting -t", "bardlet sample --help")),
    ("word too many", nothing, "sample run --prompt To be", ("too many: be", "quotes")),
    ("no run named", nothing, "sample", ("missing: a run folder", "bardlet sample --help")),
    ("value missing", nothing, "train text.txt --lr --steps 3", ("--lr needs a value: a number",)),
    ("wrong type", nothing, "train text.txt --steps 1.5", ("--steps 1.5: it must be a whole number",)),
    ("not a number", nothing, "train text.txt --dropout much", ("--dropout much: it must be a number",)),
    ("not a choice", nothing, "train text.txt --model gpt3", ("--model gpt3: it must be one of", "gpt2")),
    ("value for a switch", nothing, "train text.txt --json=yes", ("--json takes no value", "--no-json")),
    ("negative steps", nothing, "train text.txt --steps -3", ("--steps -3: it must be more than 0",)),
    ("zero batch", nothing, "train text.txt --batch-size 0", ("--batch-size 0: it must be at least 1",)),
    ("dropout 1.5", nothing, "train text.txt --dropout 1.5", ("--dropout 1.5", "below 1")),
    ("infinite minutes", nothing, "train text.txt --minutes inf", ("--minutes inf",)),
    ("learning rate nan", nothing, "train text.txt --lr nan", ("--lr nan",)),
    ("absurd seed", nothing, f"train text.txt --seed {10**30}", ("--seed", "at most")),
    ("absurd width", nothing, f"{GOOD} --n-embd {10**12}", ("does not fit into memory", "--n-embd")),
    ("absurd batch", nothing, f"{GOOD} --batch-size {10**13}",
     ("does not fit into memory", "smaller --batch-size")),
    ("steps and minutes", nothing, "train text.txt --steps 2 --minutes 1", ("--steps and --minutes", "keep the one")),
    ("heads do not divide", nothing, "train text.txt --n-embd 100 --n-head 6", ("--n-embd 100", "--n-head 5")),
    ("gpt2 with kv heads", nothing, "train text.txt --model gpt2 --n-kv-head 2", ("--n-kv-head 2", "qwen3")),
    ("odd head for qwen3", nothing, "train text.txt --n-embd 12 --n-head 4", ("--n-embd 12", "even")),
    ("a rung without dropout", nothing, "train text.txt --model feed-forward --dropout 0.1",
     ("--dropout 0.1: feed-forward does not have that", "--model dropout, rotary")),
    ("a rung without a width", nothing, "train text.txt --model feed-forward --n-inner=64",
     ("--n-inner 64: feed-forward", "--model residual")),
    ("a rung of one layer", nothing, "train text.txt --model multi-head --n-layer 2",
     ("--n-layer 2: multi-head", "--model residual", "or qwen3")),
    ("a rung of one head", nothing, "train text.txt --model one-head --n-head 2", ("--n-head 2", "--model multi-head")),
    ("a rung with a head of its own", nothing, "train text.txt --model dropout --tie-embeddings",
     ("--tie-embeddings: dropout does not have that", "take --model gpt2 or qwen3")),
    ("muon for a table", nothing, "train text.txt --model bigram --optimizer muon",
     ("--optimizer muon: bigram", "--model one-head")),
    ("ladder: rungs above the last", nothing, "ladder text.txt --rungs 3-20", ("--rungs 3-20", "13 rungs; take 3-13")),
    ("ladder: rungs downwards", nothing, "ladder text.txt --rungs 3-1", ("--rungs 3-1", "take 1-3")),
    ("ladder: a rung misspelt", nothing, "ladder text.txt --rungs one-haed", ("'one-haed'", "did you mean one-head?")),
    ("ladder: steps", nothing, "ladder text.txt --steps 5", ("--steps", "did you mean --minutes")),
    ("ladder: a file as out", nothing, "ladder text.txt --rungs 1 --out text.txt", ("text.txt", "another --out")),
    ("char with vocab size", nothing, f"train text.txt --tokenizer char --vocab-size 99 {TINY} --out out",
     ("--vocab-size is for bpe", "--tokenizer char")),
    ("vocab too small for bpe", nothing, f"train text.txt --tokenizer bpe --vocab-size 100 {TINY} --out out",
     ("--vocab-size 100", "at least 262", "--tokenizer byte")),
    ("init of nothing", nothing, f"train text.txt --init gone {TINY} --out out", ("gone: there is no such folder",)),
    ("unknown device", nothing, f"train text.txt {TINY} --device gpu --out out", ("--device gpu", "--device cpu")),
    ("device that holds nothing", nothing, f"train text.txt {TINY} --device meta --out out",
     ("--device meta", "--device cpu")),
    ("tokens 0", nothing, "sample run --tokens 0", ("--tokens 0: it must be at least 1",)),
    ("temperature -1", nothing, "sample run --temperature -1", ("--temperature -1.0: it must be 0 or more",)),
    ("temperature inf", nothing, "sample run --temperature inf", ("--temperature inf",)),
    ("top_p 2", nothing, "sample run --top-p 2", ("--top-p 2.0", "at most 1")),
    ("top_k 0", nothing, "sample run --top-k 0", ("--top-k 0: it must be at least 1",)),
    ("num 0", nothing, "sample run --num 0", ("--num 0: it must be at least 1",)),
    ("unseen in a prompt", nothing, "sample run --prompt 'To bé'",
     ("--prompt", '"é" (U+00E9) at line 1, column 5', "--tokenizer byte")),
    ("no such task", nothing, "eval run --task arc_easy", ("--task arc_easy", "did you mean arc-easy?", "hellaswag")),
    ("a task that is not here", nothing, "eval run --task copa gsm8k",
     ("--task copa: its questions are not on this machine", "put copa.jsonl.gz", "eval-gauntlet of $BARDLET_DATA")),
    ("a task without a name", nothing, "eval run --task", ("--task needs a value", "--task arc-easy")),
    ("a task and a text", nothing, "eval run text.txt --task copa", ("text.txt", "--task", "leave it out")),
    ("a task and pairs", nothing, "eval run --source text.txt --task copa", ("--source", "--task", "leave it out")),
    ("a limit without a task", nothing, "eval run --limit 3", ("--limit: is for --task", "leave it out")),
    ("limit 0", nothing, "eval run --task copa --limit 0", ("--limit 0: it must be at least 1",)),
    ("context 0", nothing, "eval run --context 0", ("--context 0: it must be at least 1",)),
    ("context too long", nothing, "eval run --context 9", ("--context 9", "take --context 8 or less")),
    # --config
    ("config missing", nothing, "train --config bad.toml", ("bad.toml: there is no such file", "--config")),
    ("config is a folder", nothing, "train --config run", ("run: cannot be read (Is a directory)", "name a TOML file")),
    ("config: syntax", write("bad.toml", "steps = 3\nlr = \n"), "train --config bad.toml", ("bad.toml", "line 2")),
    ("config: unknown key", write("bad.toml", "n_layers = 3\n"), "train --config bad.toml",
     ("bad.toml: unknown setting 'n_layers'", "'n_layer'")),
    ("config: unknown key, far", write("bad.toml", "zzz = 3\n"), "train --config bad.toml",
     ("bad.toml: unknown setting 'zzz'", "bardlet train --help")),
    ("config: wrong type", write("bad.toml", 'n_layer = "3"\n'), "train --config bad.toml",
     ("bad.toml: n_layer = '3'", "a whole number")),
    ("config: text no list", write("bad.toml", 'text = "a.txt"\n'), "train --config bad.toml",
     ("bad.toml: text = 'a.txt'", "a list, in [ ]")),
    ("config: short replan", write("bad.toml", "replans = [[1]]\n"), "train --config bad.toml",
     ("bad.toml: replans", "2 entries")),
    ("config: out of range", write("bad.toml", "dropout = 2.0\n"), "train --config bad.toml",
     ("bad.toml: --dropout 2.0", "below 1")),
    ("config: not UTF-8", write("bad.toml", b'text = ["\xe9"]'), "train --config bad.toml",
     ("bad.toml: byte 9 is no UTF-8",)),
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
    ("no such run", nothing, "sample gone", ("gone: there is no such folder", "bardlet train")),
    ("a bit of the weights", flip("run/model.safetensors", -1), "sample run",
     ("run/model.safetensors: damaged: it is not the file that was saved", "remove run/manifest.json")),
    ("weights of another run", write("run/model.safetensors", "x"), "eval run", ("run/model.safetensors: damaged",)),
    ("a bit of the tokenizer's settings", flip("run/tokenizer_config.json", 30), "sample run",
     ("run/tokenizer_config.json: damaged",)),
    ("weights that the manifest misses", remove("run/model.safetensors"), "sample run",
     ("run/model.safetensors", "no such file")),
    ("a bit of the manifest", flip("run/manifest.json", 99), "sample run", ("run/manifest.json: damaged",)),
    ("half a manifest", cut("run/manifest.json"), "sample run", ("run/manifest.json: damaged",)),
    ("a manifest of elsewhere", lambda: manifest.write_manifest(Path("run"), ["../text.txt"]), "sample run",
     ("run: a file in it refers to '../text.txt'", "not in this folder")),
    ("a damaged tokenizer_config.json without a manifest",
     both(edit("run/tokenizer_config.json", lambda raw: raw[1:]), remove("run/manifest.json"), remove("run/run.toml")),
     "sample run", ("run/tokenizer_config.json: damaged at line 2",)),
    ("--init with a damaged run", flip("run/model.safetensors", -1), f"train text.txt {TINY} --out out --init run",
     ("run/model.safetensors: damaged",)),
    # resume
    ("resume: no such folder", nothing, "resume gone", ("gone: there is no such folder",)),
    ("resume: no run", lambda: Path("empty").mkdir(), "resume empty", ("empty: no run.toml", "not a run folder")),
    ("resume: a file", nothing, "resume text.txt", ("text.txt", "no such folder")),
    ("resume: run.toml changed, and no checkpoint", both(edit("run/run.toml", lambda raw: raw + b"\n"),
                                                         remove("run/checkpoints")), "resume run",
     ("run/run.toml: edited", "restore it")),
    ("resume: finished", nothing, "resume run", ("run: all its 2 steps are done", "--init run")),
    ("resume: every checkpoint damaged",
     both(flip(f"{NEWEST}/model.safetensors", -1), flip(f"{OLDEST}/trainer.json", 5)),
     "resume run", ("run: no intact checkpoint", f"{NEWEST}/model.safetensors: damaged", "--config run/run.toml")),
    ("resume: no checkpoint", remove("run/checkpoints"), "resume run", ("run: no intact checkpoint", "--config")),
    ("resume: the text changed", edit("text.txt", lambda raw: raw + b"."), "resume run",
     ("run: the text text is not the one", "--allow-change")),
    ("resume: the text is gone", remove("text.txt"), "resume run", ("text.txt: no such file",)),
    ("resume: other tokenizer", other_tokenizer("abc"), "resume run", ("run/tokenizer.json", "restore a copy")),
    ("resume: other shape", config(n_layer=2), "resume run", ("run/config.json", "restore a copy")),
    ("resume: steps without leave", nothing, "resume run --steps 4", ("--steps 4", "--allow-change")),
    ("resume: steps of no number", nothing, "resume run --steps x", ("--steps x: it must be a whole number",)),
    ("eval: the run's text is not known", remove("run/run.toml"), "eval run", ("run: no run.toml", "name a text")),
]

# a Hugging Face folder from elsewhere, which has no manifest
FOREIGN: list[tuple[str, Arrange, str, tuple[str, ...]]] = [
    ("config.json missing", remove("run/config.json"), "sample run", ("run/config.json", "not a complete model folder")),
    ("config.json cut", cut("run/config.json"), "sample run", ("run/config.json: damaged at line", "copy it again")),
    ("config.json empty", write("run/config.json", ""), "sample run", ("run/config.json: damaged at line 1",)),
    ("config.json no object", write("run/config.json", "[]"), "sample run",
     ("run/config.json", "a list, not an object", "copy it again")),
    ("config.json: 5,000 digits", write("run/config.json", '{"a": ' + "1" * 5000 + "}"), "sample run",
     ("run/config.json: damaged",)),
    ("config.json: deep", write("run/config.json", "[" * 100_000), "sample run", ("run/config.json: damaged",)),
    ("config.json: key missing", config(n_embd=None), "sample run", ("run/config.json has no 'n_embd'", "damaged")),
    ("config.json: text for a number", config(n_layer="1"), "sample run", ("run/config.json: 'n_layer' is '1'",)),
    ("config.json: other family", config(model_type="llama"), "sample run",
     ("run/config.json", "'llama'", "gpt2", "use transformers")),
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
    ("weights: bit of the length", flip("run/model.safetensors", 5), "sample run",
     ("run/model.safetensors: damaged",)),
    ("weights: bit of a name", flip("run/model.safetensors", 60), "sample run", ("run/model.safetensors",)),
    ("weights: index damaged", both(remove("run/model.safetensors"),
                                    write("run/model.safetensors.index.json", '{"weight_map": 3}')), "sample run",
     ("run/model.safetensors.index.json: damaged", "weight_map")),
    ("tokenizer missing", remove("run/tokenizer.json"), "sample run",
     ("run/tokenizer.json", "no such file", "copy the file there")),
    ("tokenizer cut", cut("run/tokenizer.json"), "sample run", ("run/tokenizer.json: damaged", "copy it again")),
    ("tokenizer no JSON", write("run/tokenizer.json", PNG), "sample run", ("run/tokenizer.json", "not UTF-8")),
    ("tokenizer another object", write("run/tokenizer.json", "{}"), "sample run", ("run/tokenizer.json: damaged",)),
    ("tokenizer of a larger model", other_tokenizer("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ"), "sample run",
     ("run: its tokenizer has 36 tokens", "do not belong together")),
    ("tokenizer with an absurd id", edit("run/tokenizer.json", lambda raw: raw.replace(b'": 3', b'": 4000000000', 1)),
     "sample run", ("run/tokenizer.json: damaged",)),
]
BAD += [(f"foreign: {name}", both(arrange, remove("run/manifest.json"), remove("run/run.toml")), argv, fragments)
        for name, arrange, argv, fragments in FOREIGN]


@pytest.mark.parametrize(("arrange", "argv", "fragments"),
                         [pytest.param(*row[1:], id=row[0]) for row in BAD])
def test_bad_input_is_one_line_and_changes_nothing(here, capsys, arrange, argv, fragments):
    arrange()
    before = on_disk(here)
    assert main(shlex.split(argv)) == 1
    line = complaint(capsys.readouterr().err)
    for fragment in fragments:
        assert fragment in line
    assert on_disk(here) == before


# ------------------------------------------------------------------------------- id, arrangement, argv, what is said

ODD: list[tuple[str, Arrange, str, tuple[str, ...]]] = [
    ("CRLF", bad(TEXT.replace("\n", "\r\n")), TRAIN, ("note: bad.txt: has Windows line endings (CR LF)",)),
    ("BOM", bad(b"\xef\xbb\xbf" + TEXT.encode()), TRAIN, ("note: bad.txt: starts with a byte order mark",)),
    ("UTF-16 with BOM", bad(TEXT.encode("utf-16")), TRAIN, ("note: bad.txt: is UTF-16, not UTF-8",)),
    ("UTF-32 with BOM", bad(TEXT.encode("utf-32")), TRAIN, ("note: bad.txt: is UTF-32, not UTF-8",)),
    ("a BOM in the middle", bad(TEXT + "\ufeff" + TEXT), TRAIN, ("the run is in out",)),
    ("line ends of old Macs", bad(TEXT.replace("\n", "\r")), TRAIN, ("the run is in out",)),
    ("one character", bad("a" * 3000), TRAIN, ("note: most of the text is duplicated", "the run is in out")),
    ("only line breaks", bad("\n" * 3000), TRAIN, ("the run is in out",)),
    ("one line of a megabyte", bad(TEXT.replace("\n", " ") * 1000), TRAIN, ("the run is in out",)),
    ("every character another", bad("".join(map(chr, range(0x4E00, 0x5E00)))), TRAIN, ("the run is in out",)),
    ("control characters", bad((TEXT + "\x07\x0c\x1b[31m") * 3), TRAIN, ("the run is in out",)),
    ("emoji, right to left, and marks", bad("👩‍👩‍👧 مرحبا e\u0301\u0301 \u202eabc\u202c\n" * 200), TRAIN,
     ("the run is in out",)),
    ("jsonl with blank lines, empty texts and a key twice",
     jsonl("", {"text": ""}, '{"text": "no", "text": "' + TEXT.replace("\n", " ") + '"}', "", {"text": TEXT}),
     TRAIN.replace(".txt", ".jsonl"), ("the run is in out",)),
    ("UTF-16 in a gz", write("bad.gz", gzip.compress(TEXT.encode("utf-16"))), TRAIN.replace("bad.txt", "bad.gz"),
     ("note: bad.gz: is UTF-16, not UTF-8",)),
    ("empty file in a folder", both(write("bad.txt/a.txt", TEXT), write("bad.txt/b.txt", "")), TRAIN,
     ("note: bad.txt/b.txt: the file is empty; skipping it",)),
    ("a file with a corpus's name", write("factbook", TEXT), f"train ./factbook {TINY} --out out", ("text: factbook",)),
    ("out is an empty folder", lambda: Path("out").mkdir(), GOOD, ("the run is in out",)),
    ("settings with underscores", nothing, GOOD + " --log_every 1", ("the run is in out",)),
    ("channels that no head divides", nothing,
     "train text.txt --model one-head --n-embd 10 --steps 2 --block-size 8 --out out", ("10 channels",)),
    ("a rung's config with more than it has", write("bad.toml", 'model = "one-head"\nn_layer = 3\ndropout = 0.1\n'),
     "train text.txt --config bad.toml --steps 2 --block-size 8 --n-embd 16 --out out",
     ("note: n_layer, dropout: not used, one-head does not have that", "the run is in out")),
    ("config with a BOM", write("bad.toml", b"\xef\xbb\xbfminutes = 1.0\n"),
     GOOD + " --config bad.toml", ("plan: 2 steps",)),
    ("unseen in eval", bad("日本" + TEXT), "eval run bad.txt --json",
     ("2 characters that the tokenizer has never seen", '"skipped_characters": 2')),
    ("eval after the text changed", edit("text.txt", lambda raw: raw + b"to be"), "eval run",
     ("note: text is not the text that the run trained on",)),
    ("resume: run.toml damaged", edit("run/run.toml", lambda raw: raw.replace(b"seed = ", b"seed ", 1)),
     "resume run",
     ("note: run/run.toml: edited or damaged; using the settings saved in step-00000002",
      "after step 2 of 2")),
    ("resume: run.toml with another digit", edit("run/run.toml", lambda raw: raw.replace(b"seed = 1", b"seed = 2", 1)),
     "resume run", ("note: run/run.toml: edited or damaged",)),
    ("resume: run.toml without record", edit("run/run.toml", lambda raw: raw.split(b"\n[record]")[0]), "resume run",
     ("note: run/run.toml: edited or damaged",)),
    ("resume: run.toml missing", remove("run/run.toml"), "resume run", ("note: run/run.toml: missing; using",)),
    ("resume: the weights at the root damaged", flip("run/model.safetensors", -1), "resume run",
     ("note: run/model.safetensors: damaged", "will replace them", "(last weights, step 2)")),
    ("resume: the manifest at the root is lost", remove("run/manifest.json"), "resume run --steps 3 --allow-change",
     ("note: run/manifest.json: there is no such file", "assuming the other files are intact")),
    ("resume: the weights at the root lost, and that known",
     both(remove("run/model.safetensors"), lambda: manifest.write_manifest(Path("run"), hf.TOKENIZER_AND_CONFIG)), "resume run",
     ("note: run/model.safetensors: missing; the weights of the run folder are lost", "(last weights, step 2)")),
    ("sample: the manifest is another tool's",
     both(write("run/manifest.json", '{"name": "a web page"}'), remove("run/run.toml")), "sample run --tokens 5", ()),
    ("sample: the manifest is lost", remove("run/manifest.json"), "sample run --tokens 5",
     ("note: run: its manifest.json is missing",)),
    ("newest checkpoint damaged", flip(f"{NEWEST}/model.safetensors", -1), "resume run",
     (f"note: {NEWEST}/model.safetensors: damaged", "falling back to step-00000001", "continuing after step 1 of 2")),
    ("newest checkpoint without manifest", remove(f"{NEWEST}/manifest.json"), "resume run --json",
     (f"note: {NEWEST}/manifest.json", "falling back to step-00000001", '"resumed_from": 1')),
    ("a bit of metrics", flip("run/metrics.jsonl", 30), "resume run --steps 3 --allow-change",
     ("note: run/metrics.jsonl: line 1 is damaged; skipping it", "after step 2 of 3")),
    ("half a line of metrics", cut("run/metrics.jsonl", 0.9), "resume run --steps 3 --allow-change",
     ("after step 2 of 3",)),
]


@pytest.mark.parametrize(("arrange", "argv", "said"), [row[1:] for row in ODD], ids=[row[0] for row in ODD])
def test_odd_input_works_and_says_what_was_done(here, capsys, arrange, argv, said):
    arrange()
    assert main(shlex.split(argv)) == 0
    out, err = capsys.readouterr()
    for fragment in said:
        assert fragment in out + err
    assert all(line.startswith("note: ") for line in err.splitlines())
    if "--out out" in argv:
        assert hf.read_folder(Path("out"))


# ------------------------------------------------------------------------------- what a row of a table cannot hold


def test_no_gpu(here, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert main(shlex.split(f"train text.txt {TINY} --device cuda --out out")) == 1
    line = complaint(capsys.readouterr().err)
    assert "--device cuda" in line and "use --device cpu" in line
    assert not Path("out").exists()


def test_a_run_that_another_process_holds(here, capsys):
    before = on_disk(here)
    with lock.locked(Path("run")):
        assert main(["resume", "run"]) == 1
        line = complaint(capsys.readouterr().err)
        assert f"run: in use by process {os.getpid()}" in line and "wait for it" in line
    assert on_disk(here) == before


def test_two_runs_that_chose_the_same_folder(here, capsys, monkeypatch):
    """Both saw that the folder is free; the one that is later must not write into the other's run."""
    from bardlet import runner

    before, run_to_end = on_disk(here), runner.run_to_end

    def late(t, *args, **kwargs):
        t.run = Path("run")
        return run_to_end(t, *args, **kwargs)

    monkeypatch.setattr(runner, "run_to_end", late)
    assert main(shlex.split(GOOD)) == 1
    assert "run: already contains a run" in complaint(capsys.readouterr().err)
    assert on_disk(here) == before


FULL = "No space left on device"


@pytest.mark.parametrize("error", [OSError(28, FULL, "out/x"), SafetensorError(f"I/O error: {FULL} (os error 28)")],
                         ids=["system", "library"])
def test_no_space(here, capsys, monkeypatch, error):
    def full(*args: object, **kwargs: object) -> None:
        raise error

    before = on_disk(here)
    monkeypatch.setattr(hf, "save_file", full)
    assert main(shlex.split(GOOD)) == 1
    line = complaint(capsys.readouterr().err)
    assert "o space left on device" in line and "out/" in line and "free some space, or choose another --out" in line
    assert on_disk(here) == before


def run_cli(argv: str, here: Path, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "bardlet", *shlex.split(argv)], cwd=here, timeout=600,
                          capture_output=True, check=False, **options)  # type: ignore[call-overload]


def test_limit_on_file_size_while_saving(here):
    """The system refuses the bytes of the weights: the run folder goes, the rest stays."""
    before = on_disk(here)
    made = run_cli(GOOD, here,
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)))
    assert made.returncode == 1
    line = complaint(made.stderr.decode())
    assert "out/" in line and "too large" in line.lower()
    assert on_disk(here) == before


def without_rights() -> None:
    """The program that is started next obeys permissions although it is root's: CAP_DAC_* are out of its reach."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        if os.geteuid() == 0 and libc.prctl(24, capability, 0, 0, 0) != 0:  # PR_CAPBSET_DROP
            os._exit(77)


def test_what_may_not_be_read_or_written(here):
    """Without root's rights: an unreadable file, a folder that may not be listed, one that may not be written to."""
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
    before = on_disk(here)
    for name, mode in (("secret.txt", 0), ("closed", 0), ("run/config.json", 0), ("theirs", 0o555)):
        Path(name).chmod(mode)
    done = subprocess.run([sys.executable, "-c", script, json.dumps([shlex.split(argv) for argv, _ in cases])],
                          cwd=here, preexec_fn=without_rights, capture_output=True, text=True, timeout=600, check=False)
    for name in ("secret.txt", "closed", "run/config.json", "theirs"):
        Path(name).chmod(0o755)
    if done.returncode == 77:
        pytest.skip("root's rights cannot be given up here")
    answers = done.stderr.split("code 1\n")
    assert len(answers) == len(cases) + 1 and not answers[-1], done.stderr
    for answer, (_, fragments) in zip(answers, cases, strict=False):
        for fragment in fragments:
            assert fragment in complaint(answer)
    assert on_disk(here) == before


def test_chinese_text_and_names_where_the_locale_is_ascii(here, trained):
    poem = "床前明月光疑是地上霜舉頭望明月低頭思故鄉\n" * 60
    Path("靜夜思.txt").write_text(poem, encoding="utf-8")
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    made = run_cli(f"train 靜夜思.txt {TINY} --out 詩", here, env=ascii_only)
    assert made.returncode == 0, made.stderr.decode()
    assert "詩" in made.stdout.decode()
    made = run_cli("sample 詩 --prompt 明月 --tokens 20 --seed 1", here, env=ascii_only)
    assert made.returncode == 0, made.stderr.decode()
    assert made.stdout.decode().startswith("明月")


def test_a_reader_that_leaves_early(here):
    """`bardlet sample ... | head -c 10`: no noise, and no failure."""
    with subprocess.Popen([sys.executable, "-m", "bardlet", "sample", "run", "--tokens", "20000"], cwd=here,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as sample:
        assert sample.stdout and sample.stderr
        assert len(sample.stdout.read(10)) == 10
        sample.stdout.close()
        assert sample.stderr.read() == b""
        assert sample.wait(timeout=600) == 0


def test_plan_only_prints(here, capsys):
    before = on_disk(here)
    assert main(shlex.split(GOOD + " --plan")) == 0
    assert "plan: 2 steps of 16 tokens" in capsys.readouterr().out
    assert on_disk(here) == before


@pytest.mark.parametrize("argv", [GOOD, "resume run --steps 3 --allow-change", "eval run",
                                  "sample run --tokens 5", "data"])
def test_json_is_one_object_on_the_last_line(here, capsys, argv):
    assert main([*shlex.split(argv), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert isinstance(json.loads(lines[-1]), dict)
    assert not any(line.startswith("{") for line in lines[:-1])


def test_others_may_read_the_weights(here):
    """The weights have the permissions of the files beside them."""
    assert Path("run/model.safetensors").stat().st_mode == Path("run/config.json").stat().st_mode
