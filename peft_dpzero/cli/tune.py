"""`peft-dpzero tune`: settings for a run, from public or made-up rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from rich.console import Console
from rich.table import Table

from peft_dpzero.cli.explain import explained
from peft_dpzero.cli.settings import read_settings, read_yaml, source
from peft_dpzero.cli.train import TrainingRun
from peft_dpzero.config import DPZeroConfig
from peft_dpzero.errors import DPZeroError, withheld
from peft_dpzero.public.settings import SIGNAL_SHARE
from peft_dpzero.training.settling import Measured

# Settings, and where TrainingArguments have them.
_ARGUMENTS = {
    "expected_batch_size": "per_device_train_batch_size",
    "steps": "max_steps",
    "learning_rate": "learning_rate",
}


def tune_command(
    config: Annotated[Path, typer.Argument(help="The run in YAML, as for train.")],
    public: Annotated[
        str | None,
        typer.Option(help="Public text in the run's columns, in place of data.public; else rows are made up."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="How long training may take here; by default the run's, or 5.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where the run goes in YAML, settings filled in.")] = None,
) -> None:
    """Suggests settings for a run and tells what they give. Of the training data it uses the number of rows alone."""
    if output is not None and output.exists():
        raise DPZeroError(f"{output} exists: name another --output.")
    if output is not None and output.resolve().parent != config.resolve().parent:
        raise DPZeroError(f"--output must lie beside {config}: relative paths in it are resolved against its folder.")
    settings = read_settings(config)
    if public is not None:
        public = source("--public", public, Path.cwd())
        settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, public=public))
    trainer = TrainingRun(settings, tuning=True).trainer()
    with withheld("measuring"):
        measured = trainer.tune_on(minutes=minutes)
    console = Console()
    console.print(measured_table(measured, settings.dpzero))
    if output is not None:
        with explained(f"{output} cannot be written"):
            filled = yaml.safe_dump(_filled(config, measured, public), sort_keys=False, allow_unicode=True)
            output.write_text(filled, encoding="utf-8")
        console.print(f"Written to {output}", soft_wrap=True, highlight=False)


def measured_table(measured: Measured, config: DPZeroConfig) -> Table:
    """What was measured, and the settings that follow."""
    settings, slopes, choice = measured.settings, measured.slopes, measured.choice
    assert choice is not None
    assert measured.seconds_a_step is not None
    steps = settings.steps or choice.steps
    directions = choice.num_directions
    tenth, median, ninetieth = (float(q * np.sqrt(directions)) for q in np.quantile(slopes.sizes, (0.1, 0.5, 0.9)))
    variance = choice.variance
    table = Table(show_header=False, title=f"measured on {settings.source}")
    rows: dict[str, Any] = {
        "norm of a row's K differences: 10 %, 50 %, 90 %": f"{tenth:.3g}, {median:.3g}, {ninetieth:.3g}",
        "slopes at two neighboring λ differ by": f"{slopes.disagreement:.2%}",
        "seconds a step": f"{measured.seconds_a_step:.3g}",
        "minutes": f"{measured.seconds_a_step * steps / 60:.3g}",
        "signal / noise of a step's estimate": f"{np.sqrt(SIGNAL_SHARE / variance.total):.2g}",
        "  variance by few directions, sampling, privacy": ", ".join(
            f"{part / variance.total:.0%}" for part in (variance.directions, variance.sampling, variance.noise)
        ),
        "ε": "as σ gives" if config.target_epsilon is None else f"{config.target_epsilon:g}",
        "steps T": steps,
        "logical batch B": choice.expected_batch_size,
        "num_directions K": directions,
        "coordinates that they lie in": choice.entries,
        "clipping_threshold C": settings.clipping_threshold or config.clipping_threshold,
        "smoothing_parameter λ": f"{settings.smoothing_parameter or config.smoothing_parameter:.2g}",
        "learning_rate, of AdamW": settings.learning_rate or "yours",
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _filled(path: Path, measured: Measured, public: str | None) -> dict[str, Any]:
    """The run's YAML with the settings that were chosen."""
    sections: dict[str, Any] = read_yaml(path)
    chosen = dataclasses.asdict(measured.settings)
    if public is not None:
        sections["data"]["public"] = public
    sections["dpzero"].pop("minutes", None)
    for key in ("clipping_threshold", "smoothing_parameter", "difference", "num_directions", "basis_size"):
        if chosen[key] is not None:
            sections["dpzero"][key] = chosen[key]
    if chosen["clipping_threshold"] is not None and sections["dpzero"].get("mechanism") != "laplace":
        sections["dpzero"].setdefault("clipping", "adaptive")
    for key, name in _ARGUMENTS.items():
        if chosen[key] is not None:
            sections["training"][name] = chosen[key]
    return sections
