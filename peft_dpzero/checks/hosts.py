"""Trainers that the mixin is put before: those whose loss it would not train are refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import Trainer

from peft_dpzero.errors import DPZeroError

SFT, DPO, REWARD = (f"trl.trainer.{name.lower()}_trainer.{name}Trainer" for name in ("SFT", "DPO", "Reward"))
_REASONS = {
    "KTOTrainer": "its KL term, and the completions that it is taken over, come from other rows of the batch",
    "GRPOTrainer": "its advantages compare the completions of a group, which it samples from the model",
    "RLOOTrainer": "its baseline is the mean of other completions, which it samples from the model",
}
# (argument, the values that a row's own loss can have, what to do)
_ONLY: Mapping[str, Iterable[tuple[str, tuple[Any, ...], str]]] = {
    SFT: [("loss_type", ("nll", "chunked_nll", None), "set loss_type='nll', or pass per_example_loss")],
    DPO: [
        ("loss_type", (["sigmoid"], "sigmoid"), "set loss_type='sigmoid'"),
        ("loss_weights", (None,), "scale learning_rate instead"),
        ("ld_alpha", (None,), "leave it out"),
        ("f_divergence_type", ("reverse_kl",), "leave it out"),
        ("use_weighting", (False,), "leave it out"),
        ("sync_ref_model", (False,), "the reference is the model before training: leave it out"),
        (
            "precompute_ref_log_probs",
            (False,),
            "it runs rows in batches, where one changes another's last bits; leave it out: each row's are computed "
            "once a step anyway, by itself",
        ),
    ],
    REWARD: [],
}


def host_of(kind: type) -> str | None:
    """The full name of the trainer of TRL that `kind` is made of, None if of none.

    Raises:
        DPZeroError: one that is not known to have a loss of each row's own.
    """
    found = None
    for base in kind.__mro__:
        if base.__module__.split(".")[0] != "trl" or not base.__name__.endswith("Trainer") or base.__name__[0] == "_":
            continue
        name = f"{base.__module__}.{base.__name__}"
        if name not in _ONLY:
            reason = _REASONS.get(base.__name__, "it is not known to have a loss of each row's own")
            raise DPZeroError(
                f"TRL's {base.__name__} cannot be private: {reason}. SFTTrainer, DPOTrainer and RewardTrainer can be."
            )
        found = name
    return found


def check_host(kind: type, args: Any, model: Any, options: Mapping[str, Any], *, has_loss: bool) -> None:
    """Refuses what would train another loss than its name says.

    Args:
        kind: the class of the private trainer.
        args: the training arguments; None if none were passed.
        model: as passed to the trainer.
        options: the other arguments of the trainer that the mixin stands before.
        has_loss: whether the user passed `per_example_loss`.

    Raises:
        DPZeroError: names the trainer, method or argument, and the way out.
    """
    host = host_of(kind)
    if options.get("compute_loss_func") is not None:
        raise DPZeroError("compute_loss_func averages over the batch: pass per_example_loss instead.")
    if options.get("optimizer_cls_and_kwargs") is not None:
        raise DPZeroError("optimizer_cls_and_kwargs is not read: set optim, or pass optimizers=(DPZeroAdamW(…), None).")
    if any("_get_train_sampler" in vars(base) for base in kind.__mro__ if base is not Trainer):
        raise DPZeroError("A custom train sampler cannot be accounted for: DPZero samples by itself.")
    if not has_loss and (base := _with_own_loss(kind)) is not None:
        raise DPZeroError(
            f"{base.__name__}.compute_loss would not be trained, since it averages over a batch: pass "
            "per_example_loss, and compute_loss serves evaluation."
        )
    if host is None:
        return
    short = host.rpartition(".")[2]
    if host != SFT:
        _check_pairs(short, args, model, options, has_loss)
    for name, allowed, advice in _ONLY[host]:
        if not (host == SFT and has_loss) and getattr(args, name, allowed[0]) not in allowed:
            raise DPZeroError(f"{short} with {name}={getattr(args, name)!r} cannot be private: {advice}.")


def _with_own_loss(kind: type) -> type | None:
    known = ("peft_dpzero", "transformers", "trl")
    users = (base for base in kind.__mro__ if base.__module__.split(".")[0] not in known)
    return next((base for base in users if "compute_loss" in vars(base)), None)


def _check_pairs(host: str, args: Any, model: Any, options: Mapping[str, Any], has_loss: bool) -> None:
    config = host.replace("Trainer", "Config")
    if not any(base.__name__ == config for base in type(args).__mro__):
        raise DPZeroError(f"{host} needs args={config}(…).")
    if has_loss:
        raise DPZeroError(f"{host} has a loss of its own: leave per_example_loss out, or use SFTTrainer.")
    if options.get("public_text") is not None:
        raise DPZeroError(f"{host} does not take public_text: it holds no preferences. Leave it out.")
    if host == "DPOTrainer" and hasattr(model, "peft_config") and options.get("ref_model") is None:
        raise DPZeroError(
            "DPOTrainer would copy the adapter as its reference, and a release holds one: pass the model without its "
            "adapter and peft_config=…, or a ref_model."
        )


def check_hosted(trainer: Any) -> None:
    """Refuses what a trainer of TRL has found out about its model and data.

    Raises:
        DPZeroError: images, or a loss that balances the experts of a batch.
    """
    if host_of(type(trainer)) is None:
        return
    if getattr(trainer, "aux_loss_enabled", False):
        raise DPZeroError(
            "The loss that balances experts is a statistic of the batch: set router_aux_loss_coef=0.0 in args."
        )
    if host_of(type(trainer)) != SFT and getattr(trainer, "_is_vision_dataset", False):
        raise DPZeroError("Preferences about images cannot be private: use text.")
