"""Pushes to a Hub that does not have the revision that is asked for. usage: hub_refused.py FOLDER"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from peft_dpzero import DPZeroError, DPZeroTrainer, verify

from tiny import adapted, arguments, config, tiny_dataset


def main() -> None:
    folder = Path(sys.argv[1])
    given = arguments(folder / "run", hub_model_id="user/refused", hub_token="hf_secret", hub_revision="nowhere")
    data = tiny_dataset("classifier")
    trainer = DPZeroTrainer(adapted(), given, train_dataset=data, dpzero_config=config())
    trainer.train()
    with pytest.raises(DPZeroError, match=rf"The whole release is on disk in {re.escape(str(folder / 'run'))}\."):
        trainer.push_to_hub()
    assert not [check for check in verify(folder / "run") if check.status == "FAILED"]
    with pytest.raises(DPZeroError) as refused:
        trainer.push_to_hub(format="journal")
    left = next((folder / "run").glob("journal-*"))
    assert str(left) in str(refused.value)
    assert not [check for check in verify(left) if check.status == "FAILED"]
    with pytest.raises(DPZeroError, match="name on the Hub"):
        trainer.push_to_hub(base_model=str(folder))


if __name__ == "__main__":
    main()
