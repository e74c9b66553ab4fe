"""Continuous batching: the same tokens and log-probabilities beside any neighbors, and a bounded queue."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bardlet.config.model import ModelConfig
from bardlet.errors import BardletError
from bardlet.inference import readers
from bardlet.inference.decoders.pages import PAGE
from bardlet.inference.decoders.prefix import PrefixTree, common
from bardlet.inference.drawing import with_logprobs
from bardlet.inference.engine import Busy, Engine, EngineModel, Reason, Request, Sampling, Token
from bardlet.inference.generate import generate
from bardlet.models import build
from bardlet.ops.linear import has_fast_embedding_bag
from bardlet.runtime import native

V, WINDOW = 67, 160
SHAPE: dict[str, Any] = {"vocab_size": V, "block_size": WINDOW, "n_layer": 2, "n_head": 4, "n_embd": 64, "head_dim": 16,
                         "n_inner": 192}
CONFIGS = {
    "gpt2": ModelConfig("gpt2", n_kv_head=4, **SHAPE),
    "qwen3": ModelConfig("qwen3", n_kv_head=2, activation="silu", norm_eps=1e-6, **SHAPE),
    "odd": ModelConfig("gpt2", n_kv_head=3, **{**SHAPE, "n_head": 3, "n_embd": 30, "head_dim": 10, "n_inner": 50}),
    "bigram": ModelConfig("bigram", vocab_size=V, block_size=16),
}
x86 = pytest.mark.skipif(not has_fast_embedding_bag(torch.device("cpu"), torch.float32), reason="needs x86")


class Recorder:
    """A listener that keeps everything, and ends its sequence after `stop_after` tokens."""

    def __init__(self, stop_after: int | None = None, on_token: Callable[[Recorder], object] | None = None) -> None:
        self.tokens: list[Token] = []
        self.prompt_tokens: list[Token] = []
        self.reason: Reason | None = None
        self.error: BardletError | None = None
        self.ended, self.stop_after, self.on_token = threading.Event(), stop_after, on_token

    def prompt(self, tokens: Sequence[Token]) -> None:
        self.prompt_tokens = list(tokens)

    def token(self, token: Token) -> bool:
        self.tokens.append(token)
        if self.on_token:
            self.on_token(self)
        return len(self.tokens) == self.stop_after

    def end(self, reason: Reason, error: BardletError | None) -> None:
        self.reason, self.error = reason, error
        self.ended.set()

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def wait(self) -> Recorder:
        assert self.ended.wait(120), "the sequence never ended"
        return self


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(max_waiting=500, max_rows=8)
    yield engine
    engine.close()


def random_model(name: str) -> Any:
    torch.manual_seed(1)
    model = build(CONFIGS[name]).eval()
    for parameter in model.parameters():  # far from uniform, so that other bits become other tokens
        parameter.data.mul_(4) if parameter.dim() > 1 else None
    return model


def request(prompt: Sequence[int], max_tokens: int = 20, seed: int = 0, **options: Any) -> Request:
    names = {"stop_ids", "prompt_logprobs", "deadline"} & options.keys()
    return Request(prompt=prompt, max_tokens=max_tokens, seed=seed, **{name: options.pop(name) for name in names},
                   sampling=Sampling(**{"top_logprobs": 3, **options}))


def run(engine: Engine, model: EngineModel, *requests: Request) -> list[Recorder]:
    recorders = [Recorder() for _ in requests]
    engine.submit(model, list(zip(requests, recorders, strict=True)))
    return [recorder.wait() for recorder in recorders]


def mixed(number: int, seed: int) -> list[Request]:
    """Requests of all kinds: short and long prompts, shared beginnings, past the window, greedy and sampled."""
    chance = random.Random(seed)
    system = [chance.randrange(V) for _ in range(70)]
    requests = []
    for i in range(number):
        own = [chance.randrange(V) for _ in range(chance.choice([1, 3, 20, 66, 150, 200]))]
        prompt = system[: chance.choice([0, 30, 70])] + own
        options = chance.choice([{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}, {"presence_penalty": 1.0},
                                 {"temperature": 0.7, "top_k": 20, "top_p": 0.8}, {"logit_bias": {3: 2.0}}])
        requests.append(request(prompt, chance.choice([5, 40, 90]), seed=i, **options))
    return requests


@x86
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "odd", "qwen3 by torch", "odd by torch"])
def test_neighbors_do_not_change_a_sequence(engine: Engine, name: str, dtype: torch.dtype | None,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, in the log-probabilities."""
    name, _, by_torch = name.partition(" ")
    if by_torch:
        monkeypatch.setattr(native, "library", lambda *args: None)
    module = random_model(name).to(dtype if dtype == torch.bfloat16 else torch.float32)
    kind = torch.int8 if dtype == torch.int8 else None
    requests = mixed(14, seed=5)
    alone = []
    for each in requests:  # a model of its own: nothing is shared
        model = engine.add(module, kind, 1)
        alone.append(run(engine, model, each)[0])
        engine.remove(model)
    model = engine.add(module, kind, 2**24)
    together = run(engine, model, *requests)
    chance = random.Random(0)
    for want, got, each in zip(alone, together, requests, strict=True):
        assert got.tokens == want.tokens, each
        assert len(got.tokens) == each.max_tokens
    for want, each in chance.sample(list(zip(alone, requests, strict=True)), 6):  # again, with what was kept
        assert run(engine, model, each)[0].tokens == want.tokens
    for want, each in chance.sample(list(zip(alone, requests, strict=True)), 6):
        s = each.sampling
        if not (s.presence_penalty or s.logit_bias):
            assert want.ids == generate(module, [each.prompt], each.max_tokens, temperature=s.temperature,
                                        top_k=s.top_k, top_p=s.top_p, seed=[each.seed], dtype=kind)[0]


def test_neighbors_that_ask_for_more_log_probabilities_do_not_change_ties() -> None:
    """In bf16, many logits of a row are equal: which of them are among the likeliest is up to topk."""
    logits_BV = torch.randn(30, 40, generator=torch.Generator().manual_seed(0)).round().bfloat16()
    options = [Sampling(top_logprobs=(None, 0, 3, 20, 99)[row % 5]) for row in range(30)]
    together = with_logprobs([1] * 30, logits_BV, options)
    for row, each in enumerate(options):
        assert with_logprobs([1], logits_BV[row : row + 1], [each]) == [together[row]]
        assert len(together[row].top) == min(each.top_logprobs or 0, 40)


def test_a_model_without_a_cache(engine: Engine) -> None:
    module = random_model("bigram")
    model = engine.add(module, None, 0)
    requests = [request([1, 2, 3], 30, seed=i) for i in range(12)]
    together = run(engine, model, *requests)
    for each, got in zip(requests, together, strict=True):
        assert got.ids == generate(module, [each.prompt], 30, seed=[each.seed])[0]
    with pytest.raises(BardletError, match="int8"):
        engine.add(module, torch.int8, 0)


@pytest.mark.parametrize("bags", [True, False])
def test_pages_compute_what_the_model_computes(bags: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities of a prompt and of what follows, against `forward`; also where `embedding_bag` is slow."""
    monkeypatch.setattr(native, "library", lambda *args: None)
    if not bags:
        monkeypatch.setattr("bardlet.inference.decoders.pages.has_fast_embedding_bag", lambda device, dtype: False)
    engine = Engine()
    for name in ("gpt2", "qwen3", "odd"):
        module = random_model(name)
        model = engine.add(module, None, 2**22)
        prompt = [i * 7 % V for i in range(100)]
        [got] = run(engine, model, request(prompt, 40, prompt_logprobs=True, temperature=0.0))
        ids = [*prompt, *got.ids]
        with torch.no_grad():
            logp = module(torch.tensor([ids]))[0].log_softmax(-1)
        want = [float(logp[i, token]) for i, token in enumerate(ids[1:])]
        tokens = [*got.prompt_tokens, *got.tokens]
        assert [token.id for token in tokens] == ids
        assert tokens[0].logprob is None
        assert [token.logprob for token in tokens[1:]] == pytest.approx(want, abs=2e-4)
        best = logp[len(prompt) - 1].topk(3)
        assert [i for i, _ in got.tokens[0].top] == best.indices.tolist()
        assert [p for _, p in got.tokens[0].top] == pytest.approx(best.values.tolist(), abs=2e-4)
    engine.close()


def test_only_the_prompt_is_scored(engine: Engine) -> None:
    model = engine.add(random_model("qwen3"), None, 2**22)
    [got] = run(engine, model, request([1, 2, 3], 0, prompt_logprobs=True))
    assert (got.reason, got.ids, len(got.prompt_tokens)) == ("length", [], 3)
    with pytest.raises(BardletError, match="0 tokens"):
        engine.submit(model, [(request([1], 0), Recorder())])


def test_shared_beginnings_are_read_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole pages are shared, and a part of a page is copied; also of a sequence that is still running."""
    module = random_model("qwen3")
    model = engine.add(module, None, 2**24)
    read = []
    decode = model.reader.decoder.hidden  # type: ignore[union-attr]
    monkeypatch.setattr(model.reader.decoder, "hidden", lambda ids, step: read.append(len(ids)) or decode(ids, step))  # type: ignore[union-attr]
    beginning = list(range(60)) + list(range(40))
    run(engine, model, request([*beginning, 1], 1))
    assert sum(read) == 101
    read.clear()
    run(engine, model, request([*beginning, 2, 3], 1))
    assert sum(read) == 2
    read.clear()
    run(engine, model, *(request([5, 4, *range(50)], 1, seed=i) for i in range(8)))  # submitted together
    assert sum(read) == 52 + 7


@pytest.mark.parametrize("scored", [False, True])
def test_cached_tokens_are_those_of_the_prompt(engine: Engine, scored: bool) -> None:
    """Also after the window was full, and the sequence started again with its own last tokens."""
    model, recorders = engine.add(random_model("qwen3"), None, 2**24), [Recorder(), Recorder()]
    prompt = list(range(60)) + list(range(40))
    [first] = engine.submit(model, [(request(prompt, 200, prompt_logprobs=scored), recorders[0])])
    recorders[0].wait()
    [second] = engine.submit(model, [(request(prompt, 200, prompt_logprobs=scored), recorders[1])])
    recorders[1].wait()
    assert (first.cached_tokens, second.cached_tokens) == (0, 0 if scored else len(prompt) - 1)


def test_pages_are_given_back(engine: Engine) -> None:
    """With room for two sequences: many run, one after the other; the tree never holds more pages than there are."""
    model = engine.add(random_model("qwen3"), None, 0)
    tree: PrefixTree = model.reader.tree  # type: ignore[union-attr]
    assert model.pages == readers.pages_for(WINDOW, WINDOW) == 3
    recorders = run(engine, model, *mixed(20, seed=1))
    assert all(recorder.reason == "length" for recorder in recorders)
    assert model.reserved == 0 and not model.running
    nodes = [node for node in walk(tree) if node is not tree.root]
    assert len(nodes) + len(tree.free) == 3
    assert all(node.users == 0 for node in nodes)


def walk(tree: PrefixTree) -> list[Any]:
    nodes, todo = [], [tree.root]
    while todo:
        nodes.append(todo.pop())
        todo += nodes[-1].children
    return nodes


def test_common_beginnings() -> None:
    assert [common([1, 2, 3], other) for other in ([], [1, 2, 3, 4], [1, 2, 9], [9])] == [0, 3, 2, 0]


def test_ends_of_sequences(engine: Engine) -> None:
    module = random_model("qwen3")
    model = engine.add(module, None, 2**24)
    ids = generate(module, [[1, 2]], 30, seed=[0])[0]
    at = next(i for i in range(3, 30) if ids[i] not in ids[:i])
    [got] = run(engine, model, request([1, 2], 30, stop_ids=frozenset([ids[at]])))
    assert (got.reason, got.ids) == ("stop", ids[:at])  # without the stop id
    stopping = Recorder(stop_after=5)
    engine.submit(model, [(request([1, 2], 30), stopping)])
    assert (stopping.wait().reason, stopping.ids) == ("stop", ids[:5])
    [late] = run(engine, model, request([1, 2], 30, deadline=time.monotonic()))
    assert (late.reason, late.ids) == ("deadline", [])


def test_cancel_frees_the_place_at_once(engine: Engine) -> None:
    """Also of a sequence that waits; nobody else notices."""
    model = engine.add(random_model("qwen3"), None, 2**24)
    want = run(engine, model, request([7, 8], 100, seed=3))[0].ids
    handles: list[Any] = []
    victims = [Recorder(on_token=lambda self: len(self.tokens) == 4 and [h.cancel() for h in handles])
               for _ in range(20)]
    survivor = Recorder()
    pairs = [(request([7, 8, i], 10_000, seed=i), victim) for i, victim in enumerate(victims)]
    handles += engine.submit(model, pairs[:4])
    engine.submit(model, [(request([7, 8], 100, seed=3), survivor)])
    handles += engine.submit(model, pairs[4:])
    for victim in victims:
        assert victim.wait().reason == "cancelled"
        assert len(victim.tokens) <= 5
    assert survivor.wait().ids == want
    assert engine.running == engine.waiting == 0
    handles[0].cancel()  # again, after the end


def test_the_queue_is_bounded() -> None:
    engine = Engine(max_waiting=3, max_rows=2)
    model = engine.add(random_model("qwen3"), None, 2**24)
    hold, release = threading.Event(), threading.Event()
    engine.call(lambda: (hold.set(), release.wait(120)))
    assert hold.wait(120)
    recorders = [Recorder() for _ in range(3)]
    engine.submit(model, [(request([1]), recorder) for recorder in recorders])
    assert engine.waiting == 3
    with pytest.raises(Busy, match="3 sequences are waiting") as busy:
        engine.submit(model, [(request([1]), Recorder())])
    assert 1 <= busy.value.retry_after <= 60
    release.set()
    assert all(recorder.wait().reason == "length" for recorder in recorders)
    engine.close()
    with pytest.raises(BardletError, match="closed"):
        engine.submit(model, [(request([1]), Recorder())])


def test_close_ends_everything() -> None:
    engine = Engine()
    model = engine.add(random_model("qwen3"), None, 2**24)
    started = threading.Event()
    recorder = Recorder(on_token=lambda self: started.set())
    engine.submit(model, [(request([1], 10**6), recorder)])
    assert started.wait(120)
    assert not engine.remove(model)
    engine.close()
    assert recorder.wait().reason == "cancelled"


def test_a_damaged_sequence_harms_no_other(engine: Engine) -> None:
    """The embedding of one token is not a number: only who reads it gets an error, also from pages that are kept."""
    module = random_model("qwen3")
    with torch.no_grad():
        module.model.embed_tokens.weight[5] = float("nan")
    module.lm_head = torch.nn.Linear(64, V, bias=False)
    model = engine.add(module, None, 0)
    good = request([1, 2, 3], 30, seed=1, logit_bias={5: -1e9})
    want = run(engine, model, good)[0].tokens
    bad, fine, bad_again = run(engine, model, request([*range(1, 66)], 5), good, request([*range(1, 66)], 5))
    assert isinstance(bad.error, BardletError) and "not finite" in str(bad.error)
    assert str(bad_again.error) == str(bad.error)
    assert fine.tokens == want
    assert run(engine, model, good)[0].tokens == want


def test_a_listener_that_fails_ends_alone(engine: Engine) -> None:
    model = engine.add(random_model("qwen3"), None, 2**24)

    def fail(recorder: Recorder) -> None:
        raise RuntimeError("a bug")

    failing, fine = Recorder(on_token=fail), Recorder()
    engine.submit(model, [(request([1]), failing), (request([1]), fine)])
    assert failing.wait().reason == "cancelled" and "internal error" in str(failing.error)
    assert len(fine.wait().tokens) == 20


def test_a_listener_that_fails_at_its_prompt_ends_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = engine.add(random_model("qwen3"), None, 2**24)
    failing, fine = Recorder(), Recorder()
    monkeypatch.setattr(failing, "prompt", lambda tokens: 1 / 0)
    engine.submit(model, [(request([1, 2], prompt_logprobs=True), failing), (request([1]), fine)])
    assert failing.wait().reason == "cancelled" and failing.error is not None
    assert len(fine.wait().tokens) == 20


def test_an_error_of_the_reader_ends_its_model_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread goes on, for other models and for later requests."""
    broken, whole = (engine.add(random_model(name), None, 2**24) for name in ("gpt2", "qwen3"))
    monkeypatch.setattr(broken.reader, "open", lambda *arguments: 1 / 0)
    [got] = run(engine, broken, request([1]))
    assert got.reason == "cancelled" and "internal error" in str(got.error)
    assert len(run(engine, whole, request([1]))[0].tokens) == 20


def test_a_removed_model_is_freed(engine: Engine) -> None:
    module = random_model("qwen3")
    model = engine.add(module, None, 2**20)
    run(engine, model, request([1]))
    gone = weakref.ref(module)
    assert engine.remove(model)
    engine.call(lambda: None).result(60)  # the thread has come around
    del module, model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("temperature", [1e-50, 1e-7, 1e-6, 1e-3])
def test_any_temperature_draws_a_token(engine: Engine, temperature: float) -> None:
    model = engine.add(random_model("qwen3"), None, 2**24)
    cold, greedy = run(engine, model, request([1, 2], temperature=temperature), request([1, 2], temperature=0.0))
    assert cold.reason == "length"
    assert temperature > 1e-6 or cold.ids == greedy.ids


def test_a_short_prompt_does_not_wait_for_a_long_one(engine: Engine) -> None:
    """Nor does the long one wait for a stream of short ones: each step reads some of it."""
    model = engine.add(random_model("qwen3"), None, 2**24)
    hold, release = threading.Event(), threading.Event()
    engine.call(lambda: (hold.set(), release.wait(120)))
    assert hold.wait(120)
    order: list[str] = []
    pairs = [(request(range(3, 63), 1), Recorder(on_token=lambda self: order.append("medium"))),
             (request([5] * 150, 1), Recorder(on_token=lambda self: order.append("long"))),
             *((request([7, i], 1), Recorder(on_token=lambda self: order.append("short"))) for i in range(5))]
    engine.submit(model, pairs)
    release.set()
    for _, recorder in pairs:
        recorder.wait()
    assert order.index("long") > order.index("short") and order[-1] in ("long", "medium")


def test_penalties_and_biases(engine: Engine) -> None:
    """As OpenAI defines them: logits minus presence, minus frequency times the count of new tokens, plus bias."""
    module = random_model("qwen3")
    model = engine.add(module, None, 2**24)
    [got] = run(engine, model, request([1, 2], 60, temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25,
                                       logit_bias={9: 1.5}))  # fmt: skip
    ids, new = [1, 2], [0] * V
    for token in got.tokens:
        with torch.no_grad():
            logits = module(torch.tensor([ids]))[0, -1]
        count = torch.tensor(new, dtype=torch.float32)
        adjusted = logits - 0.5 * (count > 0) - 0.25 * count + 1.5 * F.one_hot(torch.tensor(9), V)
        assert float(adjusted[token.id]) == pytest.approx(float(adjusted.max()), abs=1e-4)
        assert token.logprob == pytest.approx(float(logits.log_softmax(-1)[token.id]), abs=1e-4)
        ids.append(token.id)
        new[token.id] += 1
    banned = run(engine, model, request([1, 2], 60, logit_bias=dict.fromkeys(range(1, V), -100.0)))[0]
    assert set(banned.ids) == {0}


def test_several_models(engine: Engine) -> None:
    modules = [random_model(name) for name in ("gpt2", "qwen3")]
    models = [engine.add(module, None, 2**24) for module in modules]
    pairs = [(model, module, Recorder()) for model, module in zip(models, modules, strict=True)]
    for model, _, recorder in pairs:
        engine.submit(model, [(request([1, 2], 50), recorder)])
    for _, module, recorder in pairs:
        assert recorder.wait().ids == generate(module, [[1, 2]], 50, seed=[0])[0]
    assert all(engine.remove(model) for model in models)


def test_calls_run_in_the_inference_thread(engine: Engine) -> None:
    assert engine.call(lambda: threading.current_thread().name).result(60) == "bardlet inference"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0).result(60)
    assert PAGE == 64
