"""Perturbed models: exact restores, one result however directions are made, and memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from peft_dpzero import DPZeroAdamW, DPZeroError, DPZeroSGD, Estimate, Released
from peft_dpzero.checks.probe import Probe
from peft_dpzero.checks.shortcuts import find_streamed
from peft_dpzero.perturbation.perturbation import Perturbation
from torch import Tensor, nn

from tiny import tiny_model

Bits = dict[str, tuple[int, Tensor]]


def bits(model: nn.Module) -> Bits:
    return {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}


def assert_restored(model: nn.Module, before: Bits) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0], name
        assert parameter.dtype == before[name][1].dtype
        assert torch.equal(parameter.detach(), before[name][1]), name
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_frozen_model_has_nothing_to_perturb() -> None:
    with pytest.raises(DPZeroError, match="frozen"):
        Perturbation(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_perturbed_values_are_rounded_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(7, 3).to(dtype)
    # A parameter whose memory is not in the order of its entries.
    model.weight = nn.Parameter(model.weight.detach().t().contiguous().t())
    before = bits(model)
    wide = torch.promote_types(dtype, torch.float32)
    for kept in (1 << 22, 0):
        monkeypatch.setattr("peft_dpzero.perturbation.perturbation.KEPT_ENTRIES", kept)
        perturbation = Perturbation(model, seed=2)
        with perturbation.at(0, 1, 0.3):
            for name, parameter in model.named_parameters():
                moved = before[name][1].to(wide) + perturbation.z(0, 1, name).to(wide) * 0.3
                assert torch.equal(parameter, moved.to(dtype))
        assert_restored(model, before)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_thousand_steps_of_perturbing_drift_by_no_bit(dtype: torch.dtype, streams: bool) -> None:
    model = nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 2)).to(dtype)
    before = bits(model)
    perturbation = Perturbation(model, streamed=list(before) if streams else ())
    x = torch.ones(1, 9, dtype=dtype)
    errors: list[type[BaseException] | None] = [None, ValueError, KeyboardInterrupt]
    for step in range(1000):
        error = errors[step % 3]
        try:
            with perturbation.at(step, 0, 1e-2 if step % 2 else -1e-2):
                model(x)
                if error is not None:
                    raise error
        except (ValueError, KeyboardInterrupt):
            pass
    assert_restored(model, before)


@pytest.mark.parametrize("streams", [False, True])
def test_parameters_come_back_from_an_interrupt_in_a_layer_or_while_directions_are_made(
    streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 2))
    before = bits(model)
    perturbation = Perturbation(model, streamed=list(before) if streams else ())
    # A batch of the wrong width fails inside the first layer's call.
    with pytest.raises(RuntimeError, match="shapes"), perturbation.at(0, 0, 0.1):
        model(torch.ones(1, 8))
    assert_restored(model, before)

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_dpzero.perturbation.perturbation.add_shift", interrupted)
    with pytest.raises(KeyboardInterrupt), perturbation.at(0, 0, 0.1):
        model(torch.ones(1, 9))
    assert_restored(model, before)


@pytest.mark.parametrize("kept", [0, 1 << 22])
def test_passes_nest_and_may_lie_in_inference_mode(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_dpzero.perturbation.perturbation.KEPT_ENTRIES", kept)
    model = nn.Linear(300, 301)
    before = bits(model)
    perturbation = Perturbation(model)
    z = [perturbation.z(0, k, "weight") for k in range(2)]
    for mode in (True, False, True):
        with torch.inference_mode(mode), perturbation.at(0, 0, 0.5):
            first = before["weight"][1] + 0.5 * z[0]
            assert torch.equal(model.weight, first)
            with perturbation.at(0, 1, 0.25):
                assert torch.equal(model.weight, first + 0.25 * z[1])
            assert torch.equal(model.weight, first)
    assert_restored(model, before)


def updated(
    threads: int, kept: int, dtype: torch.dtype, distribution: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> Bits:
    monkeypatch.setattr("peft_dpzero.perturbation.perturbation.KEPT_ENTRIES", kept)
    monkeypatch.setattr("peft_dpzero.perturbation.directions._CHUNK_ENTRIES", 1 << 15)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(301, 333), nn.Linear(333, 3)).to(dtype)
    perturbation = Perturbation(model, seed=1, distribution=distribution)
    optimizer = (
        DPZeroSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        if rule == "sgd"
        else DPZeroAdamW(model.parameters(), lr=0.1, weight_decay=0.01)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in range(3):
            optimizer.step(Estimate(Released(step, (1, 2, 3), (0.3, -1.7, 0.01), 1.0), perturbation))
    finally:
        torch.set_num_threads(before)
    return bits(model)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "sphere"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_the_same_bits_on_any_threads_kept_or_made_again(
    dtype: torch.dtype, distribution: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = [
        updated(threads, kept, dtype, distribution, rule, monkeypatch)
        for threads, kept in ((1, 1 << 22), (2, 1 << 22), (1, 0), (2, 0), (1, 150_000), (2, 250_000))
    ]
    for way in ways[1:]:
        for name, (_, value) in way.items():
            assert torch.equal(value, ways[0][name][1])


@pytest.fixture
def streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_dpzero.perturbation.perturbation.STREAMED_ENTRIES", 0)
    monkeypatch.setattr("peft_dpzero.perturbation.perturbation.KEPT_ENTRIES", 0)


def outputs(model: nn.Module, run: Callable[[], Tensor], streamed: frozenset[str]) -> list[Tensor]:
    perturbation = Perturbation(model, streamed=streamed)
    before = bits(model)
    results = []
    for k, scale in ((0, 0.1), (1, -0.1)):
        with perturbation.at(0, k, scale), torch.no_grad():
            results.append(run())
    assert_restored(model, before)
    return results


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("kind", ["classifier", "masked_lm", "causal_lm", "seq2seq"])
def test_streaming_changes_no_output(kind: str) -> None:
    model = tiny_model(kind).eval()
    run = Probe(model, torch.device("cpu")).run
    names = find_streamed(Perturbation(model), run)
    total = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    own_head = sum(p.numel() for p in head.parameters()) if head is not None else 0
    assert sum(model.get_parameter(name).numel() for name in names) >= 0.9 * (total - own_head)
    for plain, other in zip(outputs(model, run, frozenset()), outputs(model, run, names), strict=True):
        assert torch.equal(plain, other)
    assert not torch.equal(plain, run())


class Reader(nn.Module):
    """Reads the parameters of `hidden` without calling it, after it was called once."""

    def __init__(self, read: Callable[[nn.Linear], Tensor | float]) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.last(self.hidden(x) + self.read(self.hidden)))


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize(
    "read",
    [
        lambda layer: layer.weight.sum(),
        lambda layer: layer.bias,
        lambda layer: layer.weight.shape[0],
        lambda layer: nn.functional.linear(torch.ones(1, 4), layer.weight),
    ],
)
def test_parameters_read_behind_their_modules_back_are_not_streamed(read: Callable[[nn.Linear], Tensor]) -> None:
    model = Reader(read)
    before = bits(model)
    names = find_streamed(Perturbation(model), lambda: model(torch.ones(1, 4)))
    assert names == frozenset()
    assert_restored(model, before)


@pytest.mark.usefixtures("streaming")
def test_modules_without_a_call_of_their_own_are_perturbed_for_the_whole_pass() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    model.attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)

    def run() -> Tensor:
        hidden = model[0](x)
        return torch.as_tensor(model[1](model.attention(hidden, hidden, hidden)[0]))

    names = find_streamed(Perturbation(model), run)
    assert names == {"0.weight", "0.bias", "1.weight", "1.bias"}
    for plain, other in zip(outputs(model, run, frozenset()), outputs(model, run, names), strict=True):
        assert torch.equal(plain, other)

    # Its fast path reads the weights of all layers below.
    encoder = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    assert find_streamed(Perturbation(encoder), lambda: encoder(x)) == frozenset()


@pytest.mark.usefixtures("streaming")
def test_tied_and_repeated_modules_are_streamed_at_each_call() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model.append(model[0])
    model[2].weight = model[0].weight

    def run() -> Tensor:
        return torch.as_tensor(model(torch.ones(1, 4)))

    names = find_streamed(Perturbation(model), run)
    assert names == {"0.weight", "0.bias", "2.bias"}
    for plain, other in zip(outputs(model, run, frozenset()), outputs(model, run, names), strict=True):
        assert torch.equal(plain, other)


def peak_bytes(work: Callable[[], None]) -> int:
    """How much more torch had allocated on the CPU at the worst moment of `work` than before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in sorted(results, key=lambda e: e.start_ns()) if event.name() == "[memory]"]
    return max(accumulate(sizes))


@pytest.mark.usefixtures("streaming")
def test_a_streamed_step_needs_one_modules_memory() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(20)))
    module, whole = (4 * sum(p.numel() for p in part.parameters()) for part in (model[0], model))
    optimizer = DPZeroSGD(model.parameters())

    @torch.no_grad()
    def run() -> Tensor:
        return torch.as_tensor(model(torch.ones(1, 256)))

    def step(perturbation: Perturbation) -> None:
        with perturbation.at(0, 0, 1e-3):
            run()
        optimizer.step(Estimate(Released(0, (1, 2), (1.0, 2.0), 1.0), perturbation))

    streamed = find_streamed(Perturbation(model), run)
    assert whole <= peak_bytes(lambda: step(Perturbation(model))) < whole + module
    assert module <= peak_bytes(lambda: step(Perturbation(model, streamed=streamed))) < 1.5 * module
