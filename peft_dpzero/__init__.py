"""Differentially private fine-tuning of Hugging Face models with forward passes only (DPZero)."""

from peft_dpzero.auditing.bounds import epsilon_lower_bound
from peft_dpzero.auditing.one_run import AuditResult, audit
from peft_dpzero.config import DPZeroConfig
from peft_dpzero.errors import DPZeroError, PrivateStepError
from peft_dpzero.estimation.tasks import (
    ClassificationTask,
    FunctionTask,
    Seq2SeqTask,
    Task,
    TokenTask,
    infer_task,
)
from peft_dpzero.estimation.verbalizer import Verbalizer
from peft_dpzero.mechanism.plan import PrivacyPlan, make_plan
from peft_dpzero.mechanism.private_sum import Released
from peft_dpzero.release.evidence import Check
from peft_dpzero.release.optimizer import DPZeroAdamW, DPZeroOptimizer, DPZeroSGD, Estimate
from peft_dpzero.release.replay import replay_journal
from peft_dpzero.release.verify import verify
from peft_dpzero.training.own_loop import Run
from peft_dpzero.training.trainer import DPZeroTrainer, DPZeroTrainerMixin

__all__ = [
    "AuditResult",
    "Check",
    "ClassificationTask",
    "DPZeroAdamW",
    "DPZeroConfig",
    "DPZeroError",
    "DPZeroOptimizer",
    "DPZeroSGD",
    "DPZeroTrainer",
    "DPZeroTrainerMixin",
    "Estimate",
    "FunctionTask",
    "PrivacyPlan",
    "PrivateStepError",
    "Released",
    "Run",
    "Seq2SeqTask",
    "Task",
    "TokenTask",
    "Verbalizer",
    "audit",
    "epsilon_lower_bound",
    "infer_task",
    "make_plan",
    "replay_journal",
    "verify",
]
