"""What a trainer writes to disk and to the Hub: the model, its configuration, record and card; nothing else."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, HfApi
from transformers import PreTrainedTokenizerBase
from transformers.utils import PushInProgress

from peft_dpzero.errors import DPZeroError
from peft_dpzero.release.bundle import is_released
from peft_dpzero.release.card import CARD_NAME, hub_name, save_card
from peft_dpzero.release.staging import put_in_place, staging
from peft_dpzero.training.run import Run

if TYPE_CHECKING:
    from transformers import Trainer as _Host
else:
    _Host = object

PUSH_FORMATS = ("weights", "journal")
_REBUILDING = """
## How to get the weights

This repository holds no weights: the base model and the journal make them again, with peft_dpzero installed.

```bash
peft-dpzero replay {base} THIS_REPOSITORY OUT
```
"""


class SavingMixin(_Host):  # type: ignore[misc]
    """Saving and pushing of a private Trainer."""

    # The step that the weights are of, if that is not the last one.
    _weights_step: int | None = None
    # What the last save wrote: a push uploads that and nothing else.
    _written: tuple[Path, tuple[str, ...]] | None = None

    @property
    def run(self) -> Run:
        """The private run."""
        raise NotImplementedError

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Any] | None = None) -> None:
        if self.args.should_save:
            with self._saving(Path(output_dir or self.args.output_dir)) as folder:
                self._plain_model.save_pretrained(folder, state_dict=state_dict)
                if isinstance(self.processing_class, PreTrainedTokenizerBase):
                    self.processing_class.save_pretrained(folder)
                self._save_claims(folder)

    def save_journal(self, output_dir: str, **card_data: Any) -> None:
        """Saves the model as its journal: kilobytes, from which `replay_journal` makes the weights again.

        An adapter's folder also gets its starting weights. `card_data`: as in `create_model_card`.

        Raises:
            DPZeroError: nothing was trained yet.
        """
        if self.is_world_process_zero() and self.run.journal is None:
            raise DPZeroError("There is no journal yet: call train() first.")
        if not self.is_world_process_zero():
            return
        model = self._plain_model
        with self._saving(Path(output_dir)) as folder:
            if hasattr(model, "peft_config"):
                model.peft_config[model.active_adapter].save_pretrained(folder)
            else:
                model.config.save_pretrained(folder)
                if model.can_generate():
                    model.generation_config.save_pretrained(folder)
            self._save_claims(folder, **card_data)
            with (folder / CARD_NAME).open("a", encoding="utf-8") as card:
                card.write(_REBUILDING.format(base=hub_name(model) or "BASE"))

    @property
    def _plain_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @contextmanager
    def _saving(self, folder: Path) -> Iterator[Path]:
        with staging(folder) as staged:
            yield staged
            self._written = folder, put_in_place(staged, folder, self.run.evidence_in(folder))

    def _save_claims(self, folder: Path, **card_data: Any) -> None:
        step = self.state.global_step if self._weights_step is None else self._weights_step
        self.run.save_claims(self._plain_model, folder, step, **card_data)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._weights_step = self.state.best_global_step

    def create_model_card(self, *args: Any, **card_data: Any) -> None:
        """Writes the privacy statement to README.md. `card_data`: language, license, tags … of the card's YAML."""
        if self.is_world_process_zero():
            save_card(self.run.record(), Path(self.args.output_dir), self._plain_model, **card_data)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        format: str = "weights",
        **card_data: Any,
    ) -> Any:
        """Saves and uploads the model, its journal, configuration, record and card: what was just written, and no other
        file of the folder.

        With `format="journal"` no weights are uploaded: the base model and the journal make them again, at kilobytes
        (see `save_journal`). This upload always blocks.

        Raises:
            DPZeroError: an unknown format, or a journal that is not there yet.
        """
        if format not in PUSH_FORMATS:
            raise DPZeroError(f"format must be one of {', '.join(PUSH_FORMATS)}, got {format!r}.")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token or self.args.hub_token, private=private)
        where = {"token": token or self.args.hub_token, "revision": revision or self.args.hub_revision}
        if format == "journal":
            with tempfile.TemporaryDirectory() as folder:
                self.save_journal(folder, **card_data)
                if not self.is_world_process_zero():
                    return None
                self._finish_current_push()
                return self._upload(folder, commit_message, **where)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card_data)
        self._finish_current_push()
        return self._upload(self.args.output_dir, commit_message, run_as_future=not blocking, **where)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == "end":
            return
        message = f"Training in progress, step {self.state.global_step}"
        job = self._upload(checkpoint_folder, message, token=self.args.hub_token, run_as_future=True)
        self._finish_current_push()
        self.push_in_progress = PushInProgress([job])

    def _upload(self, folder: str, message: str | None, **kwargs: Any) -> Any:
        """Uploads what the last save wrote to `folder`, file by file."""
        assert self._written is not None
        written, names = self._written
        if written != Path(folder):
            raise RuntimeError(f"{folder} was not the last folder to be saved to.")
        added = [CommitOperationAdd(name, written / name) for name in names if is_released(name)]
        return HfApi().create_commit(
            self.hub_model_id, added, commit_message=message or "Upload of a release", **kwargs
        )

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: no secret and no seed goes into a checkpoint."""
        Path(output_dir).mkdir(parents=True, exist_ok=True)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: restored state would repeat old randomness."""
