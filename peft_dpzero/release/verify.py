"""Does a release hold what it claims? Checked from its files alone, and with the base model by replaying it."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from peft_dpzero.errors import DPZeroError
from peft_dpzero.mechanism.contribution import Contributions
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.release import claims
from peft_dpzero.release.bundle import fetch_release, is_hashed, is_tolerated
from peft_dpzero.release.digests import (
    file_digest,
    files_digest,
    is_weights,
    model_files,
    parameters_digest,
    saved_tensors,
    start_digest,
)
from peft_dpzero.release.evidence import OLDER, Check, Evidence, Failed, Skipped
from peft_dpzero.release.frozen import frozen_digest
from peft_dpzero.release.header import segment_config
from peft_dpzero.release.journal import JournalSegment, continues
from peft_dpzero.release.plausibility import LEVEL, measured
from peft_dpzero.release.replay import replay_journal
from peft_dpzero.release.start import START_NAME


def verify(
    release: str | Path,
    base: str | Path | nn.Module | None = None,
    model_class: str | None = None,
    tolerance: float = 0.0,
) -> list[Check]:
    """Checks a release against itself, and against its base model if that is given.

    What no file can show is whether the code that ran drew its batches and its noise as the files say: a release that
    its maker forged consistently looks like an honest one.

    Args:
        release: a folder, or a Hub name.
        base: the base model's folder or Hub name, or the model as it was before training, which is changed in place.
            The journal is replayed on it and the weights compared.
        model_class: the base's class, `module:Class` or `file.py:Class`, if transformers does not have it.
        tolerance: how far replayed weights may lie from the saved ones, relative to each tensor's largest entry: 0
            on the kind of device that trained, about 1e-5 on another.

    Returns: one `Check` for each thing, in a fixed order. The release is consistent if none has failed.

    Raises:
        DPZeroError: there is no such release.
    """
    folder, files = fetch_release(release)
    evidence = Evidence(folder, files, base, model_class, tolerance)
    checks = []
    for name, check in _CHECKS:
        try:
            checks.append(Check(name, "ok", check(evidence)))
        except Skipped as skipped:
            checks.append(Check(name, "skipped", str(skipped)))
        except (Failed, DPZeroError) as failed:
            checks.append(Check(name, "FAILED", str(failed)))
        except Exception as error:
            # However a file is malformed, the answer is that it does not hold.
            checks.append(Check(name, "FAILED", f"a field is missing or malformed ({type(error).__name__}: {error})"))
    return checks


def _files(evidence: Evidence) -> str:
    if extra := [name for name in evidence.files if not is_tolerated(name)]:
        raise Failed(
            f"not part of a release: {', '.join(extra[:5])}{' …' if len(extra) > 5 else ''} (save_model to a new "
            "folder, or push_to_hub, leaves them out)"
        )
    return f"{len(evidence.files)} files, whose names all belong in a release"


def _hashes(evidence: Evidence) -> str:
    if evidence.is_older and "files" not in evidence.record:
        raise Skipped(OLDER)
    noted, found = evidence.record["files"], {name for name in evidence.files if is_hashed(name)}
    if not any(is_weights(name) for name in noted):
        # A journal's release, whose weights may have been made again since: the replay checks them.
        found = {name for name in found if not is_weights(name)}
    if found != set(noted):
        raise Failed(f"the record and the folder do not both have {', '.join(sorted(found ^ set(noted)))}")
    for name, checksum in noted.items():
        if file_digest(evidence.folder / name) != checksum:
            raise Failed(f"{name} is not the file that the record was made with")
    return f"{len(noted)} files are those that the record names, byte for byte; hashes can be made anew with a record"


def _journal(evidence: Evidence) -> str:
    journal, noted = evidence.journal, evidence.record["journal"]
    if journal.count != noted["entries"]:
        raise Failed(f"it holds {journal.count} releases; the record counts {noted['entries']}")
    if journal.checksum != noted["sha256"]:
        raise Failed("its lines verify, but it is not the journal that the record was made with")
    if not 0 <= evidence.record["weights"]["step"] <= journal.count:
        raise Failed("the record counts more releases in the weights than it holds")
    step = 0
    for segment in journal.segments:
        if segment.header["first_step"] != step:
            raise Failed("a segment does not begin where the one before it ends")
        step += len(segment.entries)
        if step > segment.header["steps"]:
            raise Failed("it holds more releases than were planned")
        _check_entries(segment)
    headers = [segment.header for segment in journal.segments]
    if not all(continues(*pair) for pair in itertools.pairwise(headers)):
        raise Failed("its segments have other settings than a continued run may change")
    return f"{journal.count} releases in an unbroken chain, which anybody can make anew"


def _check_entries(segment: JournalSegment) -> None:
    config = segment_config(segment)
    contributions = Contributions(config, segment.header["loss_interval"])
    for entry in segment.entries:
        if entry.direction_seed != config.direction_seed:
            raise Failed("an entry has another direction seed than the settings")
        if len(entry.values) != contributions.width(entry.step):
            raise Failed(f"step {entry.step} released {len(entry.values)} values, against the settings")
        if config.is_private and not all(type(value) is int for value in entry.values):
            raise Failed(f"step {entry.step} released values that are not integers")


def _scale(evidence: Evidence) -> str:
    scale = measured(evidence.segments)
    if scale is None:
        raise Skipped("no noise was added that the released values could be measured by")
    if scale.too_small:
        raise Failed(
            f"the released values are smaller than the noise alone would make them (by Σ, {scale.total:.4g} against "
            f"{scale.least:.4g}; an honest run fails with probability {LEVEL:g})"
        )
    if scale.too_large:
        raise Failed(
            f"step {scale.step} released {scale.excess:.3g} times the most that clipped units and noise of the "
            f"stated size can add up to (an honest run fails with probability {LEVEL:g})"
        )
    return (
        f"the values are neither smaller than the stated noise nor larger than clipped units and it, each at level "
        f"{LEVEL:g} ({scale.excess:.2g} of the bound at most); numbers of that size can be made without noise"
    )


def _start(evidence: Evidence) -> str:
    path = evidence.folder / START_NAME
    if not path.exists():
        raise Skipped("the run starts at the base model itself; give --base")
    header = evidence.segments[0].header
    if start_digest(load_file(path), [name for name, _, _ in header["trainable"]]) != header["start"]:
        raise Failed(f"{START_NAME} is not the start that the journal names")
    return f"{START_NAME} is the start that the journal names; that it was drawn before data was read is not shown"


def _weights(evidence: Evidence) -> str:
    noted, found = evidence.record["weights"]["file_sha256"], files_digest(evidence.folder)
    if found is None and noted is None:
        raise Skipped("this release is a journal: replay makes the weights")
    if noted is None:
        raise Skipped("the record was made for the journal alone; give --base")
    if found != noted:
        raise Failed("the weights are not those that the record was made with")
    return "the weights are those that the record names"


def _base(evidence: Evidence) -> str:
    if evidence.base is None:
        raise Skipped("give --base to compare it with the one that was trained on")
    header = evidence.segments[0].header
    if evidence.is_older:
        raise Skipped(OLDER)
    noted = header["frozen"]
    if noted["sha256"] is None:
        raise Skipped(f"not hashed in training: {noted['reason']}")
    try:
        found = frozen_digest(evidence.model, [name for name, _, _ in header["trainable"]], noted)
    except ValueError as unreadable:
        raise Skipped(f"cannot be hashed here: {unreadable}") from None
    if found != noted["sha256"]:
        raise Failed("its frozen weights are not those that the journal names: another base, or another head")
    return "its frozen weights are those that the journal names"


def _replay(evidence: Evidence) -> str:
    if evidence.base is None:
        raise Skipped("give --base to make the weights again from the journal")
    folder, model = evidence.folder, evidence.model
    noted = evidence.record["weights"]
    replay_journal(model, folder, noted["step"])
    exact = parameters_digest(Perturbation(model)) == noted["parameters_sha256"]
    if not exact and not (model_files(folder) and evidence.tolerance):
        raise Failed("the journal gives other weights than the record names (another kind of device? see --tolerance)")
    with tempfile.TemporaryDirectory() as made:
        model.save_pretrained(made)  # type: ignore[operator]
        furthest = _distance(folder, Path(made)) if model_files(folder) else 0.0
    if not furthest <= evidence.tolerance:
        raise Failed(f"the saved weights lie up to {furthest:.2g} (relative) from those that the journal gives")
    how = "bit for bit" if furthest == 0 else f"within {furthest:.2g} (relative)"
    return f"the weights are a function of base, start and {noted['step']} releases, {how}"


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


_CHECKS: tuple[tuple[str, Callable[[Evidence], str]], ...] = (
    ("files", _files),
    ("hashes", _hashes),
    ("guarantee", claims.guarantee),
    ("ε", claims.epsilon),
    ("ε by RDP", claims.epsilon_by_rdp),
    ("record", claims.record),
    ("config", claims.config),
    ("adapter", claims.adapter),
    ("card", claims.card),
    ("journal", _journal),
    ("scale", _scale),
    ("start", _start),
    ("weights", _weights),
    ("base", _base),
    ("replay", _replay),
)
