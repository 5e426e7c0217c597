"""What a trainer writes to disk and to the Hub: the model, its configuration, record and card; nothing else."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from transformers import PreTrainedTokenizerBase
from transformers.utils import PushInProgress

from peft_dpzero.errors import DPZeroError
from peft_dpzero.modules import same_parameters
from peft_dpzero.release.base_name import given_name
from peft_dpzero.release.bundle import is_released
from peft_dpzero.release.card import card_fields, save_card
from peft_dpzero.release.picture import save_picture
from peft_dpzero.release.staging import put_in_place, staging
from peft_dpzero.training.host import Host
from peft_dpzero.training.sharding import reshard

PUSH_FORMATS = ("weights", "journal")


class SavingMixin(Host):
    """Saving and pushing of a private Trainer."""

    # The step that the weights are of, if that is not the last one.
    _weights_step: int | None = None
    # What the last save wrote: a push uploads that and nothing else.
    _written: tuple[Path, tuple[str, ...]] | None = None
    # What the user gave for the card, for every save from then on.
    _card_data: Mapping[str, Any] = MappingProxyType({})

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Any] | None = None) -> None:
        reshard(self.model)
        if self.args.should_save:
            with self._saving(Path(output_dir or self.args.output_dir)) as folder:
                self._plain_model.save_pretrained(folder, state_dict=state_dict)
                self._save_claims(folder)

    def save_journal(self, output_dir: str, **card_data: Any) -> None:
        """Saves the model as its journal: kilobytes, from which `replay_journal` makes the weights again.

        An adapter's folder also gets its starting weights. `card_data`: as in `describe_release`.

        Raises:
            DPZeroError: nothing was trained yet.
        """
        if not self.is_world_process_zero():
            return
        self._check_journal()
        self.describe_release(**card_data)
        model = self._plain_model
        with self._saving(Path(output_dir)) as folder:
            if hasattr(model, "peft_config"):
                model.peft_config[model.active_adapter].save_pretrained(folder)
            else:
                model.config.save_pretrained(folder)
            self._save_claims(folder)

    def _check_journal(self) -> None:
        if self.run.journal is None:
            raise DPZeroError("There is no journal yet: call train() first.")

    @property
    def _plain_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @contextmanager
    def _saving(self, folder: Path) -> Iterator[Path]:
        with staging(folder) as staged:
            yield staged
            self._written = folder, put_in_place(staged, folder, self.run.evidence_in(folder))

    @property
    def _release_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that belongs to the release, as the Trainer finds it."""
        found = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        return found if isinstance(found, PreTrainedTokenizerBase) else None

    @property
    def _card_arguments(self) -> dict[str, Any]:
        repository = self.hub_model_id or self.args.hub_model_id
        return {"repository": repository, "tokenizer": self._release_tokenizer, **self._card_data}

    def describe_release(self, **card_data: Any) -> None:
        """Says what the cards of all later releases hold, also of checkpoints that are pushed while training.

        Args:
            card_data: base_model (or finetuned_from: the base's name on the Hub), language, license, datasets, tags,
                eval_results … of the card's YAML; see `huggingface_hub.ModelCardData`.

        Raises:
            DPZeroError: base_model is no name that a model on the Hub can have.
        """
        fields = card_fields(card_data)
        given_name(fields.get("base_model"))
        self._card_data = {**self._card_data, **fields}

    def _save_claims(self, folder: Path) -> None:
        if self._release_tokenizer is not None:
            self._release_tokenizer.save_pretrained(folder)
        step = self.state.global_step if self._weights_step is None else self._weights_step
        self.run.save_claims(self._plain_model, folder, step, **self._card_arguments)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with same_parameters(self.model, self.run.perturbation(self.model).with_adapter):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with same_parameters(self.model, self.run.perturbation(self.model).with_adapter):
            super()._load_best_model()
        self._weights_step = self.state.best_global_step

    def create_model_card(self, **card_data: Any) -> None:
        """Writes README.md. What is given for it is kept, and goes into every release that is saved from then on.

        Args:
            card_data: as in `describe_release`.
        """
        self.describe_release(**card_data)
        if self.is_world_process_zero():
            record, folder = self.run.record(), Path(self.args.output_dir)
            save_picture(record, folder)
            save_card(record, folder, self._plain_model, **self._card_arguments)

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
        file of the folder. All is on disk before the Hub is asked for anything.

        With `format="journal"` no weights are uploaded: the base model and the journal make them again, at kilobytes
        (see `save_journal`). This upload always blocks.

        `card_data`: as in `describe_release`. A base that was loaded from a folder is named by `base_model`.

        Raises:
            DPZeroError: an unknown format, or a journal that is not there yet; or the Hub could not be reached or
                refused the upload: the text says where the release lies.
        """
        if format not in PUSH_FORMATS:
            raise DPZeroError(f"format must be one of {', '.join(PUSH_FORMATS)}, got {format!r}.")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.describe_release(**card_data)
        access = {"token": token or self.args.hub_token, "revision": revision or self.args.hub_revision}
        if format == "weights":
            self.save_model(_internal_call=True)
            folder = Path(self.args.output_dir)
        elif self.is_world_process_zero():
            self._check_journal()
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="journal-", dir=self.args.output_dir))
            self.save_journal(str(folder))
        if not self.is_world_process_zero():
            return None
        try:
            if self.hub_model_id is None:
                self.init_hf_repo(token=access["token"], private=private)
            self._finish_current_push()
            done = self._upload(folder, commit_message, run_as_future=format == "weights" and not blocking, **access)
        except Exception as error:
            raise DPZeroError(
                f"The push to the Hub failed ({type(error).__name__}: {error}). The whole release "
                f"is on disk in {folder}. Push again once the Hub can be reached."
            ) from error
        if format == "journal":
            shutil.rmtree(folder)
        return done

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == "end":
            return
        # Two uploads at a time could land in either order, and the Trainer may delete the older one's folder.
        self._finish_current_push()
        message = f"Training in progress, step {self.state.global_step}"
        access = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        job = self._upload(Path(checkpoint_folder), message, run_as_future=True, **access)
        self.push_in_progress = PushInProgress([job])

    def _upload(self, folder: Path, message: str | None, **kwargs: Any) -> Any:
        """Uploads what the last save wrote to `folder`, file by file."""
        assert self._written is not None
        written, names = self._written
        if written != folder:
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
