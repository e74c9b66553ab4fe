"""The small models that come with the course, so that its pages are alive before the reader has trained any.

    bardlet ladder --rungs 1-7 --out runs/live          # Tiny Shakespeare; a few minutes
    python docs/live_models.py runs/live                # -> docs/models/

A rung is a safetensors file: matrices as int8 with a scale for each row, vectors as float32. `rungs.json` has the shape
of each model, its origin, its loss, and its loss with the stored weights, both over every validation character.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bardlet import models
from bardlet import tokenizer as tokenization
from bardlet.config.model import ModelConfig
from bardlet.errors import BardletError
from bardlet.export import html
from bardlet.ladder.rungs import LADDER, Rung
from bardlet.run import hf
from bardlet.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "models"
SCALE = ".scale"


def run_of(ladder: Path, rung: Rung) -> Path | None:
    """Return the run of a rung's first finished seed in a ladder; None if it has none."""
    finished = sorted(ladder.glob(f"{rung.number:02}-{rung.name}/seed-*/outcome.json"))
    return finished[0].parent if finished else None


def outcome(run: Path) -> dict[str, Any]:
    """Return the loss, the seed and the date of a run of a ladder."""
    values = json.loads((run / "outcome.json").read_text(encoding="utf-8"))
    return {"val_loss": values["val_loss"], "seed": values["seed"], "date": values.get("made", {}).get("date", "")}


def stored(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a model as they are stored."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.ndim == 2:
            tensors[name + SCALE], tensors[name] = html.quantize(tensor)
        else:
            tensors[name] = tensor
    return tensors


def restored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return stored tensors in float32."""
    return {name: tensor.float() * tensors[name + SCALE][:, None] if name + SCALE in tensors else tensor
            for name, tensor in tensors.items() if not name.endswith(SCALE)}


def facts(folder: Path = FOLDER) -> dict[str, Any]:
    """Return the contents of rungs.json."""
    return dict(json.loads((folder / "rungs.json").read_text(encoding="utf-8")))


def read(rung: Rung, folder: Path = FOLDER) -> tuple[Any, Tokenizer]:
    """Return the model of a rung, with its stored weights, and its tokenizer."""
    known = facts(folder)
    model = models.build(ModelConfig(**known["rungs"][rung.name]["shape"]))
    model.load_state_dict(restored(hf.read_tensors(folder / f"{rung.number:02}-{rung.name}.safetensors")))
    return model.eval(), tokenization.train_char(known["characters"], False)


def write(ladder: Path, folder: Path = FOLDER) -> None:
    """Write rungs 1 to 7 of a ladder on Tiny Shakespeare."""
    from answers import Text, validate

    text, rungs = Text(), {}
    folder.mkdir(exist_ok=True)
    for rung in (rung for rung in LADDER if not rung.scaled):
        run = run_of(ladder, rung)
        if run is None:
            raise BardletError(f"{ladder}: rung {rung.number} is not finished; run bardlet ladder --rungs 1-7 "
                               f"--out {ladder}")
        model, tokenizer = hf.read_folder(run)
        if [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)] != text.chars:
            raise BardletError(f"{ladder}: not trained on the characters of Tiny Shakespeare; choose another ladder")
        tensors = stored(model.state_dict())
        model.load_state_dict(restored(tensors))
        hf.write_tensors(folder / f"{rung.number:02}-{rung.name}.safetensors", tensors)
        rungs[rung.name] = {**outcome(run), "val_loss_stored": validate(model, text), "shape": asdict(model.config)}
        print(f"{rung.name:14} {rungs[rung.name]['val_loss']:.4f}, stored {rungs[rung.name]['val_loss_stored']:.4f}")
    (folder / "rungs.json").write_text(json.dumps(
        {"made_by": "docs/live_models.py, from bardlet ladder on Tiny Shakespeare", "characters": "".join(text.chars),
         "rungs": rungs}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Write the models of a ladder to docs/models/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ladder", type=Path, help="folder of a ladder")
    with torch.inference_mode():
        write(parser.parse_args().ladder)


if __name__ == "__main__":
    main()
