"""Where a step's time goes: samples of the main thread's stack, by the function of ours that is innermost."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import peft_dpzero

PACKAGE = str(Path(peft_dpzero.__file__).parent)
INTERVAL = 0.002


class StackSampler:
    """Within the block, counts what the main thread is doing some hundred times a second.

    A sample belongs to the model's passes if a module of the model runs, split by whether it is an adapter's layer
    (LoRA or a copy that is trained); else to the innermost function of peft_dpzero.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(threading.get_ident(),), daemon=True)

    def __enter__(self) -> StackSampler:
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(INTERVAL / 4)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        sys.setswitchinterval(self._interval)

    def shares(self, least: float = 0.002) -> dict[str, float]:
        """Share of the samples by where they were, largest first; those below `least` together."""
        total = sum(self.counts.values()) or 1
        found = {name: count / total for name, count in self.counts.most_common()}
        kept = {name: round(share, 4) for name, share in found.items() if share >= least}
        rest = round(sum(share for share in found.values() if share < least), 4)
        return kept | ({"all else": rest} if rest else {})

    def _watch(self, thread: int) -> None:
        while not self._stop.wait(INTERVAL):
            frame = sys._current_frames().get(thread)
            if frame is not None:
                self.counts[_owner(frame)] += 1


def _owner(frame: FrameType | None) -> str:
    """Where a stack belongs, read from its innermost frame outwards."""
    inside = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if "/peft/tuners/" in file and frame.f_code.co_name == "forward":
            layer = frame.f_locals.get("self")
            is_layer = hasattr(layer, "base_layer") or hasattr(layer, "original_module")
            inside = inside or ("model: adapter layers' own work" if is_layer else "")
        elif "/nn/modules/linear.py" in file and not inside:
            inside = _linear(frame.f_back)
        elif "/transformers/models/" in file or "/integrations/trainer/" in file:
            inside = inside or "model: all else of the passes"
        elif file.startswith(PACKAGE):
            if inside and not file.endswith(("directions.py", "perturbation.py")):
                return inside
            module = file.removeprefix(PACKAGE).strip("/").removesuffix(".py").replace("/", ".")
            return f"{module}: {getattr(frame.f_code, 'co_qualname', frame.f_code.co_name)}"
        frame = frame.f_back
    return inside or "outside the step"


def _linear(frame: FrameType | None) -> str:
    """Whether a linear layer is an adapter's product or a base weight's."""
    while frame is not None and "/nn/modules/module.py" in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is not None and "/peft/tuners/" in frame.f_code.co_filename:
        held = frame.f_locals
        return "model: adapter layers' own work" if "lora_A" in held else "model: base linear layers"
    return "model: base linear layers"


def profiled(run: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of `run` and the shares of where they went."""
    start = time.perf_counter()
    with StackSampler() as sampler:
        run()
    return {"seconds": round(time.perf_counter() - start, 3), "shares": sampler.shares()}


def table(shares: dict[str, float]) -> str:
    """Markdown."""
    lines = ["| where | share |", "|---|---:|"]
    return "\n".join(lines + [f"| {name} | {share:.1%} |" for name, share in shares.items()])
