"""The last attention, asked at the positions only that losses read.

There few queries meet all keys. If LoRA adapts the values, its product is taken after the weights and not before:
Σ_j a_j (W x_j + s·BA x_j) = Σ_j a_j W x_j + s·B Σ_j a_j A x_j. So what is made anew at each point θ + s·z has r entries
a token, not those of all heads, and W x_j is shared like the trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_dpzero.estimation.shortcuts.filled_rows import filled
from peft_dpzero.estimation.shortcuts.places import Places
from peft_dpzero.estimation.shortcuts.stacked_products import product
from peft_dpzero.modules import Forward, base_layer, hooked, replaced_forwards

KIND = "sdpa"


@dataclass(frozen=True)
class LastAttention:
    """A module that calls transformers' attention interface once a pass, as the last to do so.

    Attributes:
        module: calls the interface.
        values: its LoRA layer of values, if its product is taken after the attention's weights.
        hands_over: whether a narrowed layer comes next, to which its output goes by way of `Places`, not spread over
            all positions.
    """

    module: nn.Module
    values: LoraLinear | None = None
    hands_over: bool = False

    @contextmanager
    def narrowed(self, places: Places) -> Iterator[None]:
        """Within the block, for one pass, the attention asks where losses read."""
        held: list[_LowRank] = []
        attend = ALL_ATTENTION_FUNCTIONS[KIND]

        def ask(module: nn.Module, query: Tensor, *args: Any, **settings: Any) -> Any:
            read = places.of(query.shape[0], query.shape[2]) if module is self.module else None
            if read is None:
                return attend(module, query, *args, **settings)
            output = _attended(module, read, query, *args, low_rank=held, **settings)
            if self.hands_over:
                places.handed_over = output.flatten(2)
                output = output[..., :1, :1]
            return places.everywhere(output, query.shape[2]), None

        values = {self.values: _held_back(self.values, places, held)} if self.values else {}
        with _replaced(ask), replaced_forwards(values):
            yield


@dataclass(frozen=True)
class _LowRank:
    """A low-rank part of values, s·(xAᵀ)Bᵀ: xAᵀ (b, l, r), B (out, r) and s."""

    low: Tensor
    high: Tensor
    scale: float

    def weighted(self, weights: Tensor, groups: int) -> Tensor:
        """The part's sum under `weights` (b, groups, n, l): (b, groups, n, out / groups)."""
        rows, rank = len(weights), self.high.shape[1]
        factors = self.high.view(groups, -1, rank).transpose(1, 2)  # [groups, r, out / groups]
        low = (weights.flatten(1, 2) @ self.low).view(rows, groups, -1, rank)  # [b, groups, n, r]
        missing = low.new_zeros(filled(rows) - rows, *low.shape[1:])
        made = torch.cat([low, missing]).transpose(0, 1).flatten(1, 2) @ factors  # [groups, filled · n, out / groups]
        made = made.view(groups, filled(rows), -1, made.shape[-1]).transpose(0, 1)[:rows]
        return made * self.scale


def _held_back(layer: LoraLinear, places: Places, held: list[_LowRank]) -> Forward:
    """The forward of a layer of values that leaves its low-rank parts to the attention."""
    whole = layer.forward

    def forward(x: Tensor) -> Tensor:
        adapters = _plain_adapters(layer, x)
        held.clear()
        if not adapters or places.of(*x.shape[:2]) is None:
            return torch.as_tensor(whole(x))
        for name in adapters:
            low, high = product(x.flatten(0, 1), layer.lora_A[name].weight.T), layer.lora_B[name].weight
            held.append(_LowRank(low.view(*x.shape[:2], -1), high, float(layer.scaling[name])))
        return torch.as_tensor(layer.base_layer(x))

    return forward


def _attended(
    module: nn.Module,
    read: tuple[Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    low_rank: list[_LowRank],
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    **settings: Any,
) -> Tensor:
    """softmax(qkᵀ) v at the places that are read, in float32 or wider.

    Args:
        query, key, value: (b, heads, l, d), of which keys and values may have fewer heads.
        attention_mask: (b or 1, heads or 1, l, keys), bool or added.
        settings: others that `sdpa` does not look at.

    Returns: (b, positions, heads, d)
    """
    if position_bias is not None or cache is not None:
        raise NotImplementedError("Attention with a bias or a cache is not narrowed.")
    (rows, heads, length, width), groups = query.shape, key.shape[1]
    lines, positions = (place[:rows] for place in read)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if attention_mask is None and causal and length > 1:
        asked: Tensor | None = (torch.arange(key.shape[2], device=key.device) <= positions[..., None])[:, None]
    elif attention_mask is None:
        asked = None
    else:
        full = attention_mask.expand(rows, *attention_mask.shape[1:])
        asked = full.transpose(1, 2)[lines, positions].transpose(1, 2)  # [b, heads or 1, positions, keys]
    few = query.gather(2, positions[:, None, :, None].expand(-1, heads, -1, width))  # [b, heads, positions, d]
    wide = torch.promote_types(query.dtype, torch.float32)
    # Heads of a group share keys and values.
    few = few.reshape(rows, groups, -1, width).to(wide)
    scores = product(few, key.to(wide).transpose(2, 3)).view(rows, heads, -1, key.shape[2])
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if asked is not None and asked.dtype == torch.bool:
        scores = scores.masked_fill(~asked, torch.finfo(wide).min)
    elif asked is not None:
        scores = scores + asked
    weights = scores.softmax(dim=-1).view(rows, groups, -1, key.shape[2])
    output = product(weights, value.to(wide))
    for part in low_rank:
        output = output + part.weighted(weights, groups)
    return output.reshape(rows, heads, -1, value.shape[3]).transpose(1, 2).to(query.dtype)


def last_attention(model: nn.Module, run: Callable[[], object]) -> LastAttention | None:
    """The last module that calls the attention interface in `run`, if it does so once, and the layer of its values.

    Args:
        run: one forward pass of the model on public, made-up input.
    """
    called: list[nn.Module] = []
    made: dict[LoraLinear, Tensor] = {}
    values: LoraLinear | None = None
    attend = ALL_ATTENTION_FUNCTIONS[KIND]

    def keep(module: LoraLinear, args: tuple[Any, ...], output: Tensor) -> None:
        made[module] = output

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **settings: Any) -> Any:
        nonlocal values
        called.append(module)
        values = next((layer for layer, output in made.items() if _is_view(value, output)), None)
        made.clear()
        return attend(module, query, key, value, *args, **settings)

    layers = [module for module in model.modules() if _is_plain(module)]
    with _replaced(note), hooked([layer.register_forward_hook(keep) for layer in layers]):
        run()
    return LastAttention(called[-1], values) if called and called.count(called[-1]) == 1 else None


@contextmanager
def _replaced(function: Forward) -> Iterator[None]:
    """Within the block attention is `function`."""
    before = ALL_ATTENTION_FUNCTIONS[KIND]
    ALL_ATTENTION_FUNCTIONS[KIND] = function
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[KIND] = before


def _is_view(one: Tensor, whole: Tensor) -> bool:
    return one.numel() == whole.numel() and one.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def _is_plain(layer: Any) -> bool:
    """Whether a layer is xWᵀ + s·(xAᵀ)Bᵀ, in float32 or wider."""
    if type(layer) is not LoraLinear or type(base_layer(layer)) is not nn.Linear or layer.fan_in_fan_out:
        return False
    wide = layer.weight.dtype in (torch.float32, torch.float64)
    return wide and not layer.lora_variant and not any(layer.lora_bias.values())


def _plain_adapters(layer: LoraLinear, x: Tensor) -> list[str]:
    """The adapters with which a plain `layer` adds s·(xAᵀ)Bᵀ to xWᵀ now, all in one dtype; none if it does not."""
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    alike = {layer.lora_A[name].weight.dtype for name in adapters} == {layer.weight.dtype} == {x.dtype}
    idle = layer.disable_adapters or layer.merged or not alike or torch.is_autocast_enabled(x.device.type)
    return [] if idle else adapters
