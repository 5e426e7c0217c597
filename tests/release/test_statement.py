"""What a record and a card say of a run, word for word."""

from __future__ import annotations

from typing import Any

import pytest
from peft_dpzero import make_plan
from peft_dpzero.release.record import privacy_record
from peft_dpzero.release.statement import card_statement

from tiny import config


def recorded(**changes: Any) -> dict[str, Any]:
    return privacy_record(make_plan(config(**changes), 64, 4, 5), steps=5)


STATED: list[tuple[dict[str, Any], str]] = [
    (
        {},
        """Training satisfies **(1, 1e-05)-differential privacy** for every single training example.

Neighboring data sets are data sets that differ by the presence of one training example (`add_or_remove_one`). \
For any two of them and any set of outcomes, the probabilities of that set differ by a factor of at most e^ε = 2.719, \
up to δ = 1e-05. The privacy unit is one example: somebody who contributed several is protected less.

In plain words: had one training example been left out, the chance of anything that somebody can learn from this \
release would have been larger or smaller by a factor of at most e^ε = 2.719, give or take δ = 1e-05.
""",
    ),
    (
        {"neighboring": "replace_one"},
        """Training satisfies **(1, 1e-05)-differential privacy** for every single training example.

Neighboring data sets are data sets of equal size that differ in the content of one training example (`replace_one`). \
For any two of them and any set of outcomes, the probabilities of that set differ by a factor of at most e^ε = 2.719, \
up to δ = 1e-05. The privacy unit is one example: somebody who contributed several is protected less.

In plain words: had one training example other content, the chance of anything that somebody can learn from this \
release would have been larger or smaller by a factor of at most e^ε = 2.719, give or take δ = 1e-05.
""",
    ),
    (
        {"privacy_unit": "user", "neighboring": "replace_one", "mechanism": "laplace", "target_delta": 0},
        """Training satisfies **1-differential privacy** for all examples of one `user` together.

Neighboring data sets are data sets of equal size that differ in the content of all the examples of one `user` \
(`replace_one`). For any two of them and any set of outcomes, the probabilities of that set differ by a factor of at \
most e^ε = 2.719. The privacy unit is one value of `user`, however many examples it has.

In plain words: had all the examples of one `user` other content, the chance of anything that somebody can learn from \
this release would have been larger or smaller by a factor of at most e^ε = 2.719.
""",
    ),
]


@pytest.mark.parametrize(("changes", "stated"), STATED)
def test_a_card_says_what_holds_between_which_neighbors(changes: dict[str, Any], stated: str) -> None:
    directions = {"num_directions": 1} if "mechanism" in changes else {}
    statement = card_statement(recorded(**changes, **directions) | {"epsilon": 1.0})
    assert statement.startswith(f"## Privacy\n\n{stated}\n")


def test_what_the_user_vouched_for_is_said_and_is_a_gap() -> None:
    asserted, tried = recorded(rows_asserted_independent=True), recorded()
    assert asserted["row_independence"] == "asserted by the user"
    assert tried["row_independence"] == "by construction"
    (gap,) = set(asserted["not_covered"]) - set(tried["not_covered"])
    assert gap == "that rows do not reach each other in the model or the loss, which the user asserted"
    assert f"- {gap}\n" in card_statement(asserted)
    assert "asserted" not in card_statement(tried)
