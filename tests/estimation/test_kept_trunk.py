"""What lies below the adapters is computed once a run for each row, and no loss changes by that, not by a bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft_dpzero import infer_task
from peft_dpzero.checks.probe import Probe
from peft_dpzero.estimation.batching import LogicalBatches
from peft_dpzero.estimation.differences import estimate_differences, losses_at
from peft_dpzero.estimation.losses import Losses
from peft_dpzero.estimation.preferences import DPOTask
from peft_dpzero.estimation.sampling import SECRET_BYTES, PoissonSampler, new_secret
from peft_dpzero.estimation.shapes import Shapes
from peft_dpzero.estimation.shortcuts import kept_trunk
from peft_dpzero.mechanism.plan import make_plan
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.public import scales
from peft_dpzero.public.scales import Pace, measure_seconds
from peft_dpzero.release.optimizer import DPZeroSGD
from peft_dpzero.step import PrivateStep
from torch import Tensor, nn
from transformers import default_data_collator

from tiny import explicit, tiny_dataset, tiny_lora, token_rows

CPU = torch.device("cpu")
POINTS = [(0, 0.0), (0, 1e-2), (1, 1e-2), (2, -1e-2)]


def upper(kind: str) -> Any:
    return tiny_lora(kind, layers_to_transform=[1]).eval()


def losses_of(model: Any) -> Losses:
    return Probe(model, CPU, task=infer_task(model)).losses(Perturbation(model), dict)


def batch_of(kind: str, ids: list[list[int]], length: int = 12) -> dict[str, Tensor]:
    padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    labels = torch.arange(len(ids)) % 2 if kind == "classifier" else padded.masked_fill(mask == 0, -100)
    return {"input_ids": padded, "attention_mask": mask, "labels": labels}


def counted(module: nn.Module) -> Counter[str]:
    """How many rows go through a module from now on."""
    seen: Counter[str] = Counter()
    module.register_forward_hook(lambda module, args, output: seen.update(rows=len(output), calls=1))
    return seen


def lower_layer(model: Any) -> nn.Module:
    base = model.get_base_model()
    layers = base.bert.encoder.layer if hasattr(base, "bert") else base.model.layers
    return layers[0].attention.self.key if hasattr(base, "bert") else layers[0].self_attn.k_proj


@pytest.mark.parametrize("kind", ["classifier", "causal_lm", "masked_lm"])
def test_losses_with_what_is_kept_are_the_same_bit_for_bit(kind: str) -> None:
    model = upper(kind)
    losses, perturbation = losses_of(model), Perturbation(model)
    assert losses.shortcuts.kept is not None
    batches = [batch_of(kind, token_rows(4, 5, seed)) for seed in range(3)]
    plain = losses_at(losses.without_kept(), batches, perturbation, 0, POINTS)
    seen = counted(lower_layer(model))
    losses.prepare(batches)
    assert seen["rows"] == 12
    for _ in range(2):
        made = losses_at(losses, batches, perturbation, 0, POINTS)
        assert all(map(torch.equal, made, plain))
        losses.prepare(batches)
    assert seen["rows"] == 12, "they were computed again"


def test_no_row_of_a_step_depends_on_what_was_drawn_before() -> None:
    model = upper("classifier")
    perturbation = Perturbation(model)
    rows = [
        {"input_ids": ids[: 3 + n % 5], "attention_mask": [1] * len(ids[: 3 + n % 5]), "labels": n % 2}
        for n, ids in enumerate(token_rows(40, 8))
    ]
    shapes = Shapes(20, 20, together=dict.fromkeys(range(4, 16), (1, 4, 8)))

    def differences(losses: Losses, chosen: list[int], step: int) -> Tensor:
        data: Any = [rows[number] for number in chosen]
        collate = lambda some: default_data_collator([{k: torch.tensor(v) for k, v in some[0].items()}])  # noqa: E731
        batches = LogicalBatches(data, PoissonSampler(len(data), 1.0, new_secret()), collate, shapes)
        settings: Any = {"num_directions": 3, "smoothing_parameter": 1e-2, "difference": "forward"}
        return estimate_differences(losses, batches.draw(0), perturbation, step=step, **settings)._rows

    fresh, used = losses_of(model), losses_of(model)
    differences(used, list(range(0, 40, 3)), 0)
    differences(used, [1, 2, 3, 4, 5, 20], 1)
    mine = list(range(10, 32))
    assert torch.equal(differences(used, mine, 2), differences(fresh, mine, 2))
    assert torch.equal(differences(used, mine, 2), differences(fresh.without_kept(), mine, 2))


def test_rows_that_are_new_go_in_passes_of_the_steps_own_sizes() -> None:
    model = upper("classifier")
    losses = losses_of(model)
    first, second = (batch_of("classifier", token_rows(4, 5, seed)) for seed in (1, 2))
    losses.prepare([first])
    mixed = {key: torch.cat([first[key][:3], second[key][:1]]) for key in first}
    full = batch_of("classifier", token_rows(1, 12, 3))
    seen: list[int] = []
    lower_layer(model).register_forward_hook(lambda module, args, output: seen.append(len(output)))
    losses.prepare([mixed, full])
    assert sorted(seen) == [1, 4]


def test_sequences_of_a_row_meet_no_others() -> None:
    """Two of three pairs share a sequence: what each pass was given is one pair, whatever was kept before."""
    model = upper("causal_lm")
    found = Probe(model, CPU, task=DPOTask(0.5)).losses(Perturbation(model), dict).shortcuts.kept
    assert found is not None
    assert found.sequences == 2
    common, *others = token_rows(5, 6)
    pairs = [(common, others[0]), (common, others[1]), (others[2], others[3])]
    passes = [batch_of("causal_lm", list(pair)) for pair in pairs]
    for one in passes:
        del one["labels"]
    seen: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0]))
    for some in (passes[:1], passes):
        found.fill(some, lambda inputs: model(**inputs))
    assert [ids.tolist() for ids in seen] == [one["input_ids"].tolist() for one in passes]
    plain = [model(**one).logits for one in passes]
    for one, logits in zip(passes, plain, strict=True):
        below = counted(lower_layer(model))
        with found.given(one):
            assert torch.equal(model(**one).logits, logits)
        assert not below


def test_new_rows_of_several_steps_share_passes() -> None:
    """And no release differs."""
    data = tiny_dataset("classifier", 96)
    plan = make_plan(explicit(noise_multiplier=0.0, target_delta=1e-5, num_directions=2), len(data), 8, 6)

    def released(rows_ahead: int) -> tuple[list[Any], int]:
        model = upper("classifier")
        losses, perturbation = losses_of(model), Perturbation(model)
        sampler = PoissonSampler(len(data), plan.sample_rate, bytes(SECRET_BYTES))
        shapes = Shapes(8, 8, together=dict.fromkeys(range(64), (1, 2, 4)))
        step = PrivateStep(
            model,
            plan,
            batches=LogicalBatches(data, sampler, default_data_collator, shapes),
            losses=losses,
            perturbation=perturbation,
            optimizer=DPZeroSGD(perturbation.parameters.values()),
            rows_ahead=rows_ahead,
        )
        seen = counted(lower_layer(model))
        return [step(number).estimate.released.values for number in range(6)], seen["calls"]

    (plain, calls), (ahead, fewer) = released(1), released(64)
    assert plain == ahead
    assert any(map(any, plain))
    assert fewer < calls


def test_what_is_needed_above_is_not_left_out() -> None:
    class Skipping(nn.Module):
        """Adds what came out of the lowest layer to what comes out of the highest."""

        def __init__(self, lower: nn.Module, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer
            lower.register_forward_hook(lambda module, args, output: setattr(self, "below", output))

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.layer(*args, **kwargs) + 1000 * self.below

    model = upper("classifier")
    layers = model.base_model.model.bert.encoder.layer
    layers[1] = Skipping(layers[0].attention.output.dense, layers[1])
    assert losses_of(model).shortcuts.kept is None


def test_a_pass_over_new_rows_leaves_nothing_to_the_next() -> None:
    class Following(nn.Module):
        """Adds the length of the longest row that it has seen, as some frequencies follow that."""

        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer
            self.longest = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.longest = max(self.longest, args[0].shape[1])
            return self.layer(*args, **kwargs) + torch.linspace(0, self.longest, args[0].shape[2])

    model = upper("classifier")
    layers = model.base_model.model.bert.encoder.layer
    layers[0] = Following(layers[0])
    losses, perturbation = losses_of(model), Perturbation(model)
    assert losses.shortcuts.kept is not None
    batches = [batch_of("classifier", token_rows(1, 5, length), length) for length in (30, 6, 18)]
    losses.prepare(batches)
    made = losses_at(losses, batches, perturbation, 0, POINTS)
    assert all(map(torch.equal, made, losses_at(losses.without_kept(), batches, perturbation, 0, POINTS)))


def test_without_room_losses_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = upper("classifier")
    plain = losses_of(model).without_kept()
    monkeypatch.setattr(kept_trunk, "MOST_BYTES", 1)
    losses, perturbation = losses_of(model), Perturbation(model)
    kept = losses.shortcuts.kept
    assert kept is not None
    batches = [batch_of("classifier", token_rows(4, 5, seed)) for seed in range(3)]
    losses.prepare(batches)
    seen = counted(lower_layer(model))
    made = losses_at(losses, batches, perturbation, 0, POINTS)
    assert seen["calls"] == 2, "one of three micro-batches found room"
    assert all(map(torch.equal, made, losses_at(plain, batches, perturbation, 0, POINTS)))


def test_the_processes_of_a_machine_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_trunk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert kept_trunk._RowFile()._room == 125


def test_a_disk_that_is_full_stops_nothing() -> None:
    script = """
import resource, signal
import torch
from peft_dpzero.estimation.shortcuts.kept_trunk import _RowFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
file = _RowFile()
for number in range(4):
    file.put(bytes([number]), torch.full((1000,), float(number)))
print([None if (row := file.get(bytes([n]))) is None else float(row.mean()) for n in range(4)], file.full)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[0.0, None, None, None] True", done.stderr


def test_whatever_interrupts_no_row_is_written_over_another() -> None:
    class Interrupted(dict[bytes, Any]):
        def __setitem__(self, key: bytes, value: Any) -> None:
            super().__setitem__(key, value)
            raise KeyboardInterrupt

    file = kept_trunk._RowFile()
    file._places = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        file.put(b"first", torch.zeros(10))
    file._places = dict(file._places)
    file.put(b"second", torch.ones(10))
    first = file.get(b"first")
    assert first is None or torch.equal(first, torch.zeros(10))


def test_the_file_has_no_name_and_no_other_user_may_open_it(tmp_path: Path) -> None:
    script = """
import os, sys, tempfile
from peft_dpzero.estimation.shortcuts.kept_trunk import _RowFile
import torch
file = _RowFile()
file.put(b"row", torch.full((1000,), 0.5))
info = os.fstat(file._file.fileno())
print(oct(info.st_mode & 0o777), info.st_nlink, os.listdir(tempfile.gettempdir()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "0o600 0 []", done.stderr


def test_what_a_row_costs_when_it_was_drawn_before_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = upper("classifier")
    losses, seen = losses_of(model), counted(lower_layer(model))
    monkeypatch.setattr(scales.time, "perf_counter", lambda: float(seen["rows"]))
    row = batch_of("classifier", token_rows(1, 5, 0))
    seconds = measure_seconds(losses, row, Perturbation(model))
    assert seconds.row == pytest.approx(scales._UNEVEN, abs=1e-3)
    assert seconds.again == 0


def test_unsteady_lower_layers_leave_what_a_point_costs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = upper("classifier")
    losses, seen = losses_of(model), counted(lower_layer(model))
    # Each of their passes takes longer than the one before.
    monkeypatch.setattr(scales.time, "perf_counter", lambda: float(seen["rows"] ** 2))
    seconds = measure_seconds(losses, batch_of("classifier", token_rows(1, 5, 0)), Perturbation(model))
    assert seconds.row > 1
    assert seconds.point < 1e-6


@pytest.mark.parametrize(("first", "later"), [(3.0, 1.0), (2.0, 2.0)])
def test_as_many_steps_are_planned_as_the_time_allows(first: float, later: float) -> None:
    pace = Pace(first, later, 0.05)
    steps = pace.steps(100.0)
    assert pace.seconds(steps) <= 100.0 < pace.seconds(steps + 1)
    # A row is new with probability (1 − q)^t.
    expected = sum(later + (first - later) * 0.95**step for step in range(steps))
    assert pace.seconds(steps) == pytest.approx(expected)
