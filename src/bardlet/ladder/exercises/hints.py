"""Three hints for each exercise: a question, the idea, the line."""

HINTS: dict[str, tuple[str, str, str]] = {
    "bigram": (
        "Which tensor already holds the logits of every token, and how do you look up one row for each token?",
        "The embedding returns (B, T, V). cross_entropy wants the classes in dimension 1, so merge B and T first. To "
        "generate, sample from the softmax of the last position, and append.",
        "F.cross_entropy(logits.view(B * T, V), targets.view(B * T)); idx = torch.cat((idx, torch.multinomial(p, 1)), "
        "dim=1)"),
    "averaging": (
        "Which rows of x does the mean at position t include, and which weight does each of them have?",
        "Row t of a lower triangle of ones, divided by t + 1, is this mean. Softmax of zeros gives the same row, if "
        "the future has the score -inf.",
        "weight = torch.tril(torch.ones(T, T)); weight / weight.sum(1, keepdim=True) @ x; "
        "F.softmax(score.masked_fill(weight == 0, float('-inf')), dim=-1) @ x"),
    "one-head": (
        "Each position asks a question and offers a key. How do you compare all questions with all keys at once?",
        "The scores are queries times transposed keys, divided by the square root of the head size. Hide the future "
        "with -inf, then apply softmax over the last axis, then weigh the values.",
        "score = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5; score = score.masked_fill(self.tril[:T, :T] == 0, "
        "float('-inf')); return F.softmax(score, dim=-1) @ self.value(x), where B, T, C = x.shape"),
    "multi-head": (
        "How does PyTorch find the parameters of layers that are in a list?",
        "Keep the heads in an nn.ModuleList, each one made separately, and concatenate their outputs along the "
        "channels.",
        "self.heads = nn.ModuleList(Head(head_size) for _ in range(num_heads)); torch.cat([head(x) for head in "
        "self.heads], dim=-1)"),
    "feed-forward": (
        "Which layer of PyTorch maps the last dimension alone, and what keeps two of them from being one?",
        "A linear layer from n_embd to n_embd, then a ReLU: positions do not meet.",
        "self.net = nn.Sequential(nn.Linear(n_embd, n_embd), nn.ReLU()); return self.net(x)"),
    "residual": (
        "What should a block return if its parts contribute nothing?",
        "Each part's output is added to its input, and the second part reads the new x. Inside, the feed-forward layer "
        "has 4 * n_embd channels.",
        "self.net = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, n_embd)); "
        "x = x + self.sa(x); return x + self.ffwd(x)"),
    "layer-norm": (
        "Over which dimension are mean and variance taken, if no text may depend on another one of its batch?",
        "Over the channels, the last dimension. The variance is the plain mean of squares (unbiased=False), and eps is "
        "added to it before the root. A norm goes before each part, off the residual path.",
        "(x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + self.eps).sqrt() * self.weight + "
        "self.bias; x = x + self.sa(self.ln1(x)); return x + self.ffwd(self.ln2(x))"),
    "dropout": (
        "If a quarter of the values becomes 0, how do you keep the mean?",
        "Draw a random number for each value; keep the value if it is at least p; divide by 1 - p. "
        "self.training says if the model trains.",
        "if not self.training: return x; return x * (torch.rand_like(x) >= self.p) / (1 - self.p)"),
    "rotary": (
        "A pair (a, b) is a hand of a clock. What are its coordinates after a rotation by an angle?",
        "RMSNorm divides by the root of the mean square over the last dimension. To rotate, the left half of the "
        "result is a cos - b sin, the right half b cos + a sin.",
        "x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight; left, right = x.chunk(2, dim=-1); "
        "x * cos + torch.cat((-right, left), dim=-1) * sin"),
    "swiglu": (
        "ReLU lets a channel through or not. Which matrix decides that here, and which one is let through?",
        "silu of the gate's output, times the output of up, channel by channel; then down.",
        "self.down(F.silu(self.gate(x)) * self.up(x))"),
    "qk-norm": (
        "A norm must see the channels of one head alone. At which point of forward are they separate?",
        "Split into heads first, then normalize, then rotate; values are left as they are. The rest is attention as "
        "before, with a mask of the current T.",
        "q = rotate(self.query_norm(self.heads(self.query(x))), cos, sin), the same for k; then scale by D ** -0.5, "
        "mask, softmax, weigh, transpose(1, 2).reshape(B, T, C), proj"),
    "muon": (
        "What do matrix products alone do to the singular values of X in X X.T X?",
        "They cube them, and keep the rotations. First divide by the Frobenius norm, so that none is above 1; then "
        "apply the polynomial five times.",
        "x = gradient / gradient.norm(); then five times: a = x @ x.T; x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) "
        "@ x"),
    "average": (
        "The mean of n - 1 numbers and one more number: how far does the mean move?",
        "It moves by 1 / n of the distance to the new one. Change the tensors in place, by name.",
        "average[name].lerp_(weight, 1 / n)"),
    "heads": (
        "`@` multiplies the last two dimensions. In which dimension must the heads be to count as a batch?",
        "View the channels as (H, D), then move H in front of T. On the way back, transpose first, then reshape.",
        "layer(x).view(B, T, n_head, D).transpose(1, 2); out.transpose(1, 2).reshape(B, T, C)"),
    "addition": (
        "Which characters of 123+456=9750 can nobody predict?",
        "Format with leading zeros, and reverse the answer. Targets are the ids one place to the left; the first seven "
        "are the rest of the question, so they become -100. The target at `=` is the first digit of the answer.",
        'f"{a:03}+{b:03}=" + f"{a + b:04}"[::-1]; targets = ids[:, 1:].clone(); targets[:, :7] = -100'),
    "finetune": (
        "Which weights of a model for one text make sense for another text with other characters?",
        "All whose name and shape are the same. Copy the values in place, so that the model keeps its own parameters.",
        "if name in weights and weights[name].shape == weight.shape: weight.copy_(weights[name])"),
    "paper": (
        "The ReLU of rung 9 is one function call. What is one more?",
        "Square what the ReLU lets through, before the projection back.",
        "self.down(F.relu(self.up(x)).square())"),
}
