"""`DPZeroConfig`: what a user decides about the mechanism and its privacy."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIG_NAME = "dpzero_config.json"

DIFFERENCES = ("central", "forward")
DISTRIBUTIONS = ("gaussian", "rademacher", "sphere")
NEIGHBORING = ("add_or_remove_one", "replace_one")
MECHANISMS = ("gaussian", "laplace")
CLIPPINGS = ("fixed", "adaptive", "automatic")
_SMALLEST_MOVE, _LARGEST_MOVE = 1e-6, 1.0
TRAIN_LOSSES = ("withheld", "private", "nonprivate")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True)
class DPZeroConfig:
    """Settings of a DPZero run (arXiv 2310.09639; with `num_directions` > 1, DP-AggZO, USENIX Security 2025).

    Give either `target_epsilon` (σ is then calibrated before the first step) or `noise_multiplier` (the ε that
    it buys is then reported), and `target_delta` with both. Given both, training stops before the step that would
    pass `target_epsilon`. A value out of range raises a `ValueError` that names the field and the fix.
    """

    # Parameters that control the guarantee.
    target_epsilon: float | None = field(
        default=None, metadata=_help("ε to spend over the whole run; σ is calibrated to it.")
    )
    target_delta: float | None = field(
        default=None, metadata=_help("δ of the guarantee, below 1 / number of privacy units; 0 with 'laplace'.")
    )
    noise_multiplier: float | None = field(
        default=None,
        metadata=_help("σ: the noise's standard deviation (Laplace: scale) over clipping threshold; instead of ε."),
    )
    neighboring: str = field(
        default="add_or_remove_one",
        metadata=_help("Which data sets are neighbors: 'add_or_remove_one' or 'replace_one'."),
    )
    mechanism: str = field(
        default="gaussian",
        metadata=_help("'gaussian', or 'laplace' for pure ε: one direction, target_delta=0."),
    )
    privacy_unit: str | None = field(
        default=None,
        metadata=_help("Column that names whom an example belongs to, such as 'user_id'; None protects one example."),
    )
    max_examples_per_unit: int = field(
        default=16, metadata=_help("Examples of one unit that a step averages; of more, it takes some at random.")
    )
    clipping: str = field(
        default="fixed",
        metadata=_help(
            "'fixed' at clipping_threshold; 'adaptive' follows a quantile of the norms from there; 'automatic' "
            "normalises every unit's vector to it."
        ),
    )
    clipping_threshold: float = field(
        default=10.0, metadata=_help("C: the L2 bound on one unit's vector of K loss differences.")
    )
    clipping_quantile: float = field(
        default=0.5, metadata=_help("Share of units that adaptive clipping leaves unclipped.")
    )

    max_length: int | None = field(
        default=None,
        metadata=_help("Most tokens of an example, a public bound: longer ones contribute nothing. None sets none."),
    )
    rows_asserted_independent: bool = field(
        default=False,
        metadata=_help(
            "You vouch that no row's loss depends on the rows beside it, where that is not known of a model or loss: "
            "rows then share passes. The privacy record says so."
        ),
    )

    # Parameters that control the estimate.
    num_directions: int = field(default=16, metadata=_help("K: random directions a step; 1 is DPZero."))
    smoothing_parameter: float = field(default=1e-3, metadata=_help("λ: how far parameters are perturbed."))
    difference: str = field(
        default="central",
        metadata=_help("'central' costs 2K forward passes a step; 'forward' K+1, with more bias."),
    )
    direction_distribution: str = field(
        default="gaussian", metadata=_help("'gaussian', 'rademacher' or 'sphere' (radius √d).")
    )
    basis_size: int = field(
        default=64,
        metadata=_help(
            "With public_text: in how many coordinates directions lie, those in which it moves outputs most."
        ),
    )
    direction_seed: int = field(
        default=0, metadata=_help("Public seed of the directions. The noise and the sampling never read it.")
    )

    # Parameters that control what else leaves training.
    train_loss: str = field(
        default="withheld",
        metadata=_help(
            "'withheld'; 'private' spends a share of the budget on a noisy mean loss every logging_steps; 'nonprivate' "
            "logs the raw loss, which the guarantee does not cover."
        ),
    )
    loss_clipping_threshold: float = field(
        default=2.0, metadata=_help("Upper bound on one unit's loss in the private mean; losses below 0 count as 0.")
    )
    deterministic: bool = field(
        default=False,
        metadata=_help("Seeded sampling and noise, for tests. Gives NO privacy, and the record says so."),
    )

    def __post_init__(self) -> None:
        self._check_budget()
        self._check_choice("mechanism", MECHANISMS)
        self._check_choice("clipping", CLIPPINGS)
        self._check_choice("neighboring", NEIGHBORING)
        self._check_choice("difference", DIFFERENCES)
        self._check_choice("direction_distribution", DISTRIBUTIONS)
        self._check_choice("train_loss", TRAIN_LOSSES)
        self._check_positive("clipping_threshold")
        self._check_positive("smoothing_parameter", finite=True)
        if not _SMALLEST_MOVE <= self.smoothing_parameter <= _LARGEST_MOVE:
            raise ValueError(
                f"smoothing_parameter must lie between {_SMALLEST_MOVE:g} and {_LARGEST_MOVE:g}, got "
                f"{self.smoothing_parameter!r}: float32 losses tell nearer points apart by rounding alone, and farther "
                "ones say nothing of the slope. 1e-3 to 1e-2 suits most models."
            )
        self._check_positive("loss_clipping_threshold", finite=True)
        self._check_integer("num_directions", low=1, high=4096)
        self._check_integer("max_examples_per_unit", low=1, high=2**31)
        self._check_integer("basis_size", low=1, high=2048)
        self._check_integer("direction_seed", low=0, high=2**63 - 1)
        if self.max_length is not None:
            self._check_integer("max_length", low=1, high=2**31)
        for name in ("rows_asserted_independent", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        if not (_is_number(self.clipping_quantile) and 0 < self.clipping_quantile < 1):
            raise ValueError(
                f"clipping_quantile must lie strictly between 0 and 1, got {self.clipping_quantile!r}: 0.5 leaves half "
                "of the units unclipped."
            )
        if self.privacy_unit is not None and not (isinstance(self.privacy_unit, str) and self.privacy_unit):
            raise ValueError(f"privacy_unit must be a column's name or None, got {self.privacy_unit!r}.")
        if self.mechanism == "laplace":
            self._check_laplace()
        if math.isinf(self.clipping_threshold) and (self.clipping != "fixed" or self.train_loss == "private"):
            raise ValueError("clipping_threshold=inf clips nothing: it needs clipping='fixed' and no private loss.")
        if math.isinf(self.clipping_threshold) and self.noise_multiplier != 0:
            raise ValueError(
                "clipping_threshold=inf bounds nobody's influence, so no noise can protect it: "
                "set a finite clipping_threshold (or noise_multiplier=0 for a non-private run)."
            )

    @property
    def is_private(self) -> bool:
        """Whether a run with this config has any guarantee: noise is added, and it is secret."""
        return self.noise_multiplier != 0 and not self.deterministic

    def replace(self, **changes: Any) -> DPZeroConfig:
        """Returns a copy with `changes` applied and validated."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON-ready values."""
        return dataclasses.asdict(self)

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Writes `dpzero_config.json` into `save_directory` and returns its path."""
        path = Path(save_directory) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DPZeroConfig:
        """Builds a config; keys that this version does not know are dropped with a warning."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            warnings.warn(f"DPZeroConfig does not know {unknown}: dropped.", stacklevel=2)
        return cls(**{key: value for key, value in values.items() if key in known})

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> DPZeroConfig:
        """Reads `dpzero_config.json` from a folder or a Hub repository."""
        path = Path(name_or_path) / CONFIG_NAME
        if not path.is_file():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(name_or_path), CONFIG_NAME))
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))

    def _check_budget(self) -> None:
        if self.target_epsilon is None and self.noise_multiplier is None:
            raise ValueError("Give target_epsilon (σ is calibrated), noise_multiplier, or both (ε is then a cap).")
        if self.target_epsilon is not None:
            self._check_positive("target_epsilon", finite=True)
        if self.noise_multiplier is not None and not (
            _is_number(self.noise_multiplier) and 0 <= self.noise_multiplier < math.inf
        ):
            raise ValueError(f"noise_multiplier must be a number >= 0, got {self.noise_multiplier!r}.")
        if self.target_delta is None:
            raise ValueError("target_delta is missing: set it well below 1 / number of training examples.")
        if self.mechanism != "laplace" and not (_is_number(self.target_delta) and 0 < self.target_delta < 1):
            raise ValueError(f"target_delta must lie strictly between 0 and 1, got {self.target_delta!r}.")

    def _check_laplace(self) -> None:
        """Discrete Laplace noise is calibrated to the L1 norm, which equals the L2 norm of one number only."""
        if self.target_delta != 0:
            raise ValueError(f"target_delta must be 0 with mechanism='laplace' (pure ε), got {self.target_delta!r}.")
        if self.num_directions != 1:
            raise ValueError(f"num_directions must be 1 with mechanism='laplace', got {self.num_directions!r}.")
        if self.clipping == "adaptive":
            raise ValueError("clipping='adaptive' releases a second number: with mechanism='laplace' use 'fixed'.")
        if self.train_loss == "private":
            raise ValueError("train_loss='private' releases a second number: with mechanism='laplace' withhold it.")

    def _check_positive(self, name: str, finite: bool = False) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not value > 0 or (finite and math.isinf(value)):
            raise ValueError(f"{name} must be a {'finite ' if finite else ''}number above 0, got {value!r}.")

    def _check_integer(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}.")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
