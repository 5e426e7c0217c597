"""What a private Trainer logs and returns: a list of what is allowed, since what a Trainer measures may be private."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.trainer_utils import TrainOutput

from peft_dpzero.training.host import Host

# Released, public beforehand, or a time. `grad_norm` is the release's.
_ALLOWED = frozenset(
    (
        *("clipping_threshold", "epoch", "epsilon", "grad_norm", "learning_rate", "step"),
        *("train_runtime", "train_samples_per_second", "train_steps_per_second"),
    )
)
_LOSSES = frozenset(("loss", "train_loss"))
# What the stock loop always reports; that it is left out needs no warning.
_EXPECTED = _LOSSES | {"total_flos"}
# The loop's own prefix: nothing passes by it.
_LOOP = "train"


class ReportingMixin(Host):
    """Logs, metrics and what they are made of."""

    _metric_prefixes: set[str]
    _left_out: set[str]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in the Trainer, less what is not known to be public, plus the ε spent so far (an upper bound) and, if it
        adapts, the clipping threshold C.

        What is logged: released values, the schedule, times, and metrics of evaluation and prediction by their prefix.
        """
        public = self._public(logs)
        if "learning_rate" in logs:
            if (loss := self.run.losses.get(self.state.global_step)) is not None:
                public["loss"] = loss
            if self.is_world_process_zero():
                public["epsilon"] = self.run.plan.running_epsilon(self.state.global_step)
            if self.run.config.clipping == "adaptive" and self.run.last is not None:
                public["clipping_threshold"] = self.run.last.clipping_threshold
        super().log(public, *args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """As in the Trainer. Evaluation data is treated as public."""
        self._metric_prefixes.add(metric_key_prefix)
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        return metrics

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **kwargs: Any,
    ) -> Any:
        """As in the Trainer. The data is treated as public."""
        self._metric_prefixes.add(metric_key_prefix)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        """0: the count would tell how many tokens were sampled."""
        return 0

    def _public_output(self, output: TrainOutput) -> TrainOutput:
        """`output` with public metrics. The loss is the mean of the released ones, or None if it is withheld."""
        loss, metrics = output.training_loss, self._public(output.metrics)
        if self.run.config.train_loss != "nonprivate":
            released = list(self.run.losses.values())
            loss = sum(released) / len(released) if released else None
            if loss is not None:
                metrics["train_loss"] = loss
        return TrainOutput(output.global_step, loss, metrics)

    def _public(self, logs: Mapping[str, float]) -> dict[str, float]:
        public = {name: value for name, value in logs.items() if self._is_public(name)}
        left_out = logs.keys() - public.keys() - _EXPECTED - self._left_out
        if left_out:
            self._left_out |= left_out
            warnings.warn(
                f"Not logged, since it may be private: {', '.join(sorted(left_out))}. What is logged is what was "
                "released, and metrics of evaluation and prediction by their prefix.",
                stacklevel=3,
            )
        return public

    def _is_public(self, name: str) -> bool:
        if name in _LOSSES:
            return self.run.config.train_loss == "nonprivate"
        prefixes = self._metric_prefixes - {_LOOP}
        measured = any(name.startswith(f"{prefix}_") for prefix in prefixes) and not name.startswith(f"{_LOOP}_")
        return name in _ALLOWED or (measured and "_mem_" not in name and "memory" not in name)

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> None:
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        return self.run.last.norm if self.run.last else 0.0
