"""Checks of what a release says of itself: each claim is made again from the journal and compared."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from dp_accounting import UnsupportedEventError
from huggingface_hub import ModelCard

from peft_dpzero.config import CONFIG_NAME
from peft_dpzero.mechanism.accountant import Accountant
from peft_dpzero.release.adapter import ADAPTER_CONFIG_NAME, comparable
from peft_dpzero.release.card import CARD_NAME
from peft_dpzero.release.evidence import OLDER, Evidence, Failed, Skipped
from peft_dpzero.release.header import CONFIG_SINCE_5
from peft_dpzero.release.ledger import plan_of
from peft_dpzero.release.numbers import rounded_up
from peft_dpzero.release.record import RECORD_VERSION
from peft_dpzero.release.statement import PRIVACY_HEADING, card_claims, card_statement

# How far a recomputed ε may lie from the recorded one: an accountant's versions differ in their last digits.
EPSILON_TOLERANCE = 1e-3
SAME_VERSION_TOLERANCE = 1e-6
# What a record says beside what its journal gives: hashes have checks of their own, and versions are not the journal's.
_BESIDE_THE_JOURNAL = ("epsilon", "versions", "journal", "weights", "files")
_VERSION = re.compile(r"[\w.+!-]{1,64}")


def guarantee(evidence: Evidence) -> str:
    """Noise was added and was secret."""
    record, remade = evidence.record, evidence.remade
    if remade["epsilon"] is None or record["epsilon"] is None:
        raise Failed(f"there is NO privacy guarantee ({remade['guarantee'].removeprefix('none: ')})")
    if not evidence.journal.count:
        return "nothing was released"
    delta = f", {record['delta']:g}" if record["delta"] else ""
    epsilon = rounded_up(record["epsilon"])
    budget = f"({epsilon:g}{delta})" if delta else f"{epsilon:g}"
    return f"the claim is {budget}-differential privacy, {record['neighboring']}, of each {record['privacy_unit']}"


def epsilon(evidence: Evidence) -> str:
    """The recorded ε is what the run's own accounting gives for the journal's σ, q and steps."""
    claimed, proven = _claimed(evidence), plan_of(evidence.segments).epsilon(evidence.journal.count)
    if not (math.isfinite(claimed) and math.isfinite(proven)):
        raise Failed(f"the record claims ε = {claimed:.6g}; the journal's numbers give {proven:.6g}: no guarantee")
    accountants = [side["accountant"].get("version") for side in (evidence.record, evidence.remade)]
    tolerance = SAME_VERSION_TOLERANCE if accountants[0] == accountants[1] else EPSILON_TOLERANCE
    if not abs(proven - claimed) <= tolerance * max(0.1, proven):
        raise Failed(f"the record claims ε = {claimed:.6g}; the journal's numbers give {proven:.6g}")
    return f"ε = {proven:.6g} follows from the journal's σ, q and steps, by {evidence.remade['accountant']['name']}"


def epsilon_by_rdp(evidence: Evidence) -> str:
    """A looser bound on the same ε, by other mathematics."""
    claimed, plan = _claimed(evidence), plan_of(evidence.segments)
    if plan.config.mechanism != "gaussian":
        raise Skipped("Rényi DP bounds no ε at δ = 0")
    try:
        bound = Accountant.of(plan.config).rdp_epsilon(plan.segments(evidence.journal.count))
    except UnsupportedEventError:
        raise Skipped("Rényi DP does not cover this mechanism under this relation") from None
    if not claimed <= bound * (1 + EPSILON_TOLERANCE):
        raise Failed(f"the record claims ε = {claimed:.6g}, more than this looser bound of {bound:.6g}")
    return f"ε ≤ {bound:.6g}, a looser bound by other mathematics"


def record(evidence: Evidence) -> str:
    """The record is what the journal gives, field by field."""
    noted, remade = evidence.record, evidence.remade
    if evidence.is_older or _is_older(noted):
        # What records have had since is not in it, and its own version is.
        remade = {key: value for key, value in remade.items() if key in noted}
        remade["format_version"] = min(int(noted["format_version"]), RECORD_VERSION)
    _same(_without_versions(noted), _without_versions(remade), "the record", "the journal")
    compared = set(remade) - set(_BESIDE_THE_JOURNAL)
    for version in (noted["accountant"].get("version", "0"), *noted["versions"].values()):
        if not (isinstance(version, str) and _VERSION.fullmatch(version)):
            raise Failed(f"{version!r} is no version")
    return f"all {len(compared)} fields are those that the journal gives; the named versions were not checked"


def config(evidence: Evidence) -> str:
    """`dpzero_config.json` holds the settings in the journal, σ aside if it was calibrated."""
    saved, wanted = evidence.json(CONFIG_NAME), dict(evidence.header["config"])
    saved = {key: "inf" if value == math.inf else value for key, value in saved.items()}
    if evidence.is_older:
        saved = {key: value for key, value in saved.items() if key in wanted or key not in CONFIG_SINCE_5}
        requested = {key: saved[key] for key in ("target_epsilon", "noise_multiplier")}
        if requested["noise_multiplier"] not in (None, wanted["noise_multiplier"]):
            raise Failed(f"noise_multiplier is {requested['noise_multiplier']} in it and another in the journal")
    else:
        requested = evidence.header["requested"]
        used = {key: wanted[key] for key in requested}
        calibrated = {"target_epsilon": None, "noise_multiplier": wanted["noise_multiplier"]}
        _same(used, calibrated if requested["noise_multiplier"] is None else requested, "the journal", "its request")
    _same(saved, wanted | requested, CONFIG_NAME, "the journal")
    target, plan = requested["target_epsilon"], plan_of(evidence.segments)
    spent = plan.epsilon(evidence.journal.count)
    if target is not None and math.isfinite(spent) and not spent <= target * (1 + EPSILON_TOLERANCE):
        raise Failed(f"ε = {spent:.6g} is more than its target_epsilon {target:g}")
    return f"{CONFIG_NAME} holds the settings that the journal names"


def adapter(evidence: Evidence) -> str:
    """`adapter_config.json` holds the adapter's configuration in the journal."""
    if evidence.is_older:
        raise Skipped(OLDER)
    noted, found = evidence.header["adapter"], ADAPTER_CONFIG_NAME in evidence.files
    if (noted is not None) != found:
        raise Failed(f"{ADAPTER_CONFIG_NAME} is {'there' if found else 'missing'}, against the journal")
    if noted is None:
        raise Skipped("the model was tuned without an adapter")
    _same(comparable(evidence.json(ADAPTER_CONFIG_NAME)), comparable(noted), ADAPTER_CONFIG_NAME, "the journal")
    return f"{ADAPTER_CONFIG_NAME} is what the journal names; the name of the base in it was not checked"


def card(evidence: Evidence) -> str:
    """The card says what the record says, in YAML and in words."""
    if _is_older(evidence.record):
        raise Skipped(OLDER)
    found = ModelCard.load(evidence.folder / CARD_NAME, ignore_metadata_errors=True)
    claims = found.data.to_dict().get("privacy")
    if not isinstance(claims, dict):
        raise Failed(f"{CARD_NAME} states no privacy")
    _same(claims, card_claims(evidence.record), CARD_NAME, "the record")
    text = "\n" + found.text.replace("\r\n", "\n") + "\n"
    if f"\n{card_statement(evidence.record).strip()}\n" not in text or text.count(PRIVACY_HEADING) != 1:
        raise Failed(f"{CARD_NAME} does not hold the record's statement, word for word and once")
    return f"{CARD_NAME} states the record, word for word; its other text was not checked"


def _is_older(record: Mapping[str, Any]) -> bool:
    return int(record["format_version"]) < RECORD_VERSION


def _claimed(evidence: Evidence) -> float:
    if evidence.record["epsilon"] is None:
        if evidence.remade["epsilon"] is not None:
            raise Failed(f"the record claims no ε; the journal's numbers give {evidence.remade['epsilon']:.6g}")
        raise Skipped("the record claims no ε")
    return float(evidence.record["epsilon"])


def _without_versions(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record and the one made again must share."""
    shared = {key: value for key, value in record.items() if key not in _BESIDE_THE_JOURNAL}
    accountant = {key: value for key, value in record["accountant"].items() if key != "version"}
    return shared | {"accountant": accountant}


def _same(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str, other: str) -> None:
    """Compares as JSON does, so that true is not 1 and NaN equals NaN.

    Raises:
        Failed: names the first key that differs.
    """
    for key in sorted({*found, *wanted}):
        if key not in found or key not in wanted:
            raise Failed(
                f"{key} is in {where if key in found else other} and not in {other if key in found else where}"
            )
        if json.dumps(found[key], sort_keys=True) != json.dumps(wanted[key], sort_keys=True):
            raise Failed(f"{key} is {found[key]!r} in {where} and {wanted[key]!r} in {other}")
