"""Directions: published vectors, random access, distributions; the shared trunk."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from peft_dpzero.checks.probe import Probe
from peft_dpzero.checks.shortcuts import find_trunk
from peft_dpzero.perturbation.directions import Directions
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.perturbation.philox import WORDS_PER_BLOCK, _negative_quantiles, gaussian_table, philox
from scipy import stats
from torch import nn

from tiny import tiny_model

SMALL = (13, 70_000, 5, 40_001)


def philox_words(seed: int, step: int, direction: int, first_block: int, num_blocks: int) -> np.ndarray:
    """Output of `num_blocks` blocks of `philox`: uint64, (4 * num_blocks,)."""
    words = philox(seed, step, direction, first_block).random_raw(WORDS_PER_BLOCK * num_blocks)
    return np.asarray(words, dtype=np.uint64)


def parameters(*sizes: int) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{i}", nn.Parameter(torch.zeros(size))) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("counter", "key", "published"),
    [
        (0, 0, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
        (2**256 - 1, 2**128 - 1, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
        (
            0x082EFA98EC4E6C89A4093822299F31D013198A2E03707344243F6A8885A308D3,
            0xBE5466CF34E90C6C452821E638D01377,
            "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
        ),
    ],
)
def test_numpys_philox_gives_the_vectors_of_random123(counter: int, key: int, published: str) -> None:
    generator = np.random.Philox(counter=(counter - 1) % (1 << 256), key=key)
    assert [f"{word:016x}" for word in generator.random_raw(4)] == published.split()


def test_addresses_are_laid_out_in_the_counter() -> None:
    assert philox_words(0, 0, 0, 0, 1)[0] == 0x16554D9ECA36314C
    assert np.array_equal(philox_words(5, 7, 2, 9, 1), np.random.Philox(counter=[8, 2, 7, 0], key=[5, 0]).random_raw(4))
    whole = philox_words(5, 7, 2, 0, 64)
    assert np.array_equal(philox_words(5, 7, 2, 40, 24), whole[160:])
    for other in (philox_words(6, 7, 2, 0, 64), philox_words(5, 8, 2, 0, 64), philox_words(5, 7, 3, 0, 64)):
        assert not np.intersect1d(whole, other).size


def test_the_gaussian_table_is_the_same_on_every_machine() -> None:
    table = gaussian_table()
    digest = "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"
    assert hashlib.sha256(table.astype("<f4").tobytes()).hexdigest() == digest
    # `log` may differ by a few units in the 16th digit: none of the roundings to float32 is that close.
    half = _negative_quantiles()
    for error in (1e-13, -1e-13):
        assert np.array_equal((half * (1 + error)).astype(np.float32), table[: half.size])


def test_table_entries_have_the_moments_of_a_sub_gaussian() -> None:
    table = gaussian_table().astype(np.float64)
    assert np.array_equal(table, -table[::-1])
    assert np.all(np.diff(table) > 0)
    assert abs(np.square(table).mean() - 1) < 1e-9
    assert table.max() < 4.33
    # E[z^2k] <= (2k - 1)!! for all k gives E[exp(tz)] <= exp(t²/2); beyond k = 40 the bound 4.33^2k is below it.
    normal = 1.0
    for k in range(1, 41):
        normal *= 2 * k - 1
        assert np.power(table, 2 * k).mean() <= normal


def test_an_entry_is_a_look_up_of_a_16_bit_quarter() -> None:
    z = Directions(parameters(40), 3, "gaussian").entry(4, 1, "p0").numpy()
    words = [int(word) for word in philox_words(3, 4, 1, 0, 3)]
    quarters = [word >> shift & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    assert np.array_equal(z, gaussian_table()[quarters[:40]])
    signs = Directions(parameters(300), 3, "rademacher").entry(4, 1, "p0").tolist()
    words = [int(word) for word in philox_words(3, 4, 1, 0, 2)]
    bits = [word >> shift & 1 for word in words for shift in range(64)]
    assert signs == [2.0 * bit - 1.0 for bit in bits[:300]]


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "sphere"])
@pytest.mark.parametrize("threads", [1, 2])
def test_entries_do_not_depend_on_how_they_are_cut(
    distribution: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    coefficients = {2: 0.3, 0: -1.7, 5: 0.01}
    directions = Directions(parameters(*SMALL), 1, distribution)
    vectors = {k: directions.vector(3, k) for k in coefficients}
    monkeypatch.setattr("peft_dpzero.perturbation.directions.PIECE_ENTRIES", 1 << 10)
    monkeypatch.setattr("peft_dpzero.perturbation.directions._CHUNK_ENTRIES", 1 << 12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    directions = Directions(parameters(*SMALL), 1, distribution)
    sums = {f"p{i}": torch.full((size,), torch.nan) for i, size in enumerate(SMALL)}
    directions.visit(3, coefficients, lambda name, part, total: sums[name][part].copy_(total))
    for name, total in sums.items():
        z = {k: directions.view(vector, name) for k, vector in vectors.items()}
        for k in coefficients:
            assert torch.equal(directions.entry(3, k, name), z[k])
            if z[k].numel() > 1 << 13:
                assert torch.equal(directions.entry(3, k, name, slice(1 << 12, 1 << 13)), z[k][1 << 12 : 1 << 13])
        assert torch.equal(total, z[2].mul(0.3).add(z[0].mul(-1.7)).add(z[5].mul(0.01)))


def test_an_error_in_a_thread_is_raised_when_all_have_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_dpzero.perturbation.directions._CHUNK_ENTRIES", 1 << 14)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    running: set[int] = set()

    def action(name: str, part: slice, z: torch.Tensor) -> None:
        running.add(part.start)
        if part.start == 1 << 15:
            raise ValueError("stop")
        running.discard(part.start)

    with pytest.raises(ValueError, match="stop"):
        Directions(parameters(1 << 20), 0, "gaussian").visit(0, {0: 1.0}, action)
    assert running == {1 << 15}


def test_parameters_never_share_entries() -> None:
    directions = Directions(parameters(13, 400_000, 5), 1, "gaussian")
    entries = torch.cat([directions.entry(0, 0, name) for name in ("p0", "p1", "p2")])
    groups = entries[: entries.numel() // 6 * 6].view(-1, 6)
    assert torch.unique(groups, dim=0).shape == groups.shape


@pytest.mark.parametrize("distribution", ["gaussian", "sphere"])
def test_gaussian_entries_are_gaussian(distribution: str) -> None:
    size = 400_000
    directions = Directions(parameters(size, size), 3, distribution)
    z = directions.entry(4, 1, "p0").numpy()
    # The steps of the distribution function are 2⁻¹⁶ high, far below the test's resolution of 1/√n.
    assert stats.kstest(z, "norm").pvalue > 1e-4
    assert abs(float(np.mean(z.astype(np.float64) ** 4)) - 3) < 0.1
    others = {
        "neighbor": z[1:],
        "same quarter of the next word": z[4:],
        "next block": z[16:],
        "direction": directions.entry(4, 2, "p0").numpy(),
        "step": directions.entry(5, 1, "p0").numpy(),
        "parameter": directions.entry(4, 1, "p1").numpy(),
        "seed": Directions(parameters(size), 4, distribution).entry(4, 1, "p0").numpy(),
    }
    for what, other in others.items():
        assert abs(np.corrcoef(z[: other.size], other)[0, 1]) < 5 / size**0.5, what
        assert abs(np.corrcoef(z[: other.size] ** 2, other**2)[0, 1]) < 5 / size**0.5, what


def test_rademacher_and_sphere() -> None:
    signs = Directions(parameters(100_000), 3, "rademacher").entry(0, 0, "p0")
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.02
    assert abs(np.corrcoef(signs[1:], signs[:-1])[0, 1]) < 0.02
    sphere = Directions(parameters(100, 23), 3, "sphere")
    z = torch.cat([sphere.entry(0, 0, "p0"), sphere.entry(0, 0, "p1")])
    assert float(z.double().norm()) == pytest.approx(123**0.5, rel=1e-6)


@pytest.mark.parametrize("layers", [[1], [0]])
def test_a_shared_trunk_changes_no_logit(layers: list[int]) -> None:
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], layers_to_transform=layers)
    model = get_peft_model(tiny_model("classifier"), lora).eval()
    perturbation = Perturbation(model)
    probe = Probe(model, torch.device("cpu"))
    trunk = find_trunk(model, perturbation, probe.run)
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


def test_nothing_is_shared_if_all_is_trained() -> None:
    model = tiny_model("causal_lm")
    assert find_trunk(model, Perturbation(model), Probe(model, torch.device("cpu")).run) is None


def test_with_a_prefix_what_reads_tokens_alone_is_shared() -> None:
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(tiny_model("causal_lm"), prefix).eval()
    trunk = find_trunk(model, Perturbation(model), Probe(model, torch.device("cpu")).run)
    assert trunk is not None
    layers = model.base_model.model.layers
    assert layers[0].self_attn.q_proj in trunk.modules
    assert not any(module in trunk.modules for module in layers[1].modules())
