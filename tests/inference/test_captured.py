"""Steps with static tensors, which a GPU captures as CUDA graphs: against the other ways to generate.

On a CPU they run without the capture. Tests marked `gpu` compare captured steps with the same steps run eagerly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bardlet.config.model import ModelConfig
from bardlet.errors import BardletError
from bardlet.inference import decoders
from bardlet.inference.decoders import captured, native
from bardlet.inference.decoders.cache import CacheStep, StaticStep
from bardlet.inference.decoders.captured import TokenSteps, complete
from bardlet.inference.drawing import Draws, Sampling
from bardlet.inference.generate import generate, generate_each, stream
from bardlet.inference.sampling import draw, draw_on_device
from bardlet.models import build

V = 19
CONFIGS = [
    ModelConfig("gpt2", vocab_size=V, block_size=16, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, head_dim=8,
                n_inner=32),
    ModelConfig("qwen3", vocab_size=V, block_size=16, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=8,
                n_inner=24, activation="silu", norm_eps=1e-6),
]  # fmt: skip
SAMPLINGS = [Sampling(temperature=0.0), Sampling(temperature=1.3), Sampling(temperature=0.9, top_k=7),
             Sampling(temperature=1.1, top_p=0.8), Sampling(temperature=1.2, top_k=9, top_p=0.9)]
PENALTIES = Sampling(temperature=1.0, presence_penalty=0.7, frequency_penalty=0.4, logit_bias={3: 2.0, 5: -8.0})


def short(sampling: Sampling) -> str:
    """Return a name of settings: those that are not the defaults."""
    return " ".join(f"{name}={value}" for name, value in vars(sampling).items() if value != getattr(Sampling(), name))


def built(config: ModelConfig) -> Any:
    """Return a model whose logits differ enough."""
    torch.manual_seed(0)
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.fixture(params=CONFIGS, ids=lambda config: config.model)
def model(request: pytest.FixtureRequest) -> Any:
    return built(request.param)


def prompts_of(rows: int, longest: int = 23) -> list[list[int]]:
    """Return prompts of different lengths, some longer than the window of CONFIGS."""
    return [[(row + 3 * i) % V for i in range(1 + 7 * row % longest)] for row in range(rows)]


def steps_of(model: Any, sampling: Sampling, rows: int, longest: int, capture: bool | None = None) -> TokenSteps:
    with torch.inference_mode():
        return TokenSteps(model, decoders.decoder(model), sampling, rows, longest, capture)


def completions(steps: TokenSteps, prompts: Sequence[Sequence[int]], limits: Sequence[int],
                stop_ids: Sequence[int] = ()) -> list[list[int]]:
    """Return the new tokens of each prompt, whose seed is its number."""
    ids: list[list[int]] = [[] for _ in prompts]

    def keep(number: int, token: int) -> bool:
        ids[number].append(token)
        return token not in stop_ids and len(ids[number]) < limits[number]

    given = [(i, prompt, Draws(steps.sampling, i)) for i, prompt in enumerate(prompts)]
    yielded: list[list[int]] = [[] for _ in prompts]
    for new in complete(steps, given, keep):
        for number, tokens in new.items():
            yielded[number] += tokens
    assert yielded == ids
    return ids


# ---------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=short)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_tokens_are_those_of_generate(model: Any, rows: int, sampling: Sampling) -> None:
    """From the same seeds, for prompts of different lengths, and past the end of the window."""
    prompts, limits = prompts_of(rows), [40] * rows
    got = completions(steps_of(model, sampling, rows, 63), prompts, limits)
    assert got == generate_each(model, prompts, limits, sampling, seeds=range(rows), rows=rows)


def test_biases_and_penalties_are_those_of_generate(model: Any) -> None:
    """Of a row's own tokens: the next prompt in the row starts without penalties."""
    prompts, limits = prompts_of(9), [30] * 9
    want = generate_each(model, prompts, limits, PENALTIES, seeds=range(9), rows=9)
    assert completions(steps_of(model, PENALTIES, 9, 60), prompts, limits) == want
    assert completions(steps_of(model, PENALTIES, 2, 60), prompts, limits) == want
    plain = generate_each(model, prompts, limits, Sampling(temperature=1.0), seeds=range(9), rows=9)
    assert all(a != b for a, b in zip(want, plain, strict=True))


@pytest.mark.parametrize("window", [1, 2, 5, 16, 100])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model)
def test_prompts_join_as_soon_as_a_row_is_free(config: ModelConfig, window: int) -> None:
    """Completions end at a stop id or at limits of their own; the same steps complete a second batch."""
    model = built(replace(config, block_size=window))
    prompts, limits, sampling = prompts_of(21), [1 + 5 * i % 37 for i in range(21)], Sampling(temperature=1.5, top_k=9)
    steps = steps_of(model, sampling, 4, 60)
    for batch in (slice(0, 21), slice(5, 16)):
        got = completions(steps, prompts[batch], limits[batch], stop_ids=[2, 3])
        want = generate_each(model, prompts[batch], limits[batch], sampling, seeds=range(21)[: len(got)], rows=4,
                             stop_ids=[2, 3])
        assert got == want
    assert completions(steps, [], []) == []


def test_steps_read_more_positions_as_rows_grow(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And fewer for the next batch. Neither changes a token."""
    monkeypatch.setattr(captured, "SHORTEST", 8)
    model = built(replace(model.config, block_size=100))
    sampling, reached = Sampling(temperature=1.1), []
    steps = steps_of(model, sampling, 3, 100)
    monkeypatch.setattr(steps, "_step", lambda reach, step=steps._step: (reached.append(reach), step(reach)))
    for prompts, limits in ((prompts_of(3), [90, 60, 70]), (prompts_of(2), [10, 3])):
        want = generate_each(model, prompts, limits, sampling, seeds=[0, 1, 2], rows=3)
        assert completions(steps, prompts, limits) == want
    assert list(dict.fromkeys(reached)) == [32, 64, 128] and reached[-1] == 32


@pytest.mark.parametrize("stop_ids", [(), (4, 9)])
def test_generate_and_stream_use_the_steps_on_a_gpu(model: Any, stop_ids: tuple[int, ...],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """`stream` yields None for a row that has ended, and stops with the last row."""
    options: dict[str, Any] = {"temperature": 1.2, "top_k": 12, "seed": 5, "stop_ids": stop_ids}
    each, whole = list(stream(model, prompts_of(7), 40, **options)), generate(model, prompts_of(7), 40, **options)
    assert not captured.is_for(model), "this model is on a CPU"
    monkeypatch.setattr(captured, "is_for", lambda model: True)
    monkeypatch.setattr(native, "decoder", lambda model, dtype: None)
    used, run = [], TokenSteps.run
    monkeypatch.setattr(TokenSteps, "run", lambda self, rows: (used.append(len(rows)), run(self, rows))[1])
    assert list(stream(model, prompts_of(7), 40, **options)) == each and used
    used.clear()
    assert generate(model, prompts_of(7), 40, **options) == whole and used


def test_nan_weights_raise(model: Any) -> None:
    with torch.no_grad():
        list(model.parameters())[-1].fill_(float("nan"))
    with pytest.raises(BardletError, match="not finite"):
        completions(steps_of(model, SAMPLINGS[0], 3, 40), prompts_of(3), [5] * 3)


# ---------------------------------------------------------------------------- the step


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
def test_a_static_step_matches_the_plain_step(model: Any, dtype: torch.dtype | None) -> None:
    """Prompts that are read at once, padded, in rows 2 and 0, then one more token: the logits of token by token."""
    prompts, tolerance = {2: [1, 2, 3, 4, 5, 6], 0: [7, 8, 9], 1: []}, 1e-5 if dtype is None else 0.05
    with torch.inference_mode():
        decoder = decoders.decoder(model, dtype)
        cache = model.new_cache(3, 16, torch.float32)
        idx, row_B = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]]), torch.tensor([2, 0])
        decoder.hidden(idx.flatten(), StaticStep(cache, torch.arange(6).expand(2, -1), model.config.n_head, 8, row_B))
        position = torch.tensor([3, 0, 6])
        step = StaticStep(cache, position[:, None], model.config.n_head, 8)
        got = decoder.logits(decoder.hidden(torch.tensor([11, 12, 13]), step))
        for row, prompt in prompts.items():
            alone = model.new_cache(1, 16, torch.float32)
            for token in [*prompt, 11 + row]:
                want = decoder.logits(decoder.hidden(torch.tensor([token]), CacheStep(alone)))
            torch.testing.assert_close(got[row].float(), want[0].float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=short)
@pytest.mark.parametrize("vocabulary", [19, 3000])
def test_draws_on_the_device_are_those_on_the_cpu(vocabulary: int, sampling: Sampling) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(200, vocabulary, generator=generator)
    u = torch.rand(200, 1, generator=generator)
    settings = (sampling.temperature, sampling.top_k, sampling.top_p)
    assert torch.equal(draw_on_device(logits, *settings, u), draw(logits, *settings, u))
    assert len(draw(logits, *settings, u).unique()) > 10
    edge = torch.tensor([[0.0], [1 - 2**-24]])  # the ends of a uniform number
    assert torch.equal(draw_on_device(logits[:2], *settings, edge), draw(logits[:2], *settings, edge))


class OnDevice(TorchDispatchMode):
    """Fails if an operation reads or writes a tensor of the host."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.is_meta for tensor in tensors), func
        self.operations += 1
        return result


@pytest.mark.parametrize("sampling", [*SAMPLINGS, PENALTIES], ids=short)
def test_a_step_stays_on_the_device(model: Any, sampling: Sampling) -> None:
    """Nothing is copied to or from the host, and no value is read: so a CUDA graph can contain the step.

    The meta device stands in for a GPU: its tensors have no values, and reading one is an error.
    """
    with torch.device("meta"):
        steps = steps_of(build(model.config).eval(), sampling, 3, 16, capture=False)
    with torch.inference_mode(), OnDevice() as mode:
        steps._step(16)
    assert mode.operations > 50
    with pytest.raises(AssertionError, match="lift_fresh"), torch.inference_mode(), OnDevice():
        steps.token_B.copy_(torch.tensor([1, 2, 3]))


# ---------------------------------------------------------------------------- the capture


@pytest.mark.parametrize("sampling", [SAMPLINGS[1], PENALTIES], ids=short)
def test_a_warm_up_changes_no_token(model: Any, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs the step at the place of the next one, also at the last position of the window."""
    warmed, run = [], TokenSteps.run

    def captured_without_gpu(self: TokenSteps, step: Callable[[], None]) -> Callable[[], None]:
        self._warm_up(lambda: (warmed.append(1), step()))
        return step

    monkeypatch.setattr(TokenSteps, "_captured", captured_without_gpu)
    monkeypatch.setattr(TokenSteps, "run", lambda self, rows: (self._graphs.clear(), run(self, rows))[1])  # each time
    got = completions(steps_of(model, sampling, 2, 63, capture=True), prompts_of(5), [40] * 5)
    assert got == generate_each(model, prompts_of(5), [40] * 5, sampling, seeds=range(5), rows=5)
    assert len(warmed) > 10 * captured.WARM_UP


class Recording(TorchDispatchMode):
    """A stand-in for a CUDA graph: it records operations, undoes them, and replays them on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.overwritten: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.overwritten.append((value, value.clone()))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for tensor, value in reversed(self.overwritten):
            tensor.copy_(value)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self.calls:
            for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(result), strict=True):
                if isinstance(old, torch.Tensor) and new.untyped_storage()._cdata != old.untyped_storage()._cdata:
                    old.copy_(new)


@pytest.mark.parametrize("sampling", [*SAMPLINGS, PENALTIES], ids=short)
def test_a_replay_draws_what_the_step_would(model: Any, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that changes from step to step is frozen in a graph: for two batches, and for rows that grow and restart.

    `torch.cuda` is replaced by stand-ins, so this runs the capture's own code.
    """
    graphs: list[Recording] = []
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})

    def graph(recording: Recording, *, pool: Any, stream: Any, capture_error_mode: str) -> Recording:
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        graphs.append(recording)
        return recording

    stand_ins = {"graph": graph, "CUDAGraph": Recording, "graph_pool_handle": lambda: "pool",
                 "current_stream": lambda device: stream(), "stream": nullcontext, "device": nullcontext}
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(captured, "_streams", lambda device: (stream(), stream()))
    monkeypatch.setattr(captured, "SHORTEST", 8)
    model = built(replace(model.config, block_size=40))
    steps = steps_of(model, sampling, 3, 90, capture=True)
    for prompts, limits in ((prompts_of(5), [60, 30, 70, 9, 8]), (prompts_of(2), [10, 3])):
        want = generate_each(model, prompts, limits, sampling, seeds=range(5)[: len(prompts)], rows=3)
        assert completions(steps, prompts, limits) == want
    assert steps.capture and len(graphs) == 2 and all(graph.replays > 16 for graph in graphs)


def test_a_failed_capture_is_reported_and_steps_go_on(model: Any, monkeypatch: pytest.MonkeyPatch,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    def fail(self: TokenSteps, step: Callable[[], None]) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(TokenSteps, "_captured", fail)
    with caplog.at_level(logging.WARNING, "bardlet"):
        got = completions(steps_of(model, SAMPLINGS[1], 3, 63, capture=True), prompts_of(3), [40] * 3)
    assert got == generate_each(model, prompts_of(3), [40] * 3, SAMPLINGS[1], seeds=range(3), rows=3)
    assert caplog.messages == ["no CUDA graph of a step: operation not permitted when stream is capturing; "
                               "continuing without, which is slower"]


# ---------------------------------------------------------------------------- on a GPU


def on_gpu(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Any:
    """Return a wider model with a window of 1,024 on the GPU: fused attention needs heads of a multiple of 8."""
    torch.set_deterministic_debug_mode("default")  # a run on a CPU, in a test before this one, leaves it at "error"
    wider = replace(config, block_size=1024, n_embd=64, head_dim=64 // config.n_head)
    return built(wider).to("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [*SAMPLINGS, PENALTIES], ids=short)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model)
def test_graphs_draw_the_tokens_of_eager_steps(config: ModelConfig, rows: int, dtype: torch.dtype,
                                               sampling: Sampling) -> None:
    """Two batches with the same graphs, the first one long enough for a second graph, which reads more positions."""
    model = on_gpu(config, dtype)
    batches = [(prompts_of(rows, 240), [70] * rows), (prompts_of(rows), [40] * rows)]
    batches[0][0][0] = [1] * 230
    tokens = []
    for capture in (True, False):
        steps = steps_of(model, sampling, rows, 310, capture)
        tokens.append([completions(steps, *batch) for batch in batches])
        assert steps.capture == capture, "the capture failed"
        assert sorted(steps._graphs) == ([256, 320] if capture else [])
    assert tokens[0] == tokens[1]


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model)
def test_a_graph_survives_the_end_of_the_window(config: ModelConfig) -> None:
    model = on_gpu(replace(config))
    eager, graphs = (steps_of(model, SAMPLINGS[2], 3, 2000, capture) for capture in (False, True))
    prompts, limits = [[1] * 900, [2] * 1020, [3] * 1500], [400] * 3
    assert completions(eager, prompts, limits) == completions(graphs, prompts, limits)
    assert graphs.capture, "the capture failed"


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLINGS[:3], ids=short)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model)
def test_a_gpu_draws_the_tokens_of_a_cpu(config: ModelConfig, sampling: Sampling) -> None:
    """In fp32, from the same seeds, for a few tokens: rounding differs, but by far less than the logits."""
    model, prompts = on_gpu(config), prompts_of(5)
    options: dict[str, Any] = {"temperature": sampling.temperature, "top_k": sampling.top_k, "seed": 3}
    assert captured.is_for(model)
    assert generate(model, prompts, 24, **options) == generate(model.cpu(), prompts, 24, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [*SAMPLINGS, PENALTIES], ids=short)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model)
def test_an_eager_step_never_waits_for_the_gpu(config: ModelConfig, sampling: Sampling) -> None:
    steps = steps_of(on_gpu(config), sampling, 3, 64, capture=False)
    with torch.inference_mode():
        steps._step(64)
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps._step(64)
        finally:
            torch.cuda.set_sync_debug_mode("default")
