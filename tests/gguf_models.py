"""Read a model from a GGUF file by transformers, whose `from_pretrained` would ask for accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_back(path: Path, **changes: Any) -> Any:
    """Return the model of a file in fp32, in eval mode. changes: other entries of its config."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.for_model(**load_gguf_checkpoint(path)["config"] | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    model.tie_weights()
    return model
