"""A push to a Hub on loopback, and the adapter loaded back from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft_dpzero.release.numbers import rounded_up

import tiny
from hub_server import HubServer

JOURNAL_RELEASE = {
    "README.md",
    "config.json",
    "dpzero_config.json",
    "dpzero_journal",
    "generation_config.json",
    "privacy.svg",
    "privacy_record.json",
}


def run(script: str, folder: Path, endpoint: str) -> None:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    hub = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    tests = Path(tiny.__file__).parent
    done = subprocess.run(
        [sys.executable, str(tests / "processes" / script), str(folder)],
        env=kept
        | hub
        | {"HF_HOME": str(folder / script), "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_pushed_adapter_is_the_release_alone_and_loads_back(tmp_path: Path) -> None:
    with HubServer() as hub:
        run("hub_push.py", tmp_path, hub.endpoint)
        commits = [path for method, path in hub.requests if method == "POST" and "/commit/" in path]
        assert len(commits) >= 2, "the checkpoints and the end are each pushed"
        files = hub.files("user/private-adapter")
        assert set(files) - {".gitattributes"} == tiny.RELEASE | {"tokenizer.json", "tokenizer_config.json"}
        assert not any(b"hf_secret" in content or str(tmp_path).encode() in content for content in files.values())
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "user/base"

        record = json.loads(files["privacy_record.json"])
        card = ModelCard(files["README.md"].decode())
        assert card.data.privacy["epsilon"] == rounded_up(record["epsilon"]) >= record["epsilon"] > 0
        assert {"dpzero", "demo", "lora", "transformers", "base_model:adapter:user/base"} <= set(card.data.tags)
        named = ("base_model", "license", "language", "datasets", "pipeline_tag", "library_name")
        assert [card.data.to_dict()[name] for name in named] == [
            *("user/base", "apache-2.0", "en", ["user/reviews"], "text-classification", "peft"),
        ]
        figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert figures == {"accuracy": 0.1235, "loss": 0.5}
        assert "| accuracy | 0.1235 |" in card.text
        assert "outside the training set. The guarantee does not cover them" in card.text
        for words in (
            "differential privacy",
            "Neighboring data sets",
            "Not covered",
            "privacy unit is one example",
            "plain words",
        ):
            assert words in card.text
        assert str(tmp_path) not in files["README.md"].decode()

        run("hub_load.py", tmp_path, hub.endpoint)


@pytest.mark.slow
def test_a_fully_tuned_model_is_pushed_as_kilobytes_and_rebuilt(tmp_path: Path) -> None:
    with HubServer() as hub:
        run("hub_journal.py", tmp_path, hub.endpoint)
        files = hub.files("user/tuned-model")
    assert set(files) - {".gitattributes"} == JOURNAL_RELEASE
    assert sum(map(len, files.values())) < 20_000
    assert "peft-dpzero replay" in files["README.md"].decode()


def test_a_failed_push_says_that_everything_is_on_disk(tmp_path: Path) -> None:
    with HubServer() as hub:
        run("hub_refused.py", tmp_path, hub.endpoint)
        assert not [path for method, path in hub.requests if method == "POST" and "/commit/" in path]
