"""The decoder of GPT-2: one more token per row, from packed weights and a cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bardlet.inference.decoders.cache import CacheStep, Step
from bardlet.inference.decoders.pages import PagedStep
from bardlet.models.gpt2 import GPT2, Block
from bardlet.models.layers import KVCache
from bardlet.ops.linear import computing_dtype, elementwise, pack_linear


class Decoder:
    """Decode one token per row, in as few operations as torch allows; a test compares it with GPT2.forward.

    The residual stream is at least fp32, whatever the weights are.
    """

    step_class = PagedStep

    def __init__(self, model: GPT2, dtype: torch.dtype | None = None) -> None:
        gpt, c = model.transformer, model.config
        weight = gpt.wte.weight.detach()
        self.heads, self.eps, self.dtype = c.n_head, c.norm_eps, computing_dtype(weight, dtype)
        wide = torch.promote_types(self.dtype, torch.float32)
        dtype = dtype or weight.dtype
        # folds the 1 / sqrt(D) of the queries into the weights
        scale = torch.ones(3 * c.n_embd, dtype=wide, device=weight.device)
        scale[: c.n_embd] = c.head_dim**-0.5
        self.blocks = []
        for block in gpt.h:
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            qkv_bias = None if attn.c_attn.bias is None else attn.c_attn.bias * scale
            self.blocks.append(
                (
                    self.as_dtype(block.ln_1, wide),
                    pack_linear(attn.c_attn.weight * scale[:, None], qkv_bias, dtype),
                    pack_linear(attn.c_proj.weight, attn.c_proj.bias, dtype),
                    self.as_dtype(block.ln_2, wide),
                    pack_linear(mlp.c_fc.weight, mlp.c_fc.bias, dtype),
                    mlp.act,
                    pack_linear(mlp.c_proj.weight, mlp.c_proj.bias, dtype),
                )
            )
        self.wte, self.wpe, self.ln_f = weight.to(wide), gpt.wpe.weight.detach().to(wide), self.as_dtype(gpt.ln_f, wide)
        self.head = pack_linear(weight if model.lm_head is None else model.lm_head.weight, None, dtype)

    def __call__(self, idx_B: Tensor, cache: KVCache) -> Tensor:
        """Append one token (int64) to each row of the cache and return the logits of the next one: (B, V)."""
        return self.logits(self.hidden(idx_B, CacheStep(cache)))

    def hidden(self, idx_B: Tensor, step: Step) -> Tensor:
        """Read a token (int64) per row, at the positions of `step`, and return the hidden states: (B, C)."""
        B = len(idx_B)
        x_BC = torch.embedding(self.wte, idx_B) + self.wpe[step.position]
        for layer, (ln_1, c_attn, c_proj, ln_2, c_fc, act, c_out) in enumerate(self.blocks):
            qkv = c_attn(self.norm(ln_1, x_BC)).view(B, 3, self.heads, -1)  # (B, 3C) -> (B, 3, H, D)
            x_BC.add_(c_proj(step.attend(layer, *qkv.unbind(1))))
            x_BC.add_(c_out(elementwise(act, c_fc(self.norm(ln_2, x_BC)))))
        return x_BC

    def logits(self, x_BC: Tensor) -> Tensor:
        """Apply the last norm and the head: (B, V)."""
        return self.head(self.norm(self.ln_f, x_BC))

    @staticmethod
    def as_dtype(ln: nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of `ln` in `dtype`."""
        return ln.weight.detach().to(dtype), None if ln.bias is None else ln.bias.detach().to(dtype)

    def norm(self, ln: tuple[Tensor, Tensor | None], x_BC: Tensor) -> Tensor:
        """Apply LayerNorm, given as (weight, bias): (B, C)."""
        return torch.layer_norm(x_BC, x_BC.shape[-1:], *ln, self.eps).to(self.dtype)
