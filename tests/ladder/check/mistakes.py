"""Mistakes as changes of the right attempts: (file, mistake, the text to replace, its replacement, ...)."""

from __future__ import annotations

from pathlib import Path

RIGHT = Path(__file__).parent / "right"

MASK = '        wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))\n'
SOFT = "        wei = F.softmax(wei, dim=-1)\n"
HEADS = "part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)"
FUSED_CALL = "is_causal=True)"
LOOP = "    optimizer.zero_grad(set_to_none=True)\n"

CHANGES: list[tuple[str, ...]] = [
    ("lecture.py", "no-scale", " * k.shape[-1] ** -0.5", ""),
    ("lecture.py", "scale-n-embd", "k.shape[-1] ** -0.5", "C ** -0.5"),
    ("lecture.py", "wrong-scale", "k.shape[-1] ** -0.5", "k.shape[-1] ** -1"),
    ("lecture.py", "softmax-axis", "wei = F.softmax(wei, dim=-1)", "wei = F.softmax(wei, dim=1)"),
    ("lecture.py", "softmax-axis", "wei = F.softmax(wei, dim=-1)", "wei = F.softmax(wei, dim=0)"),
    ("lecture.py", "mask-side", "torch.tril(torch.ones(", "torch.triu(torch.ones("),
    ("lecture.py", "mask-missing", MASK, ""),
    ("lecture.py", "mask-missing", 'float("-inf"))\n        wei = F.softmax', "0.0)\n        wei = F.softmax"),
    ("lecture.py", "tril-length", "self.tril[:T, :T]", "self.tril"),
    ("lecture.py", "tril-length", "torch.ones(block_size, block_size)", "torch.ones(head_size, head_size)"),
    ("lecture.py", "mask-after-softmax", MASK + SOFT, SOFT + MASK.replace('float("-inf")', "0.0")),
    ("lecture.py", "mask-diagonal", "torch.tril(torch.ones(block_size, block_size))",
     "torch.tril(torch.ones(block_size, block_size), diagonal=1)"),
    ("lecture.py", "loss-axis", "logits.view(B * T, C), targets.view(B * T)", "logits, targets"),
    ("lecture.py", "loss-axis", "logits.view(B * T, C), targets.view(B * T)", "logits.view(B, C, T), targets"),
    ("lecture.py", "targets-not-shifted", "source[i + 1:i + block_size + 1]", "source[i:i + block_size]"),
    ("lecture.py", "targets-not-shifted", "targets.view(B * T))", "idx.view(B * T))"),
    ("lecture.py", "no-eval", "    model.eval()\n", "", "model.eval()\n", "", "    model.train()\n", ""),
    ("lecture.py", "no-eval", "wei = self.dropout(wei)", "wei = F.dropout(wei, dropout)"),
    ("lecture.py", "positions-after", "        x = tok_emb + pos_emb\n        x = self.blocks(x)\n",
     "        x = self.blocks(tok_emb) + pos_emb\n"),
    ("lecture.py", "no-positions", "x = tok_emb + pos_emb", "x = tok_emb"),
    ("lecture.py", "zero-grad", LOOP, ""),
    ("lecture.py", "zero-grad", LOOP + "    loss.backward()\n", "    loss.backward()\n" + LOOP),
    ("lecture.py", "no-residual", "x = x + self.sa(self.ln1(x))", "x = self.sa(self.ln1(x))"),
    ("lecture.py", "no-residual", "x = x + self.ffwd(self.ln2(x))", "x = self.ffwd(self.ln2(x))"),
    ("lecture.py", "post-norm", "x = x + self.sa(self.ln1(x))\n        x = x + self.ffwd(self.ln2(x))",
     "x = self.ln1(x + self.sa(x))\n        x = self.ln2(x + self.ffwd(x))"),
    ("lecture.py", "no-crop", "idx[:, -block_size:]", "idx"),
    ("lecture.py", "wrong-crop", "idx[:, -block_size:]", "idx[:, :block_size]"),
    ("lecture.py", "wrong-position", "logits[:, -1, :]", "logits[:, 0, :]"),
    ("lecture.py", "plain-list", "nn.ModuleList([Head(head_size) for _ in range(num_heads)])",
     "[Head(head_size) for _ in range(num_heads)]"),
    ("lecture.py", "shared-heads", "[Head(head_size) for _ in range(num_heads)]", "[Head(head_size)] * num_heads"),
    ("lecture.py", "softmax-before-loss", "F.cross_entropy(logits.view(B * T, C)",
     "F.cross_entropy(F.softmax(logits, dim=-1).view(B * T, C)"),
    ("lecture.py", "start-loss", "        logits = self.lm_head(x)\n", "        logits = 20 * self.lm_head(x)\n"),
    ("lecture.py", "dead-parameter", "        return wei @ self.value(x)\n",
     "        return wei @ self.value(x).detach()\n"),
    ("lecture.py", "linear-feed-forward", "            nn.ReLU(),\n", ""),
    ("lecture.py", "does-not-learn", "logits = self.lm_head(x)", "logits = 0.01 * self.lm_head(x)"),
    ("fused.py", "heads-view", HEADS, "part.reshape(B, self.n_head, T, C // self.n_head)"),
    ("fused.py", "heads-view", "y.transpose(1, 2).contiguous()", "y.contiguous()"),
    ("fused.py", "mask-missing", FUSED_CALL, "is_causal=False)"),
    ("fused.py", "no-scale", FUSED_CALL, "is_causal=True, scale=1.0)"),
    ("fused.py", "scale-n-embd", FUSED_CALL, "is_causal=True, scale=C ** -0.5)"),
    ("fused.py", "no-eval", "self.dropout if self.training else 0.0", "self.dropout"),
    ("fused.py", "no-crop", "idx if idx.size(1) <= self.config.block_size else idx[:, -self.config.block_size:]",
     "idx"),
    ("fused.py", "zero-grad", "        optimizer.zero_grad()\n", ""),
    ("fused.py", "no-residual", "return x + self.mlp(self.norm_2(x))", "return self.mlp(self.norm_2(x))"),
    ("fused.py", "plain-list", "nn.ModuleList([TransformerBlock(config) for _ in range(config.n_layer)])",
     "[TransformerBlock(config) for _ in range(config.n_layer)]"),
    ("fused.py", "loss-axis", "logits.view(-1, logits.size(-1)), targets.view(-1)",
     "logits.view(b, logits.size(-1), t), targets"),
    ("einsum.py", "no-scale", " / math.sqrt(d // self.heads)", ""),
    ("einsum.py", "scale-n-embd", "math.sqrt(d // self.heads)", "math.sqrt(d)"),
    ("einsum.py", "softmax-axis", "logits.softmax(dim=-1)", "logits.softmax(dim=-2)"),
    ("einsum.py", "softmax-axis", "logits.softmax(dim=-1)", "logits.softmax(dim=1)"),
    ("einsum.py", "mask-side", "torch.triu(torch.ones(ctx_len, ctx_len, dtype=torch.bool), diagonal=1)",
     "torch.tril(torch.ones(ctx_len, ctx_len, dtype=torch.bool), diagonal=-1)"),
    ("einsum.py", "mask-missing", "        logits = logits.masked_fill(self.future[:n, :n], -1e9)\n", ""),
    ("einsum.py", "tril-length", "self.future[:n, :n]", "self.future"),
    ("einsum.py", "no-positions", " + self.where[: tokens.shape[1]]", ""),
    ("einsum.py", "positions-after", "self.embed(tokens) + self.where[: tokens.shape[1]]", "self.embed(tokens)",
     "self.out(self.norm(h))", "self.out(self.norm(h + self.where[: tokens.shape[1]]))"),
    ("einsum.py", "post-norm", "h = self.att(self.norm_att(h)) + h", "h = self.norm_att(self.att(h) + h)",
     "return self.ff(self.norm_ff(h)) + h", "return self.norm_ff(self.ff(h) + h)"),
    ("einsum.py", "wrong-position", "[:, -1] / temperature", "[:, 0] / temperature"),
    ("einsum.py", "no-crop", "tokens[:, -model.ctx_len:]", "tokens"),
    ("einsum.py", "zero-grad", "    optimizer.zero_grad()\n", "", "def train_step(model, batch, optimizer):",
     "def train(model, loader, optimizer):\n  for batch in loader:"),
    ("parameters.py", "no-scale", "        q = q * self.d ** -0.5\n", ""),
    ("parameters.py", "scale-n-embd", "q * self.d ** -0.5", "q * C ** -0.5"),
    ("parameters.py", "softmax-axis", "+ mask, dim=-1)", "+ mask, dim=-2)"),
    ("parameters.py", "mask-missing", "q @ k.mT + mask", "q @ k.mT"),
    ("parameters.py", "mask-side", ".triu(1)", ".tril(-1)"),
    ("parameters.py", "heads-view", ".permute(0, 2, 1, 3).flatten(2)", ".reshape(B, T, C)"),
    ("parameters.py", "no-positions", " + self.pos[:, : x.size(1)]", ""),
    ("parameters.py", "softmax-before-loss", "self.loss_fn(logits.flatten(0, 1)",
     "self.loss_fn(logits.softmax(-1).flatten(0, 1)"),
    ("parameters.py", "wrong-position", "logits[:, -1].argmax", "logits[:, -2].argmax"),
    ("head_only.py", "no-scale", " / (self.q.weight.shape[0] ** 0.5)", ""),
    ("head_only.py", "scale-n-embd", "self.q.weight.shape[0] ** 0.5", "x.shape[2] ** 0.5"),
    ("head_only.py", "softmax-axis", "torch.softmax(scores, -1)", "torch.softmax(scores, 1)"),
    ("head_only.py", "mask-side", "torch.tril(", "torch.triu("),
    ("head_only.py", "mask-missing", '        scores = torch.where(self.tril[:T, :T].bool(), scores, float("-inf"))\n',
""),
    ("head_only.py", "tril-length", "self.tril[:T, :T]", "self.tril"),
    ("cross.py", "no-scale", " / q.size(-1) ** 0.5", ""),
    ("cross.py", "scale-n-embd", "q.size(-1) ** 0.5", "x.size(-1) ** 0.5"),
    ("cross.py", "softmax-axis", "** 0.5, dim=-1)", "** 0.5, dim=-2)"),
    ("cross.py", "ignores-source", "self.kv(memory)", "self.kv(x)"),
    ("rotary.py", "no-residual", "return x + self.f(self.nf(x))", "return self.f(self.nf(x))"),
    ("rotary.py", "shared-heads", "(Block(config) for _ in range(config.n_layers))",
     "([Block(config)] * config.n_layers)"),
    ("bigram.py", "targets-not-shifted", "data[i + 1:i + block_size + 1]", "data[i:i + block_size]"),
    ("bigram.py", "wrong-position", "logits[:, -1, :]", "logits[:, 0, :]"),
    ("bigram.py", "zero-grad", "    optimizer.zero_grad(set_to_none=True)\n", ""),
    ("concatenated.py", "tril-length", "torch.ones(block_size, block_size)", "torch.ones(n_embed, n_embed)"),
    ("concatenated.py", "loss-axis", "logits.permute(0, 2, 1)", "logits"),
    ("concatenated.py", "wrong-position", "logits[:, -1].softmax(-1)", "logits[0].softmax(-1)"),
    ("concatenated.py", "wrong-position", "logits[:, -1].softmax(-1)", "logits.softmax(-1)"),
    ("concatenated.py", "shared-heads", "nn.ModuleList(Head(hs) for _ in range(n))", "nn.ModuleList([Head(hs)] * n)"),
    ("concatenated.py", "no-crop", "idx[:, -block_size:]", "idx"),
    ("concatenated.py", "no-positions", " + self.pos(torch.arange(T))", ""),
    ("numbers.py", "no-scale", " / 8 ** .5", ""),
    ("numbers.py", "plain-list", "nn.ModuleList([SelfAttentionHead() for _ in range(4)])",
     "[SelfAttentionHead() for _ in range(4)]"),
    ("numbers.py", "softmax-before-loss", "logits.reshape(-1, 65)", "logits.softmax(-1).reshape(-1, 65)"),
    ("torch_attention.py", "no-positions", " + self.pos(torch.arange(ids.size(1)))", ""),
    ("torch_attention.py", "positions-after", " + self.pos(torch.arange(ids.size(1)))", "",
     "self.norm(self.blocks(x))", "self.norm(self.blocks(x) + self.pos(torch.arange(ids.size(1))))"),
    ("torch_attention.py", "mask-missing", "attn_mask=m, ", ""),
    ("torch_attention.py", "mask-side", "torch.triu(torch.ones(T, T, dtype=torch.bool), 1)",
     "torch.tril(torch.ones(T, T, dtype=torch.bool), -1)"),
    ("torch_attention.py", "no-residual", "x = x + y", "x = y"),
    ("torch_attention.py", "post-norm", "return x + self.mlp(self.ln2(x))", "return self.ln2(x + self.mlp(x))"),
    ("torch_attention.py", "loss-axis", "logits.view(-1, logits.size(-1)), targets.view(-1)",
     "logits.view(logits.size(0), logits.size(2), -1), targets"),
    ("torch_attention.py", "softmax-before-loss", "logits.view(-1, logits.size(-1))",
     "logits.softmax(-1).view(-1, logits.size(-1))"),
    ("torch_attention.py", "wrong-position", "[:, -1].argmax", "[:, 0].argmax"),
    ("functions.py", "no-scale", " / math.sqrt(d_k)", ""),
    ("functions.py", "mask-missing", "mask == 0", "mask == 2"),
    ("functions.py", "mask-side", "torch.tril(", "torch.triu("),
    ("functions.py", "heads-view", "x.transpose(1, 2).contiguous().view(n, T, -1)", "x.contiguous().view(n, T, -1)"),
    ("functions.py", "no-residual", "x = x + self.attn(y, y, y, mask)", "x = self.attn(y, y, y, mask)"),
    ("functions.py", "mask-after-softmax",
     "    if mask is not None:\n        scores = scores.masked_fill(mask == 0, -1e9)\n"
     "    p = F.softmax(scores, dim=-1)\n",
     "    p = F.softmax(scores, dim=-1)\n    if mask is not None:\n        p = p * mask\n"),
    ("encoder_decoder.py", "mask-missing",
     '            s = s.masked_fill(torch.ones(s.shape[-2:]).tril() == 0, float("-inf"))\n', "            pass\n"),
    ("encoder_decoder.py", "no-residual", "return x + self.ff(self.n3(x))", "return self.ff(self.n3(x))"),
    ("averaging.py", "softmax-axis", "F.softmax(wei, dim=-1)", "F.softmax(wei, dim=0)"),
    ("averaging.py", "mask-side", "torch.tril(torch.ones", "torch.triu(torch.ones"),
    ("alibi.py", "no-crop", "idx[:, -self.block_size:]", "idx"),
]


FAST = ("head_only.py", "cross.py", "bigram.py", "averaging.py", "numbers.py", "concatenated.py", "parameters.py")
"""Attempts that are tested in a fraction of a second."""


def one_of_each() -> list[tuple[str, ...]]:
    """Return one change for each mistake, of a fast attempt if there is one."""
    order = sorted(CHANGES, key=lambda change: FAST.index(change[0]) if change[0] in FAST else len(FAST))
    return list({change[1]: change for change in reversed(order)}.values())


def changed(file: str, *pairs: str) -> str:
    """Return a right attempt with texts replaced; each must be there."""
    text = (RIGHT / file).read_text(encoding="utf-8")
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old in text, (file, old)
        text = text.replace(old, new, 1)
    return text
