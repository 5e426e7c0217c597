"""Every field of every file, edited one at a time: each edit is told, also if all hashes are made anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft_dpzero.release.statement import card_claims, card_statement

from release.releases import (
    ADAPTER,
    CARD,
    CONFIG,
    JOURNAL,
    RECORD,
    change_at,
    edit,
    edit_journal,
    failures,
    paths_to,
    read,
    reseal,
    trained,
)

RUNS: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "calibrated": {"target_epsilon": 3.0, "noise_multiplier": None, "privacy_unit": "user"},
    "laplace": {"mechanism": "laplace", "target_delta": 0, "num_directions": 1},
    "private loss": {"train_loss": "private", "clipping": "adaptive"},
}


@pytest.fixture(scope="module", params=RUNS)
def honest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    trained(folder, **RUNS[request.param])
    return folder


def uncaught(
    honest: Path, folder: Path, paths: list[tuple[Any, ...]], tamper: Callable[[Path, Any], Any], base: bool = False
) -> list[tuple[Any, ...]]:
    """The `paths` that `tamper` can change without a check failing."""
    missed = []
    for path in paths:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(honest / "release", folder)
        tamper(folder, path)
        if not failures(folder, honest / "base" if base else None):
            missed.append(path)
    return missed


def test_an_honest_release_passes_every_check(honest: Path) -> None:
    assert not failures(honest / "release", honest / "base")


def test_every_field_of_the_record_is_compared(honest: Path, tmp_path: Path) -> None:
    record = read(honest / "release" / RECORD)

    def tamper(folder: Path, path: Any) -> None:
        edit(folder / RECORD, lambda content: change_at(content, path))

    missed = uncaught(honest, tmp_path / "edited", paths_to(record), tamper)
    versions = {("versions", name) for name in record["versions"]} | {("accountant", "version")}
    # With the base, replay compares these.
    replayed = {("weights", "parameters_sha256"), ("weights", "step")}
    assert set(missed) <= versions | replayed
    assert not uncaught(honest, tmp_path / "edited", sorted(replayed), tamper, base=True)
    removed = uncaught(honest, tmp_path / "edited", list(record), lambda f, k: edit(f / RECORD, lambda c: c.pop(k)))
    assert not removed
    edit(tmp_path / "edited" / RECORD, lambda content: content.update(record, audited_by="nobody"))
    assert "record" in failures(tmp_path / "edited")


@pytest.mark.parametrize("version", ["1.0 (certified)", "1\n\n**No ε**", 3, None])
def test_a_version_is_no_place_for_words(version: Any, honest: Path, tmp_path: Path) -> None:
    shutil.copytree(honest / "release", tmp_path / "edited")
    edit(tmp_path / "edited" / RECORD, lambda content: content["versions"].update(torch=version))
    assert failures(tmp_path / "edited") == {"record"}


@pytest.mark.parametrize("epsilon", [0.001, float("inf"), float("nan"), -1.0, "4", None])
def test_an_epsilon_that_does_not_follow_is_told_also_with_a_fitting_card(
    epsilon: Any, honest: Path, tmp_path: Path
) -> None:
    release = tmp_path / "edited"
    shutil.copytree(honest / "release", release)
    before = read(release / RECORD)
    edit(release / RECORD, lambda content: content.update(epsilon=epsilon))
    text = (release / CARD).read_text()
    after = before | {"epsilon": epsilon}
    claimed = f"epsilon: {card_claims(before)['epsilon']!r}"
    assert claimed in text
    text = text.replace(claimed, f"epsilon: {epsilon}")
    if isinstance(epsilon, float):
        assert card_statement(before) in text
        text = text.replace(card_statement(before), card_statement(after))
    (release / CARD).write_text(text)
    assert "ε" in failures(release)


def test_every_setting_is_compared(honest: Path, tmp_path: Path) -> None:
    def tamper(folder: Path, path: Any) -> None:
        edit(folder / CONFIG, lambda content: change_at(content, path))
        reseal(folder)

    assert not uncaught(honest, tmp_path / "edited", paths_to(read(honest / "release" / CONFIG)), tamper)


@pytest.mark.parametrize("honest", ["calibrated"], indirect=True)
def test_more_spent_than_was_asked_for_is_told(honest: Path, tmp_path: Path) -> None:
    release = shutil.copytree(honest / "release", tmp_path / "edited")
    edit(release / CONFIG, lambda content: content.update(target_epsilon=0.1))
    edit_journal(release, lambda lines: lines[0]["header"]["requested"].update(target_epsilon=0.1))
    assert failures(release) == {"config"}


def test_every_field_of_the_adapters_configuration_is_compared(honest: Path, tmp_path: Path) -> None:
    def tamper(folder: Path, path: Any) -> None:
        edit(folder / ADAPTER, lambda content: change_at(content, path))
        reseal(folder)

    def untold(folder: Path, path: Any) -> None:
        edit(folder / ADAPTER, lambda content: change_at(content, path))

    paths = paths_to(read(honest / "release" / ADAPTER))
    of_the_file = {
        (key,) for key in ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")
    }
    assert set(uncaught(honest, tmp_path / "edited", paths, tamper)) <= of_the_file
    assert not uncaught(honest, tmp_path / "edited", paths, untold), "its hash covers the rest"


def test_every_field_of_the_header_is_compared(honest: Path, tmp_path: Path) -> None:
    header = json.loads((honest / "release" / JOURNAL).read_bytes().splitlines()[0])["header"]

    def tamper(folder: Path, path: Any) -> None:
        edit_journal(folder, lambda lines: change_at(lines[0]["header"], path))

    missed = set(uncaught(honest, tmp_path / "edited", paths_to(header), tamper, base=True))
    # The interval of released losses means nothing where none is released, and no name is in an empty table.
    allowed = {("frozen", "other_dtypes")}
    if header["config"]["train_loss"] != "private":
        allowed.add(("loss_interval",))
    assert missed <= allowed


def test_every_line_of_the_cards_statement_is_compared(honest: Path, tmp_path: Path) -> None:
    record = read(honest / "release" / RECORD)
    lines = [line for line in card_statement(record).splitlines() if line]

    def reworded(folder: Path, line: str) -> None:
        text = (folder / CARD).read_text()
        assert line in text
        (folder / CARD).write_text(text.replace(line, line + " (audited)"))

    def restated(folder: Path, key: str) -> None:
        text = (folder / CARD).read_text()
        front, rest = text.split("\n---\n", 1)
        start = front.index(f"  {key}: ")
        (folder / CARD).write_text(front[:start] + f"  {key}: 0.5\n  _" + front[start + 2 :] + "\n---\n" + rest)

    assert not uncaught(honest, tmp_path / "edited", lines, reworded)
    assert not uncaught(honest, tmp_path / "edited", list(card_claims(record)), restated)
    (tmp_path / "edited" / CARD).write_text((honest / "release" / CARD).read_text() + "\n## Privacy\n\nε = 0.1\n")
    assert failures(tmp_path / "edited") == {"card"}
