"""Evaluation by the run's own losses, and of language models without logits that nothing reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_dpzero.checks.passes import Passes
from peft_dpzero.estimation.preferences import PairTask
from peft_dpzero.estimation.shortcuts.label_logits import OutputHead
from peft_dpzero.estimation.tasks import LabelPositionTask, Task
from peft_dpzero.estimation.verbalizer import Verbalizer
from peft_dpzero.training.host import Host


class EvaluatingMixin(Host):
    """Evaluation, which reads no private row. Preferences are evaluated by TRL's own loss."""

    task: Task

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of the per-example losses, and what the task predicts: evaluation only."""
        task, head = self.task, self._output_head(model)
        if isinstance(task, PairTask):
            return super().compute_loss(model, inputs, return_outputs)
        if head is not None and isinstance(task, Verbalizer):
            scores = task.scores_from(head.logits(model, task.inputs(inputs)), inputs)
            loss = task.losses_of(scores, inputs).mean()
            return (loss, {"logits": scores}) if return_outputs else loss
        if head is not None and isinstance(task, LabelPositionTask) and not return_outputs:
            return task.losses_from(head.logits(model, task.inputs(inputs)), inputs).mean()
        outputs = model(**task.inputs(inputs))
        loss = task.losses(outputs, inputs).mean()
        return (loss, {"logits": task.predictions(outputs, inputs)}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As in the Trainer; where the loss alone is wanted, `compute_loss` makes no outputs."""
        labelled = bool(self.label_names) and all(inputs.get(name) is not None for name in self.label_names)
        if not (prediction_loss_only and labelled and self._output_head(model)) or isinstance(self.task, PairTask):
            made = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return made[0], made[1], made[2]
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def _output_head(self, model: nn.Module) -> OutputHead | None:
        """What makes this model's logits where they are read, once training has found that it may."""
        passes: Passes | None = getattr(self, "_passes", None)
        head = passes.losses.shortcuts.label_logits if passes else None
        return head if head and any(module is head.module for module in model.modules()) else None
