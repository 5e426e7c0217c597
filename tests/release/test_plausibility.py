"""The size of released values: honest runs pass, too small and too large ones do not, and a careful forger does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from peft_dpzero import DPZeroSGD, make_plan, replay_journal
from peft_dpzero.mechanism.clipping import SENSITIVITY
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.release.bundle import with_digests
from peft_dpzero.release.card import save_card
from peft_dpzero.release.header import plan_header
from peft_dpzero.release.journal import Journal, JournalEntry, JournalSegment
from peft_dpzero.release.ledger import record_of
from peft_dpzero.release.plausibility import measured
from peft_dpzero.release.record import save_record
from peft_dpzero.release.start import save_start
from torch import Tensor

from release.releases import LORA, failures
from tiny import explicit, tiny_dataset, tiny_model

UNITS, BATCH = 64, 4


def segment(values: Any, sigma: float = 1.0, **changes: Any) -> JournalSegment:
    """A run with the released `values`, (T, K) in units of 2²⁰."""
    options: dict[str, Any] = {"target_delta": 1e-5, "num_directions": len(values[0])} | changes
    config = explicit(noise_multiplier=sigma, **options).settled().to_dict()
    header = {"config": config, "expected_batch_size": BATCH, "sample_rate": BATCH / UNITS, "first_step": 0}
    entries = [
        JournalEntry(step, (0.1,), 0, tuple(round(value * SENSITIVITY) for value in row))
        for step, row in enumerate(values)
    ]
    return JournalSegment(header, entries)


LAPLACE: dict[str, Any] = {"mechanism": "laplace", "target_delta": 0}


@pytest.mark.parametrize("sigma", [0.3, 1.0, 30.0])
@pytest.mark.parametrize("laplace", [False, True])
def test_noise_alone_and_noise_with_all_that_was_sampled_pass(sigma: float, laplace: bool) -> None:
    generator = np.random.default_rng(3)
    for seed in range(50):
        steps, width = 1 + seed % 7, 1 if laplace else 1 + seed % 5
        noise = getattr(generator, "laplace" if laplace else "normal")(scale=sigma, size=(steps, width))
        pull = generator.binomial(UNITS, BATCH / UNITS, size=(steps, 1)) / math.sqrt(width)
        for values in (noise, noise + pull):
            scale = measured([segment(values, sigma, **(LAPLACE if laplace else {}))])
            assert scale is not None
            assert not scale.too_small
            assert not scale.too_large


@pytest.mark.parametrize("changes", [{}, LAPLACE])
def test_too_little_noise_and_too_much_of_anything_are_told(changes: dict[str, Any]) -> None:
    generator = np.random.default_rng(4)
    noise = generator.laplace(size=(60, 1)) if changes else generator.normal(size=(60, 1))
    small = measured([segment(noise * 0.3, **changes)])
    assert small is not None
    assert small.too_small
    noise[41] = 60.0
    large = measured([segment(noise, **changes)])
    assert large is not None
    assert (large.too_large, large.too_small, large.step) == (True, False, 41)


def test_segments_are_measured_each_by_its_own_noise() -> None:
    generator = np.random.default_rng(5)
    quiet, loud = (segment(generator.normal(scale=s, size=(200, 4)), s) for s in (1.0, 100.0))
    scale = measured([quiet, loud])
    assert scale is not None
    assert not scale.too_small
    assert not scale.too_large
    swapped = [JournalSegment(quiet.header, loud.entries), JournalSegment(loud.header, quiet.entries)]
    scale = measured(swapped)
    assert scale is not None
    assert scale.too_large


def test_without_noise_there_is_no_measure() -> None:
    assert measured([segment([[3.0]], 0.0)]) is None
    assert measured([segment([[3.0]], 1e-5)]) is None
    assert measured([]) is None


def trained_without_privacy(model: torch.nn.Module) -> dict[str, Tensor]:
    """What a few steps of plain gradient descent make of the trainable parameters."""
    rows = tiny_dataset("classifier").with_format("torch")[:]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        model(**rows).loss.backward()
        optimizer.step()
    target = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])
            parameter.grad = None
    return target


def forged(folder: Path, rate: float | None = None) -> float:
    """A release in folder/release whose one step moves the start to weights that were trained without privacy.

    Args:
        folder: base and release go there.
        rate: the learning rate that it claims; None chooses the one that gives the values the size of noise.

    Returns: the values' root mean square, in units of σ.
    """
    tiny_model("classifier").save_pretrained(folder / "base")
    release = folder / "release"
    release.mkdir()
    model = get_peft_model(tiny_model("classifier"), LORA)
    width = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = explicit(noise_multiplier=1.0, target_delta=1e-5, num_directions=width).settled()
    plan = make_plan(config, UNITS, BATCH, 1)
    perturbation = Perturbation(model)
    save_start(perturbation, release)
    optimizer = DPZeroSGD(perturbation.parameters.values())
    header = plan_header(plan, perturbation, optimizer)
    target = trained_without_privacy(model)

    names = list(perturbation.parameters)
    directions = [[perturbation.z(0, k, name).double().flatten() for name in names] for k in range(width)]
    move = torch.cat([(perturbation.parameters[name].detach() - target[name]).double().flatten() for name in names])
    coefficients = torch.linalg.solve(torch.stack([torch.cat(z) for z in directions]).T, move)
    values = coefficients * BATCH * width / config.clipping_threshold
    size = float(values.square().mean().sqrt())
    rate = size if rate is None else rate
    journal = Journal(release / "dpzero_journal", header)
    journal.record(0, (rate,), 0, [round(value * SENSITIVITY / rate) for value in values.tolist()])
    journal.close()

    replay_journal(model, release)
    assert all(torch.allclose(perturbation.parameters[name], target[name], atol=1e-4) for name in names)
    model.save_pretrained(release)
    config.save_pretrained(release)
    record = record_of(journal.segments)
    save_record(with_digests(record, release, journal, perturbation), release)
    save_card(record, release, model)
    return size / rate


def test_weights_written_as_one_release_are_too_large(tmp_path: Path) -> None:
    assert forged(tmp_path, rate=0.01) > 10
    assert failures(tmp_path / "release", tmp_path / "base") == {"scale"}


def test_a_forger_who_also_chooses_the_learning_rate_is_not_told(tmp_path: Path) -> None:
    """What verify says that it cannot show."""
    assert forged(tmp_path) == pytest.approx(1.0)
    assert failures(tmp_path / "release", tmp_path / "base") == set()
