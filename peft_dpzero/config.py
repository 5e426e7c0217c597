"""`DPZeroConfig`: what a user decides about the mechanism and its privacy."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG_NAME = "dpzero_config.json"

DIFFERENCES = ("central", "forward")
DISTRIBUTIONS = ("gaussian", "rademacher", "sphere", "orthogonal")
NEIGHBORING = ("add_or_remove_one", "replace_one")
MECHANISMS = ("gaussian", "laplace")
CLIPPINGS = ("fixed", "adaptive", "automatic")
SMALLEST_MOVE, LARGEST_MOVE = 1e-6, 1.0
MOST_DIRECTIONS = 4096
# Of a basis: what its exact sums allow.
MOST_VECTORS = 2048
DEFAULT_DIRECTIONS = 16
DEFAULT_DIFFERENCE = "central"
DEFAULT_DISTRIBUTION, DISTRIBUTION_IN_BASIS = "gaussian", "orthogonal"
DEFAULT_BASIS_SIZE = 64
TRAIN_LOSSES = ("withheld", "private", "nonprivate")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True)
class DPZeroConfig:
    """Settings of a DPZero run (arXiv 2310.09639; with `num_directions` > 1, DP-AggZO, USENIX Security 2025).

    Give either `target_epsilon` (σ is then calibrated before the first step) or `noise_multiplier` (the ε that
    it buys is then reported), and `target_delta` with both. Given both, training stops before the step that would
    pass `target_epsilon`. A value out of range raises a `ValueError` that names the field and the fix.

    What is None by default is chosen before training, from made-up rows or public text alone. Values that are given
    stay.
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
    clipping: str | None = field(
        default=None,
        metadata=_help(
            "'fixed' at clipping_threshold; 'adaptive' follows a quantile of the norms from there; 'automatic' "
            "normalises every unit's vector to it. By default 'fixed' at a threshold that is given, else 'adaptive'."
        ),
    )
    clipping_threshold: float | None = field(
        default=None,
        metadata=_help("C: the L2 bound on one unit's vector of K loss differences. None measures their usual norm."),
    )
    clipping_quantile: float = field(
        default=0.8, metadata=_help("Share of units that adaptive clipping leaves unclipped.")
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
    minutes: float | None = field(
        default=None,
        metadata=_help(
            "How long training should take on this machine: steps, batch, directions and learning rate are then chosen "
            "for it, where TrainingArguments has its defaults."
        ),
    )
    num_directions: int | None = field(
        default=None,
        metadata=_help("K: random directions a step; 1 is DPZero. None takes 16, or what `minutes` affords."),
    )
    smoothing_parameter: float | None = field(
        default=None,
        metadata=_help("λ: how far parameters are perturbed. None measures where rounding and curvature matter least."),
    )
    difference: str | None = field(
        default=None,
        metadata=_help(
            "'central' costs 2K forward passes a step; 'forward' K+1, with more bias. None measures whether the loss "
            "bends too much for 'forward', if anything is measured, else takes 'central'."
        ),
    )
    direction_distribution: str | None = field(
        default=None,
        metadata=_help(
            "'gaussian', 'rademacher', 'sphere' (radius √d), or with public_text 'orthogonal' (a step's directions at "
            "right angles). None takes 'orthogonal' with public_text, else 'gaussian'."
        ),
    )
    basis_size: int | None = field(
        default=None,
        metadata=_help(
            "With public_text: in how many coordinates directions lie, those in which it moves outputs most. None "
            "takes 64, or with `minutes` up to 256, as these afford."
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
        if self.clipping is not None:
            self._check_choice("clipping", CLIPPINGS)
        self._check_choice("neighboring", NEIGHBORING)
        if self.difference is not None:
            self._check_choice("difference", DIFFERENCES)
        if self.direction_distribution is not None:
            self._check_choice("direction_distribution", DISTRIBUTIONS)
        self._check_choice("train_loss", TRAIN_LOSSES)
        if self.clipping_threshold is not None:
            self._check_positive("clipping_threshold")
        if self.minutes is not None:
            self._check_positive("minutes", finite=True)
        if self.smoothing_parameter is not None:
            self._check_positive("smoothing_parameter", finite=True)
            if not SMALLEST_MOVE <= self.smoothing_parameter <= LARGEST_MOVE:
                raise ValueError(
                    f"smoothing_parameter must lie between {SMALLEST_MOVE:g} and {LARGEST_MOVE:g}, got "
                    f"{self.smoothing_parameter!r}: float32 losses tell nearer points apart by rounding alone, and "
                    "farther ones say nothing of the slope. None chooses one."
                )
        self._check_positive("loss_clipping_threshold", finite=True)
        if self.num_directions is not None:
            self._check_integer("num_directions", low=1, high=MOST_DIRECTIONS)
        self._check_integer("max_examples_per_unit", low=1, high=2**31)
        if self.basis_size is not None:
            self._check_integer("basis_size", low=1, high=MOST_VECTORS)
        self._check_integer("direction_seed", low=0, high=2**63 - 1)
        if self.max_length is not None:
            self._check_integer("max_length", low=1, high=2**31)
        for name in ("rows_asserted_independent", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        if not (_is_number(self.clipping_quantile) and 0 < self.clipping_quantile < 1):
            raise ValueError(
                f"clipping_quantile must lie strictly between 0 and 1, got {self.clipping_quantile!r}: 0.8 clips a "
                "fifth of the units."
            )
        if self.privacy_unit is not None and not (isinstance(self.privacy_unit, str) and self.privacy_unit):
            raise ValueError(f"privacy_unit must be a column's name or None, got {self.privacy_unit!r}.")
        if self.mechanism == "laplace":
            self._check_laplace()
        infinite = self.clipping_threshold == math.inf
        if infinite and (self.clipping not in (None, "fixed") or self.train_loss == "private"):
            raise ValueError("clipping_threshold=inf clips nothing: it needs clipping='fixed' and no private loss.")
        if infinite and self.noise_multiplier != 0:
            raise ValueError(
                "clipping_threshold=inf bounds nobody's influence, so no noise can protect it: "
                "set a finite clipping_threshold (or noise_multiplier=0 for a non-private run)."
            )

    @property
    def is_private(self) -> bool:
        """Whether a run with this config has any guarantee: noise is added, and it is secret."""
        return self.noise_multiplier != 0 and not self.deterministic

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to measure before training."""
        return self.clipping_threshold is not None and self.smoothing_parameter is not None

    @property
    def known_directions(self) -> int | None:
        """K if it is given, or if the mechanism leaves no choice."""
        return 1 if self.mechanism == "laplace" else self.num_directions

    def settled(self, **measured: float | str | None) -> SettledConfig:
        """Returns these settings with what is None filled in.

        Args:
            measured: `clipping_threshold`, `smoothing_parameter`, `difference`, `num_directions` and `basis_size`, for
                fields that are None.

        Raises:
            ValueError: the threshold or λ is neither given nor measured.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if values["clipping"] is None:
            values["clipping"] = "fixed" if self.clipping_threshold or self.mechanism == "laplace" else "adaptive"
        values |= {name: value for name, value in measured.items() if values[name] is None}
        values["num_directions"] = self.known_directions or values["num_directions"] or DEFAULT_DIRECTIONS
        values["difference"] = values["difference"] or DEFAULT_DIFFERENCE
        values["direction_distribution"] = values["direction_distribution"] or DEFAULT_DISTRIBUTION
        values["basis_size"] = values["basis_size"] or DEFAULT_BASIS_SIZE
        for name in ("clipping_threshold", "smoothing_parameter"):
            if values[name] is None:
                raise ValueError(f"{name} is not known before training has measured it: give it, or train first.")
        return SettledConfig(**values)

    def replace(self, **changes: Any) -> Self:
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
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds a config; keys that this version does not know are dropped with a warning."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            warnings.warn(f"DPZeroConfig does not know {unknown}: dropped.", stacklevel=2)
        return cls(**{key: value for key, value in values.items() if key in known})

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> Self:
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
        if self.num_directions not in (None, 1):
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


@dataclass(frozen=True)
class SettledConfig(DPZeroConfig):
    """A config of which nothing is left to choose: what a run is made with, and its journal holds."""

    clipping: str = "fixed"
    clipping_threshold: float = 10.0
    num_directions: int = DEFAULT_DIRECTIONS
    smoothing_parameter: float = 1e-3
    difference: str = DEFAULT_DIFFERENCE
    direction_distribution: str = DEFAULT_DISTRIBUTION
    basis_size: int = DEFAULT_BASIS_SIZE


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
