"""Directions: published vectors, random access, distributions. Perturbation: exact restores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from peft_dpzero import DPZeroError, Perturbation
from peft_dpzero.directions import Directions, philox_words
from peft_dpzero.probe import Probe
from scipy import stats
from torch import nn

from tiny import tiny_model


def test_philox_gives_the_published_vector() -> None:
    words = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox_words(0, 0, 0, 0, 1).tolist() == words


def test_blocks_can_be_read_anywhere() -> None:
    whole = philox_words(5, 7, 2, 0, 64)
    assert np.array_equal(philox_words(5, 7, 2, 40, 24), whole[160:])
    for other in (philox_words(6, 7, 2, 0, 64), philox_words(5, 8, 2, 0, 64), philox_words(5, 7, 3, 0, 64)):
        assert not np.intersect1d(whole, other).size


def parameters(*sizes: int) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{i}", nn.Parameter(torch.zeros(size))) for i, size in enumerate(sizes)]


def test_parameters_never_share_entries() -> None:
    directions = Directions(parameters(13, 400_000, 5), 1, "gaussian")
    entries = torch.cat([directions.entry(0, 0, name) for name in ("p0", "p1", "p2")])
    pairs = torch.unique(entries.view(-1, 2), dim=0)
    assert pairs.shape == (200_009, 2)


@pytest.mark.parametrize("distribution", ["gaussian", "sphere"])
def test_gaussian_entries_are_gaussian(distribution: str) -> None:
    directions = Directions(parameters(200_000), 3, distribution)
    z = directions.entry(4, 1, "p0").numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-6
    assert abs(np.corrcoef(z[0::2], z[1::2])[0, 1]) < 0.02
    assert abs(np.corrcoef(z, directions.entry(4, 2, "p0").numpy())[0, 1]) < 0.02


def test_rademacher_and_sphere() -> None:
    signs = Directions(parameters(100_000), 3, "rademacher").entry(0, 0, "p0")
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.02
    sphere = Directions(parameters(100, 23), 3, "sphere")
    z = torch.cat([sphere.entry(0, 0, "p0"), sphere.entry(0, 0, "p1")])
    assert float(z.double().norm()) == pytest.approx(123**0.5, rel=1e-6)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_parameters_come_back_bit_for_bit(error: type[BaseException] | None) -> None:
    model = nn.Sequential(nn.Linear(7, 3), nn.Linear(3, 2).bfloat16())
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    perturbation = Perturbation(model, seed=2)
    try:
        with perturbation.at(0, 1, 0.5):
            for name, parameter in model.named_parameters():
                moved = before[name][1].float() + 0.5 * perturbation.directions.entry(0, 1, name)
                assert torch.equal(parameter, moved.to(parameter.dtype))
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_a_frozen_model_has_nothing_to_perturb() -> None:
    with pytest.raises(DPZeroError, match="frozen"):
        Perturbation(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("layers", [[1], [0]])
def test_a_shared_trunk_changes_no_logit(layers: list[int]) -> None:
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], layers_to_transform=layers)
    model = get_peft_model(tiny_model("classifier"), lora).eval()
    perturbation = Perturbation(model)
    probe = Probe(model, torch.device("cpu"))
    trunk = probe.find_trunk(perturbation)
    assert trunk is not None
    assert any(module is model.base_model.model.bert.embeddings for module in trunk.modules)

    def logits(k: int, scale: float) -> torch.Tensor:
        with perturbation.at(0, k, scale):
            return probe.run()

    plain = [logits(k, s) for k in range(3) for s in (0.1, -0.1)]
    with trunk.shared():
        shared = [logits(k, s) for k in range(3) for s in (0.1, -0.1)]
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-6)
    assert not any("forward" in vars(module) for module in trunk.modules)


def test_nothing_is_shared_when_the_first_layer_depends_on_what_is_trained() -> None:
    prefix = get_peft_model(
        tiny_model("causal_lm"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    ).eval()
    full = tiny_model("causal_lm")
    for model in (prefix, full):
        assert Probe(model, torch.device("cpu")).find_trunk(Perturbation(model)) is None
