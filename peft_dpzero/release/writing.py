"""What is written beside a saved model: its configuration, journal, picture, record and card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_dpzero.config import DPZeroConfig
from peft_dpzero.modules import unwrapped
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.release.base_name import base_name, name_base
from peft_dpzero.release.bundle import copy_evidence, with_digests
from peft_dpzero.release.card import card_fields, save_card
from peft_dpzero.release.journal import Journal
from peft_dpzero.release.picture import save_picture
from peft_dpzero.release.record import save_record


def save_beside(
    folder: Path,
    config: DPZeroConfig,
    record: dict[str, Any],
    journal: Journal | None,
    perturbation: Perturbation,
    step: int | None = None,
    **card_data: Any,
) -> None:
    """Makes a saved model a release.

    Args:
        folder: where the model was saved.
        config: the run's, with what was chosen filled in.
        record: from `privacy_record`.
        journal: the run's; None on a process that has none.
        perturbation: over the model that was saved.
        step: how many releases its weights are made of; None for all.
        card_data: see `save_card`.

    Raises:
        DPZeroError: `card_data` names a base that is not on the Hub, or figures that are none.
    """
    model: Any = perturbation.model
    fields = card_fields(card_data)
    base = base_name(model, fields.pop("base_model", None))
    name_base(folder, base)
    inner = unwrapped(model)
    if hasattr(inner, "can_generate") and inner.can_generate():
        inner.generation_config.save_pretrained(folder)
    config.save_pretrained(folder)
    save_picture(record, folder)
    if journal is not None:
        copy_evidence(journal, folder)
        record = with_digests(record, folder, journal, perturbation, step)
    save_record(record, folder)
    save_card(record, folder, model, base_model=base, **fields)
