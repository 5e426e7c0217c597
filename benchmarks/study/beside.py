"""How much more accurate ours is than other methods, seed by seed: a seed has one start, which all methods share."""

from __future__ import annotations

import tables

from .cells import Budget
from .methods import METHODS
from .results import Result
from .summary import Groups, Spread

# The first of them that was run is compared with others.
OURS = ("ours", "ours-no-public")


def differences(groups: Groups, budget: Budget) -> str | None:
    """Points of a hundred by which ours is ahead, by method and ε: mean ± standard deviation (seeds that both have).

    Methods without an ε are compared at each. None if there is nothing to compare.

    Args:
        groups: of one model and task.
        budget: of the runs that are compared.
    """
    found = {(key.method, key.epsilon): results for key, results in groups.items() if key.budget == budget}
    ran = {method for method, _ in found}
    first = next((name for name in OURS if name in ran), None)
    epsilons = sorted(epsilon for name, epsilon in found if name == first and epsilon is not None)
    rows = [
        [method.title, *(_ahead(found[first, e], found.get((name, e if method.private else None))) for e in epsilons)]
        for name, method in METHODS.items()
        if first is not None and name in ran - {first}
    ]
    return tables.table(["ours ahead of", *(f"ε = {epsilon:g}" for epsilon in epsilons)], rows) if rows else None


def _ahead(ours: list[Result], others: list[Result] | None) -> str:
    accuracies = {result["cell"]["seed"]: result["accuracy"] for result in others or ()}
    pairs = [(result["accuracy"], accuracies.get(result["cell"]["seed"])) for result in ours]
    apart = [one - other for one, other in pairs if None not in (one, other)]
    return Spread.of(apart).shown(100) if apart else "–"
