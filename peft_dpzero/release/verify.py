"""Does a release hold what it claims? Checked from its files alone, and with the base model by replaying it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from dp_accounting import UnsupportedEventError
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import nn

from peft_dpzero.config import DPZeroConfig
from peft_dpzero.errors import DPZeroError
from peft_dpzero.mechanism.accountant import Segment, epsilon_of, rdp_epsilon_of
from peft_dpzero.perturbation import Perturbation
from peft_dpzero.release.base import load_start_model
from peft_dpzero.release.bundle import fetch_release, is_released
from peft_dpzero.release.card import CARD_NAME
from peft_dpzero.release.digests import digest, files_digest, model_files, parameters_digest, saved_tensors
from peft_dpzero.release.header import releases, segment_config
from peft_dpzero.release.journal import JOURNAL_NAME, JournalContent, read_journal
from peft_dpzero.release.record import RECORD_NAME
from peft_dpzero.release.replay import replay_journal
from peft_dpzero.release.start import START_NAME

# How far a recomputed ε may lie from the recorded one: accountants differ in their last digits between versions.
EPSILON_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: what.
        status: "ok", "FAILED" or "skipped".
        reason: what was found, in words.
    """

    name: str
    status: str
    reason: str


class Failed(Exception):
    """A check that failed. The text is its reason."""


class Skipped(Exception):
    """A check that could not be made. The text is its reason."""


def verify(
    release: str | Path,
    base: str | Path | nn.Module | None = None,
    model_class: str | None = None,
    tolerance: float = 0.0,
) -> list[Check]:
    """Checks a release against itself, and against its base model if that is given.

    Args:
        release: a folder, or a Hub name.
        base: the base model's folder or Hub name, or the model as it was before training, which is changed in place.
            The journal is replayed on it and the weights compared.
        model_class: the base's class, `module:Class` or `file.py:Class`, if transformers does not have it.
        tolerance: how far replayed weights may lie from the saved ones, relative to each tensor's largest entry: 0
            on the kind of device that trained, about 1e-5 on another.

    Returns: one `Check` for each thing, in a fixed order. The release holds what it claims if none has failed.

    Raises:
        DPZeroError: there is no such release.
    """
    folder, files = fetch_release(release)
    evidence = _Evidence(folder, files, base, model_class, tolerance)
    checks = []
    for name, check in _CHECKS:
        try:
            checks.append(Check(name, "ok", check(evidence)))
        except Skipped as skipped:
            checks.append(Check(name, "skipped", str(skipped)))
        except (Failed, DPZeroError) as failed:
            checks.append(Check(name, "FAILED", str(failed)))
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            checks.append(Check(name, "FAILED", f"a field is missing or malformed ({type(error).__name__}: {error})"))
    return checks


@dataclass
class _Evidence:
    folder: Path
    files: list[str]
    base: str | Path | nn.Module | None
    model_class: str | None
    tolerance: float

    @cached_property
    def record(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / RECORD_NAME).read_text(encoding="utf-8")))

    @cached_property
    def journal(self) -> JournalContent:
        return read_journal(self.folder / JOURNAL_NAME)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(Segment(**segment) for segment in self.record["segments"])


def _files(evidence: _Evidence) -> str:
    if extra := [name for name in evidence.files if not is_released(name)]:
        raise Failed(
            f"not part of a release: {', '.join(extra[:5])}{' …' if len(extra) > 5 else ''} (save_model to a new "
            "folder, or push_to_hub, leaves them out)"
        )
    return f"{len(evidence.files)} files, all of which belong in a release"


def _guarantee(evidence: _Evidence) -> str:
    record = evidence.record
    noiseless = any(segment.noise_multiplier <= 0 for segment in evidence.segments)
    if record["epsilon"] is None or record["deterministic"] or noiseless:
        raise Failed(f"there is NO privacy guarantee ({record['guarantee'].removeprefix('none: ')})")
    if not evidence.segments:
        return "nothing was released"
    return f"({record['epsilon']:.4g}, {record['delta']:g})-differential privacy, {record['neighboring']}"


def _epsilon_by_pld(evidence: _Evidence) -> str:
    claimed = _claimed(evidence)
    proven = epsilon_of(evidence.segments, evidence.record["delta"], evidence.record["neighboring"])
    if abs(proven - claimed) > EPSILON_TOLERANCE * max(1.0, proven):
        raise Failed(f"the record claims ε = {claimed:.6g}; its own numbers give {proven:.6g}")
    return f"ε = {proven:.6g}, as recorded"


def _epsilon_by_rdp(evidence: _Evidence) -> str:
    claimed = _claimed(evidence)
    try:
        bound = rdp_epsilon_of(evidence.segments, evidence.record["delta"], evidence.record["neighboring"])
    except UnsupportedEventError:
        raise Skipped("Rényi DP does not cover this mechanism under this relation") from None
    if claimed > bound * (1 + EPSILON_TOLERANCE):
        raise Failed(f"the record claims ε = {claimed:.6g}, more than this looser bound of {bound:.6g}")
    return f"ε ≤ {bound:.6g}, a looser bound than PLD's"


def _claimed(evidence: _Evidence) -> float:
    if evidence.record["epsilon"] is None:
        raise Skipped("the record claims no ε")
    return float(evidence.record["epsilon"])


def _record(evidence: _Evidence) -> str:
    record, last = evidence.record, evidence.segments[-1:]
    for segment in last:
        _same(
            record, {"noise_multiplier": segment.noise_multiplier, "sample_rate": segment.sample_rate}, "its segments"
        )
    _same(record, {"steps": sum(segment.steps for segment in evidence.segments)}, "its segments")
    return f"{record['steps']} releases in {len(evidence.segments)} segment(s)"


_SHARED = (
    "neighboring",
    "deterministic",
    "clipping_threshold",
    "num_directions",
    "smoothing_parameter",
    "difference",
    "direction_distribution",
    "direction_seed",
    "train_loss",
)


def _config(evidence: _Evidence) -> str:
    config = DPZeroConfig.from_pretrained(evidence.folder)
    _same(evidence.record, {name: getattr(config, name) for name in _SHARED}, "dpzero_config.json")
    _same(evidence.record, {"delta": config.target_delta}, "dpzero_config.json")
    if config.noise_multiplier is not None:
        _same(evidence.record, {"noise_multiplier": config.noise_multiplier}, "dpzero_config.json")
    spent = evidence.record["epsilon"]
    if config.target_epsilon is not None and spent is not None and spent > config.target_epsilon * (1 + 1e-6):
        raise Failed(f"ε = {spent:.6g} is more than dpzero_config.json's target_epsilon {config.target_epsilon:g}")
    return "record and dpzero_config.json agree"


def _card(evidence: _Evidence) -> str:
    card = ModelCard.load(evidence.folder / CARD_NAME, ignore_metadata_errors=True)
    claims = card.data.to_dict().get("privacy")
    if not isinstance(claims, dict):
        raise Failed(f"{CARD_NAME} states no privacy")
    for key, value in claims.items():
        if evidence.record.get(key) != value:
            raise Failed(f"{CARD_NAME} says {key} = {value}, the record {evidence.record.get(key)}")
    return f"record and {CARD_NAME} agree"


def _journal(evidence: _Evidence) -> str:
    journal, noted = evidence.journal, evidence.record["journal"]
    count = len(journal.entries)
    if count != evidence.record["steps"] or count != noted["entries"]:
        raise Failed(f"it holds {count} releases; the record counts {evidence.record['steps']}")
    if journal.checksum != noted["sha256"]:
        raise Failed("its lines verify, but it is not the journal that the record was made with")
    return f"{count} releases in an unbroken chain, the one that the record names"


def _journal_settings(evidence: _Evidence) -> str:
    segments = [segment for segment in evidence.journal.segments if segment.entries]
    if releases(segments) != evidence.segments:
        raise Failed(f"σ, q or steps of its segments are {releases(segments)}, the record's {evidence.segments}")
    for segment in segments:
        config = segment_config(segment)
        _same(evidence.record, {name: getattr(config, name) for name in _SHARED}, "the journal")
        _same(evidence.record, {"delta": config.target_delta}, "the journal")
        if any(entry.direction_seed != config.direction_seed for entry in segment.entries):
            raise Failed("an entry has another direction seed than the settings")
        if segment.header["first_step"] + len(segment.entries) > segment.header["steps"]:
            raise Failed("it holds more releases than were planned")
    return "its settings are the record's"


def _start(evidence: _Evidence) -> str:
    path = evidence.folder / START_NAME
    if not path.exists():
        raise Skipped("the run starts at the base model itself; give --base")
    header = evidence.journal.segments[0].header
    tensors = load_file(path)
    if digest((name, tensors[name]) for name, _, _ in header["trainable"]) != header["start"]:
        raise Failed(f"{START_NAME} is not the start that the journal names")
    return f"{START_NAME} is the start that the journal names"


def _weights(evidence: _Evidence) -> str:
    noted, found = evidence.record["weights"]["file_sha256"], files_digest(evidence.folder)
    if found is None and noted is None:
        raise Skipped("this release is a journal: replay makes the weights")
    if noted is None:
        raise Skipped("the record was made for the journal alone; give --base")
    if found != noted:
        raise Failed("the weights are not those that the record was made with")
    return "the weights are those that the record names"


def _replay(evidence: _Evidence) -> str:
    base, folder = evidence.base, evidence.folder
    if base is None:
        raise Skipped("give --base to make the weights again from the journal")
    model = base if isinstance(base, nn.Module) else load_start_model(base, folder, evidence.model_class)
    noted = evidence.record["weights"]
    replay_journal(model, folder, noted["step"])
    exact = parameters_digest(Perturbation(model)) == noted["parameters_sha256"]
    if not exact and not (model_files(folder) and evidence.tolerance):
        raise Failed("the journal gives other weights than the record names (another kind of device? see --tolerance)")
    with tempfile.TemporaryDirectory() as made:
        model.save_pretrained(made)  # type: ignore[operator]
        furthest = _distance(folder, Path(made)) if model_files(folder) else 0.0
    if furthest > evidence.tolerance:
        raise Failed(f"the saved weights lie up to {furthest:.2g} (relative) from those that the journal gives")
    how = "bit for bit" if furthest == 0 else f"within {furthest:.2g} (relative)"
    return f"base and {noted['step']} releases give the weights, {how}"


def _distance(saved: Path, made: Path) -> float:
    """The largest difference between two saved models, each tensor's relative to its largest entry."""
    ours, theirs = dict(saved_tensors(model_files(made))), dict(saved_tensors(model_files(saved)))
    if {k: (v.shape, v.dtype) for k, v in ours.items()} != {k: (v.shape, v.dtype) for k, v in theirs.items()}:
        raise Failed("the weight files hold other tensors than the replayed model")
    furthest = 0.0
    for name, tensor in ours.items():
        if not torch.equal(tensor, theirs[name]):
            wide, other = tensor.double(), theirs[name].double()
            furthest = max(furthest, float((wide - other).abs().max() / wide.abs().max().clamp(min=1e-30)))
    return furthest


def _same(record: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    for key, value in wanted.items():
        value = None if value == float("inf") else value
        if record[key] != value:
            raise Failed(f"{key} is {record[key]} in the record and {value} in {where}")


_CHECKS: tuple[tuple[str, Callable[[_Evidence], str]], ...] = (
    ("files", _files),
    ("guarantee", _guarantee),
    ("ε by PLD", _epsilon_by_pld),
    ("ε by RDP", _epsilon_by_rdp),
    ("record", _record),
    ("config", _config),
    ("card", _card),
    ("journal", _journal),
    ("journal settings", _journal_settings),
    ("start", _start),
    ("weights", _weights),
    ("replay", _replay),
)
