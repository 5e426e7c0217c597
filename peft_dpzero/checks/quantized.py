"""Quantized bases that cannot be trained on privately."""

from __future__ import annotations

from torch import nn

from peft_dpzero.errors import DPZeroError


def check_quantization(model: nn.Module) -> None:
    """Refuses LLM.int8() layers that pick outlier columns: they look for them in all examples of a micro-batch.

    Raises:
        DPZeroError: names the first such layer.
    """
    for name, module in model.named_modules():
        state = getattr(module, "state", None)
        if type(module).__name__ == "Linear8bitLt" and getattr(state, "threshold", 0) > 0:
            raise DPZeroError(
                f"{name} is an LLM.int8() layer, which keeps a column in 16 bits for all examples of a micro-batch if "
                "one of them has an outlier there: examples change each other's losses. Set llm_int8_threshold=0.0, "
                "or better, load in 4 bits (load_in_4bit=True) or quantize weights only (torchao's "
                "Int8WeightOnlyConfig)."
            )
