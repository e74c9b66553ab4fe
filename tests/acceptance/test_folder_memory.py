"""Memory for reading a folder: its weights once, and little more. The peak is that of a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bardlet.config.model import ModelConfig
from bardlet.models.llama import Llama
from bardlet.run import hf
from bardlet.tokenizer import train_char

CHILD = """
import json, re, sys
from pathlib import Path
from bardlet.models import llama
from bardlet.run import hf

def memory(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

idle = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
model, _ = hf.read_folder(Path(sys.argv[1]), dtype=None)
print(json.dumps({"grown": memory("VmHWM") - idle, "kinds": sorted({str(p.dtype) for p in model.parameters()}),
                  "weights": sum(p.nbytes for p in model.parameters())}))
"""
MOST = 1.2
"""Peak beyond the idle process, as a share of the weights."""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc of Linux")
@pytest.mark.parametrize(("dtype", "layers"), [(torch.float32, 12), (torch.bfloat16, 24)])
def test_reading_a_folder_of_200_mb(dtype: torch.dtype, layers: int, tmp_path: Path) -> None:
    config = ModelConfig("llama", 1000, 256, layers, n_head=8, n_kv_head=8, n_embd=512, head_dim=64, n_inner=2048,
                         activation="silu", tie_embeddings=False)  # fmt: skip
    shapes = {name: tensor.shape for name, tensor in hf.empty_model(config, dtype).state_dict().items()}
    save_file({name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(Llama.to_hf(config)), encoding="utf-8")
    train_char("abc", True).save(tmp_path)
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    share = result["grown"] / result["weights"]
    print(f"{dtype}: {result['grown'] / 1e6:.0f} MB for {result['weights'] / 1e6:.0f} MB of weights: {share:.2f}")
    assert result["kinds"] == [str(dtype)] and 190e6 < result["weights"] < 220e6
    assert 0.95 < share <= MOST, "less would mean that the peak was missed"
