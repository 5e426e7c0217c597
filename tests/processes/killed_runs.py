"""Training processes that are killed at random instants and resumed. usage: killed_runs.py FOLDER KILLS SEED [private]

Imports once, then forks: each life of the run is a process of its own, ended by SIGKILL. The run goes to FOLDER/killed;
unless it is private, an uninterrupted one goes to FOLDER/whole. Prints what happened as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft_dpzero import DPZeroConfig, DPZeroSGD, DPZeroTrainer
from transformers.utils import logging

from tiny import arguments, tiny_dataset, tiny_model

STEPS = 300
PACE = 8  # at most this many releases a life, while kills are left
OPTIONS: dict[str, Any] = {"noise_multiplier": 8.0, "target_delta": 1e-5, "num_directions": 2}


def train(folder: Path, private: bool) -> None:
    """One life: from wherever the folder's journal and checkpoints stand."""
    torch.manual_seed(0)
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    model = get_peft_model(tiny_model("classifier"), lora)
    settings = arguments(
        folder, max_steps=STEPS, save_strategy="steps", save_steps=50 if private else 7, save_total_limit=3
    )
    optimizer = DPZeroSGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.5)
    trainer = DPZeroTrainer(
        model,
        settings,
        train_dataset=tiny_dataset("classifier", 8),
        dpzero_config=DPZeroConfig(**OPTIONS, deterministic=not private),
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()


def born(folder: Path, private: bool) -> int:
    """Starts a life in a process of its own, and returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with open(folder / "output.txt", "a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        train(folder, private)
        status = 0
    finally:
        os._exit(status)


def releases(folder: Path) -> int:
    journal = folder / "dpzero_journal"
    return journal.read_bytes().count(b'"step"') if journal.exists() else 0


def kill_later(child: int, folder: Path, chance: random.Random) -> bool:
    """Kills a life some releases from now, or some time after its birth. Whether it was still alive."""
    before, born_at = releases(folder), time.monotonic()
    wanted = chance.randint(0, PACE)
    delay = chance.uniform(0, 0.4)
    by_time = chance.random() < 0.2
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        time_is_up = time.monotonic() - born_at > delay
        if releases(folder) - before >= (PACE if by_time else wanted) or (by_time and time_is_up):
            time.sleep(chance.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            return os.WIFSIGNALED(os.waitpid(child, 0)[1])
        time.sleep(0.001)
    return False


def finish(folder: Path, private: bool) -> None:
    """The last life, which ends by itself."""
    if os.waitstatus_to_exitcode(os.waitpid(born(folder, private), 0)[1]):
        sys.exit((folder / "output.txt").read_text()[-3000:])


def main() -> None:
    folder, private = Path(sys.argv[1]) / "killed", "private" in sys.argv
    kills, seed = map(int, sys.argv[2:4])
    folder.mkdir(parents=True)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    chance = random.Random(seed)
    counts = []
    while len(counts) < kills:
        if not kill_later(born(folder, private), folder, chance):
            sys.exit("A life ended by itself:\n" + (folder / "output.txt").read_text()[-3000:])
        counts.append(releases(folder))
    finish(folder, private)
    if not private:
        whole = folder.with_name("whole")
        whole.mkdir()
        finish(whole, private)
    print(json.dumps({"releases_at_kills": counts}))


if __name__ == "__main__":
    main()
