"""Differentially private fine-tuning of Hugging Face models with forward passes only (DPZero)."""

from peft_dpzero.auditing.bounds import epsilon_lower_bound
from peft_dpzero.auditing.one_run import AuditResult, audit
from peft_dpzero.checks.probe import Probe
from peft_dpzero.config import DPZeroConfig
from peft_dpzero.errors import DPZeroError, PrivateStepError
from peft_dpzero.estimation.batching import LogicalBatches
from peft_dpzero.estimation.losses import Losses, Shortcuts
from peft_dpzero.estimation.sampling import PoissonSampler, new_secret
from peft_dpzero.estimation.shapes import Shapes
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
from peft_dpzero.perturbation.perturbation import Perturbation
from peft_dpzero.release.bundle import with_digests
from peft_dpzero.release.card import save_card
from peft_dpzero.release.evidence import Check
from peft_dpzero.release.header import plan_header
from peft_dpzero.release.journal import Journal
from peft_dpzero.release.optimizer import DPZeroOptimizer
from peft_dpzero.release.record import privacy_record, save_record
from peft_dpzero.release.replay import replay_journal
from peft_dpzero.release.start import save_start
from peft_dpzero.release.verify import verify
from peft_dpzero.step import PrivateStep
from peft_dpzero.training.trainer import DPZeroTrainer, DPZeroTrainerMixin

__all__ = [
    "AuditResult",
    "Check",
    "ClassificationTask",
    "DPZeroConfig",
    "DPZeroError",
    "DPZeroOptimizer",
    "DPZeroTrainer",
    "DPZeroTrainerMixin",
    "FunctionTask",
    "Journal",
    "LogicalBatches",
    "Losses",
    "Perturbation",
    "PoissonSampler",
    "PrivacyPlan",
    "PrivateStep",
    "PrivateStepError",
    "Probe",
    "Released",
    "Seq2SeqTask",
    "Shapes",
    "Shortcuts",
    "Task",
    "TokenTask",
    "Verbalizer",
    "audit",
    "epsilon_lower_bound",
    "infer_task",
    "make_plan",
    "new_secret",
    "plan_header",
    "privacy_record",
    "replay_journal",
    "save_card",
    "save_record",
    "save_start",
    "verify",
    "with_digests",
]
