"""Do the processes of a run hold the same run? If not, it stops on all of them before anything is released.

Every process keeps each P-th unit of the same logical batch. Were the data in another order on one of them, an example
could join a batch twice; were N another, there would be two sample rates in one run. What is compared travels between
the run's own processes and nowhere else.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence

from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.batching import LogicalBatches
from peft_dpzero.mechanism.plan import PrivacyPlan
from peft_dpzero.perturbation.perturbation import Perturbation

Gather = Callable[[Mapping[str, str]], Sequence[Mapping[str, str]]]

_ORDER = "the order or content of the training data"
_PARAMETERS = "the trainable parameters"
_ADVICE = {
    _ORDER: "shuffle with a fixed seed, before training, and let transforms draw from no generator of their own",
    _PARAMETERS: "give every process the same model and adapter",
}
_SAME_ARGUMENTS = "give every process the same data set, DPZeroConfig and arguments"


def check_agreement(
    plan: PrivacyPlan, batches: LogicalBatches, perturbation: Perturbation, replayed: int, gather: Gather
) -> None:
    """Compares what the processes must have in common. Each calls it at the same point.

    Args:
        plan: the run's plan.
        batches: the run's private batches; some of its rows are read.
        perturbation: over the trainable parameters.
        replayed: releases that are applied again.
        gather: takes this process's facts to all processes, and returns those of all.

    Raises:
        DPZeroError: on every process; names what differs and the way out.
    """
    facts = gather(
        {
            **_settings(plan),
            "the releases made before": str(replayed),
            _PARAMETERS: _parameters(perturbation),
            _ORDER: batches.fingerprint(),
            "rank": str(batches.rank),
        }
    )
    differing = [name for name in facts[0] if name != "rank" and len({of_one.get(name) for of_one in facts}) > 1]
    if differing:
        advice = dict.fromkeys(_ADVICE.get(name, _SAME_ARGUMENTS) for name in differing)
        raise DPZeroError(
            f"The processes do not agree on {', '.join(differing)}, so an example could count more than once: "
            f"{'; '.join(advice)}."
        )
    if sorted(int(of_one["rank"]) for of_one in facts) != list(range(len(facts))):
        raise DPZeroError(
            "Two processes keep the same share of each batch: pass LogicalBatches(rank=accelerator.process_index)."
        )


def _settings(plan: PrivacyPlan) -> dict[str, str]:
    """The plan's fields, its config's among them."""
    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan) if field.name != "config"}
    # Processors may differ in the last digits of a calibrated σ, which only the first process uses.
    return {
        name: f"{value:.9g}" if isinstance(value, float) else repr(value)
        for name, value in (values | plan.config.to_dict()).items()
    }


def _parameters(perturbation: Perturbation) -> str:
    basis = None if perturbation.basis is None else perturbation.basis.digest()
    described = [basis, *((name, str(p.dtype), tuple(p.shape)) for name, p in perturbation.parameters.items())]
    return hashlib.sha256(repr(described).encode()).hexdigest()
