"""Frozen weights split among processes by FSDP2; what is trained stays whole on each of them.

Processes then run every pass together, since each unit of the model, a block mostly, gathers its weights from all of
them, or from those of its group, when it is called.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, is_torch_version
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from peft_dpzero.errors import DPZeroError
from peft_dpzero.estimation.preferences import DPOTask
from peft_dpzero.modules import adapter_parameters
from peft_dpzero.processes import AcceleratedProcesses


@dataclass(frozen=True)
class Sharding:
    """How frozen weights are split.

    Attributes:
        plugin: Accelerate's description.
        replicas: into so many groups of as many processes each, that are neighbors by rank. Each group holds the
            weights once.
    """

    plugin: FullyShardedDataParallelPlugin
    replicas: int = 1


def sharding_asked(args: Any) -> Sharding | None:
    """What the training arguments, or else `accelerate launch`, ask of FSDP; None if nothing.

    Raises:
        DPZeroError: it cannot be had without gradients, or was not tried.
    """
    plugin, sizes = _plugin_asked(args), _sizes_asked(args)
    if sizes is None or sizes.total_size == 1:
        return None if plugin is None else Sharding(plugin)
    _check_sizes(sizes)
    if sizes.total_size != args.world_size:
        raise DPZeroError(
            f"parallelism_config is of {sizes.total_size} processes, and there are {args.world_size}: it asks for "
            "dp_replicate_size groups of dp_shard_size processes each."
        )
    if (plugin is None) != (sizes.dp_shard_size == 1):
        raise DPZeroError(
            "dp_shard_size says among how many processes fsdp shards: give both (fsdp=True, or accelerate launch "
            "--use_fsdp), or neither."
        )
    return None if plugin is None else Sharding(plugin, sizes.dp_replicate_size)


def _sizes_asked(args: Any) -> ParallelismConfig | None:
    asked: ParallelismConfig | None = getattr(args, "parallelism_config", None)
    if asked is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        return ParallelismConfig()
    return asked


def _plugin_asked(args: Any) -> FullyShardedDataParallelPlugin | None:
    asked = getattr(args, "fsdp_plugin_args", None)
    if getattr(args, "fsdp", None) and asked is None:
        raise DPZeroError("fsdp by XLA cannot be used with DPZero: use FSDP2 (leave xla out of fsdp_config).")
    if asked is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    asked = asked or {"fsdp_version": int(os.environ.get("FSDP_VERSION", "1"))}
    if asked["fsdp_version"] != 2:
        raise DPZeroError(
            "FSDP1 wraps modules and flattens their parameters, so that none can be perturbed: set fsdp_config="
            '{"version": 2}, or accelerate launch --fsdp_version 2.'
        )
    if is_torch_version("<", "2.7"):
        raise DPZeroError("fsdp needs torch 2.7 or newer, which can leave out what is trained.")
    plugin = FullyShardedDataParallelPlugin(**asked)
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise DPZeroError(
            "fsdp with CPU offloading is not supported: leave cpu_offload (fsdp_offload_params) out, and use more "
            "processes."
        )
    if plugin.activation_checkpointing:
        warnings.warn("activation_checkpointing is switched off: there is no backward pass.", stacklevel=3)
    return plugin


def check_sharded_run(trainer: Any) -> None:
    """Refuses a run that sharding would stop or change.

    Args:
        trainer: a private Trainer, whose model is not sharded yet.

    Raises:
        DPZeroError: names what cannot be and the way out.
    """
    model = trainer.model
    for refused, reason in (
        (trainer.accelerator.num_processes < 2, "there is one process: start several by accelerate launch."),
        (
            not hasattr(model, "peft_config"),
            "it shards what is frozen, and a release holds the adapter alone: add one with peft.get_peft_model "
            "(modules_to_save takes a head). Training all parameters needs a model that fits on one device.",
        ),
        (trainer._compiles, "a compiled model is not gathered unit by unit: leave torch_compile out."),
        (
            trainer.public_text is not None,
            "public_text needs backward passes over the whole model: leave it out.",
        ),
        (
            trainer.dpzero_config.minutes is not None,
            "minutes would have each process time its own passes, which all must run together: give max_steps, "
            "per_device_train_batch_size, learning_rate and num_directions.",
        ),
        (
            isinstance(trainer.task, DPOTask),
            "DPOTrainer runs its reference when a row is drawn, which processes do at different times.",
        ),
        (
            any(getattr(module, "hf_quantizer", None) is not None for module in model.modules())
            or not all(p.is_floating_point() for p in model.parameters()),
            "quantized weights are not sharded: load the base in bfloat16.",
        ),
        (
            any(p.is_meta for p in model.parameters()) or bool(getattr(model, "hf_device_map", None)),
            "the base has a device map: load it without one.",
        ),
        (
            not trainer.args.accelerator_config.even_batches,
            "evaluation must give all processes as many batches: leave even_batches on.",
        ),
    ):
        if refused:
            raise DPZeroError(f"fsdp cannot be used here: {reason}")


def _check_sizes(sizes: ParallelismConfig, *others: str) -> None:
    split = [name for name in ("tp_size", "cp_size", "sp_size", *others) if getattr(sizes, name) > 1]
    if split:
        raise DPZeroError(
            f"parallelism_config with {' and '.join(split)} above 1 cannot be used with DPZero: leave it out; "
            "fsdp=True shards weights."
        )


def check_accelerator(accelerator: Accelerator) -> None:
    """Refuses one that would split a model among processes, which is made before the trainer or by it.

    Raises:
        DPZeroError: names how, and the way out.
    """
    sizes = accelerator.parallelism_config
    if sizes is not None:
        # Accelerate itself counts the processes of plain data parallelism as replicas.
        whole = sizes.dp_replicate_size == accelerator.num_processes
        _check_sizes(sizes, "dp_shard_size", *(() if whole else ("dp_replicate_size",)))
    if accelerator.distributed_type == DistributedType.FSDP:
        raise DPZeroError("An Accelerator of FSDP was made before the trainer: make none, or after it.")


def check_whole(model: nn.Module) -> None:
    """Refuses a model that was sharded before it came here.

    Raises:
        DPZeroError: by whom it should be.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise DPZeroError(
            "The model's weights are sharded already (FSDP, tensor or expert parallelism): pass it whole to "
            "DPZeroTrainer, with fsdp=True in TrainingArguments."
        )


@torch.no_grad()
def shard(model: Any, sharding: Sharding, processes: AcceleratedProcesses) -> None:
    """Gives each process its part of the frozen weights, and the whole of what is trained: the first one's, as of now.

    Units are the modules that the plugin's policy names, embeddings apart if no other unit has their weights, and what
    is left. A unit is whole on a device for as long as it runs, or from its first call on without
    `reshard_after_forward`.

    Args:
        model: a PEFT model, in memory and of the same shapes everywhere.
        sharding: from `sharding_asked`.
        processes: of the run.

    Raises:
        DPZeroError: the policy names no module of this model, or processes hold different models.
    """
    _check_same(model, processes)
    device = processes.accelerator.device
    kept = _kept_whole(model)
    units = _units(model, sharding.plugin, kept)
    # In the model's order, which is that of all processes; a set has its own.
    for tensor in (*model.buffers(), *(parameter for parameter in model.parameters() if parameter in kept)):
        _take_first(tensor, device)
    sizes = {"dp_replicate": sharding.replicas, "dp_shard": processes.count // sharding.replicas}
    if sharding.replicas == 1:
        del sizes["dp_replicate"]
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    for unit in (*units, model):
        for parameter in unit.parameters():
            if parameter not in kept and not isinstance(parameter, DTensor):
                _take_first(parameter, device)
        again = sharding.plugin.reshard_after_forward
        fully_shard(unit, mesh=mesh, reshard_after_forward=again, ignored_params=kept)
    UnitOrder(model, units)


def reshard(model: nn.Module) -> None:
    """Leaves each process with its part alone, which reading a `state_dict` does, too: all call it before one reads."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _take_first(tensor: Tensor, device: torch.device) -> None:
    """Moves a tensor to the device, with what it holds on the first process."""
    moved = tensor.detach().to(device).contiguous()
    if moved.numel():
        torch.distributed.broadcast(moved.view(-1).view(torch.uint8), src=0)
    tensor.data = moved


def _check_same(model: nn.Module, processes: AcceleratedProcesses) -> None:
    described = [(n, str(p.dtype), tuple(p.shape), p.requires_grad) for n, p in model.named_parameters()]
    described += [(n, str(b.dtype), tuple(b.shape), False) for n, b in model.named_buffers()]
    if len(set(processes.gather(hashlib.sha256(repr(described).encode()).hexdigest()))) > 1:
        raise DPZeroError("The processes hold different models: build the same one with the same adapter on each.")


def _units(model: Any, plugin: FullyShardedDataParallelPlugin, kept: set[nn.Parameter]) -> list[nn.Module]:
    """What is gathered at once, children before their parents; the model itself takes what is left."""
    try:
        policy = fsdp2_prepare_auto_wrap_policy(plugin, model.get_base_model())
    except ValueError as error:
        raise DPZeroError(f"fsdp: {error}") from None
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    named = [module for module in reversed(list(model.modules())[1:]) if policy and policy(module)]
    found = [module for module in named if _can_be_unit(module, uses, kept)]
    if not found:
        raise DPZeroError(
            "fsdp names no block of this model, so that each pass would gather all of it at once: set "
            "fsdp_config={'transformer_layer_cls_to_wrap': [the class of its blocks]}, or accelerate launch "
            "--fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP."
        )
    within = {child for unit in found for child in unit.modules()}
    return [one for one in _embeddings(model) if one not in within and _can_be_unit(one, uses, kept)] + found


def _can_be_unit(module: nn.Module, uses: Counter[int], kept: set[nn.Parameter]) -> bool:
    """Whether a module is called, is not the model, and has weights to shard, which no module outside of it has."""
    if isinstance(module, (PreTrainedModel, BaseTuner)) or type(module).forward is nn.Module.forward:
        return False
    own = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    return not kept.issuperset(module.parameters()) and all(uses[key] == n for key, n in own.items())


def _embeddings(model: Any) -> Iterator[nn.Module]:
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model.get_base_model(), name)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, nn.Module):
            yield module


def _kept_whole(model: Any) -> set[nn.Parameter]:
    """What is trained, the adapter, and embeddings that carry one: PEFT saves them with it."""
    adapted = [one for one in _embeddings(model) if any(p.requires_grad for p in one.parameters())]
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    return trained.union(adapter_parameters(model).values(), *(module.parameters() for module in adapted))


class UnitOrder:
    """Stops a pass whose units run in another order than those of the first pass, before it gathers anything.

    A process that gathered another unit than the others would compute with what they sent: rows would meet.

    Args:
        model: whose calls are passes.
        units: the modules that are gathered at once, within it.
    """

    def __init__(self, model: nn.Module, units: list[nn.Module]) -> None:
        self._first: list[str] | None = None
        self._seen: list[str] | None = None
        names = {module: name for name, module in model.named_modules()}
        for unit in units:
            unit.register_forward_pre_hook(lambda module, args: self._call(names[module]), prepend=True)
        model.register_forward_pre_hook(lambda module, args: self._begin(), prepend=True)
        model.register_forward_hook(lambda module, args, output: self._end())

    def _begin(self) -> None:
        self._seen = []

    def _call(self, name: str) -> None:
        if self._seen is None:
            raise DPZeroError(
                f"{name} was called outside a pass of the whole model, and its weights are sharded: what other "
                "processes do then is not known. Generate text after training, with the adapter that was saved."
            )
        self._seen.append(name)
        if self._first is not None and self._first[: len(self._seen)] != self._seen:
            self._stop(name)

    def _end(self) -> None:
        seen, self._seen = self._seen, None
        self._first = self._first or seen
        if seen != self._first:
            self._stop("the end")

    def _stop(self, name: str) -> None:
        raise DPZeroError(
            f"A pass came to {name} out of turn. Sharded weights are gathered by all processes in one order, so which "
            "modules run may not depend on the row: shard larger blocks (fsdp_config, transformer_layer_cls_to_wrap)."
        )
