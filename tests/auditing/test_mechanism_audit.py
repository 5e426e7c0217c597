"""The mechanism under attack by worst-case canaries, in thousands of runs of the real sampler and the real sum.

δ is large and σ small beside what training uses, on purpose: at δ = 1e-5 the claim is about events that a few
thousand runs never show, and no test could come near it. At δ = 0.1 the likelihood-ratio test comes within a few per
cent of the claim, so that a mechanism that leaks a little more than it says is caught.
"""

from __future__ import annotations

import pytest
from peft_dpzero.mechanism.accountant import Accountant, Segment

from attackers import audited_epsilon

REPETITIONS = 3
SCENARIOS = {
    "one release": {"sample_rate": 1.0, "steps": 1, "sigma": 0.7},
    "one release of a sample": {"sample_rate": 0.5, "steps": 1, "sigma": 0.4},
    "four releases of samples": {"sample_rate": 0.5, "steps": 4, "sigma": 0.8},
}
DELTA = 0.1
ACCOUNTANT = Accountant("add_or_remove_one", DELTA, "gaussian")
RUNS = 7500
# 95 % for all repetitions of all scenarios at once.
CONFIDENCE = 1 - 0.05 / (REPETITIONS * len(SCENARIOS))


@pytest.mark.parametrize("repetition", range(REPETITIONS))
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_lower_bound_lies_below_the_claim_and_above_half_of_it(scenario: str, repetition: int) -> None:
    values = SCENARIOS[scenario]
    claim = ACCOUNTANT.epsilon([Segment(values["sigma"], values["sample_rate"], int(values["steps"]))])
    found = audited_epsilon(values["sample_rate"], int(values["steps"]), values["sigma"], DELTA, CONFIDENCE, count=RUNS)
    assert claim / 2 < found < claim
