"""A training run described in YAML: read, checked field by field, and resolved, before any data is read."""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import torch
import yaml
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig
from transformers import TrainingArguments

from peft_dpzero.checks.arguments import check_arguments
from peft_dpzero.cli.explain import check_types, explained, nearest
from peft_dpzero.config import DPZeroConfig
from peft_dpzero.errors import DPZeroError
from peft_dpzero.release.base_name import given_name
from peft_dpzero.training.optimizers import optimizer_for

# A task's name, and its PEFT task type.
TASKS = {
    "sequence-classification": "SEQ_CLS",
    "causal-lm": "CAUSAL_LM",
    "verbalizer-masked": "FEATURE_EXTRACTION",
    "verbalizer-causal": "CAUSAL_LM",
}
ADAPTERS: dict[str, type[PeftConfig] | None] = {
    "lora": LoraConfig,
    "prefix": PrefixTuningConfig,
    "prompt": PromptTuningConfig,
    "ia3": IA3Config,
    "full": None,
}
FILE_FORMATS = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
MASK = "mask"
# What PEFT sets by itself.
_PEFT_INTERNAL = {f.name for f in dataclasses.fields(PeftConfig)}


@dataclass(frozen=True)
class DataSettings:
    """The `data` section. `train`, `eval` and `public` are files, folders or dataset names; docs/cli.md has each key.

    Raises:
        DPZeroError: the training data are named as public, too.
    """

    train: str
    text: str
    eval: str | None = None
    public: str | None = None
    label: str | None = None
    label_words: dict[Any, Any] | None = None
    labels: list[Any] | None = None
    subset: str | None = None
    train_split: str = "train"
    eval_split: str = "validation"
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.public is not None and Path(self.public).resolve() == Path(self.train).resolve():
            raise DPZeroError("data.public is data.train, which is private: give other text of the same kind.")

    @property
    def columns(self) -> list[str]:
        """The text columns: the template's, or `text` itself if it is no template."""
        if "{" not in self.text and "}" not in self.text:
            return [self.text]
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise DPZeroError(f"data.text is no template ({error}): write columns as {{column}}.") from None
        names = [name for _, name, _, _ in parts if name is not None]
        if any(spec or conversion for _, _, spec, conversion in parts) or any(re.search(r"[.\[]", n) for n in names):
            raise DPZeroError("data.text may hold column names in braces only, such as '{sentence}'.")
        return [name for name in dict.fromkeys(names) if name != MASK]

    @property
    def template(self) -> str:
        """`text` as a template."""
        return "{" + self.text + "}" if self.columns == [self.text] else self.text


@dataclass(frozen=True)
class RunSettings:
    """A whole run, checked."""

    model: str
    task: str
    data: DataSettings
    adapter: PeftConfig | None
    dpzero: DPZeroConfig
    training: TrainingArguments
    base_model: str | None = None

    @property
    def classifies(self) -> bool:
        """Whether examples have a class."""
        return self.task != "causal-lm"


def read_settings(path: Path) -> RunSettings:
    """Reads and checks a run's YAML file.

    Raises:
        DPZeroError: names the key and the fix.
    """
    folder = path.resolve().parent
    sections = read_yaml(path)
    task = _choice("task", sections["task"], TASKS)
    data = _data_settings(sections["data"], task, folder)
    adapter = _adapter(sections.get("adapter", {"kind": "lora"}), task)
    check_types("dpzero", sections["dpzero"], get_type_hints(DPZeroConfig))
    with explained("dpzero"):
        dpzero = DPZeroConfig(**sections["dpzero"])
    training = _training_arguments(sections["training"], task, folder)
    name = _model_name(sections["model"], folder)
    return RunSettings(name, task, data, adapter, dpzero, training, given_name(sections.get("base_model")))


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a run's file.

    Raises:
        DPZeroError: it cannot be read, or a section is unknown or missing.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise DPZeroError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}.") from None
    except yaml.YAMLError as error:
        raise DPZeroError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise DPZeroError(f"{path} must hold sections such as 'model:' and 'data:'; see docs/cli.md.")
    required = ("model", "task", "data", "dpzero", "training")
    known = (*required, "adapter", "base_model")
    homes = {
        **dict.fromkeys(_names(TrainingArguments), "training"),
        **dict.fromkeys(_names(DPZeroConfig), "dpzero"),
        **dict.fromkeys(_names(DataSettings), "data"),
    }
    for key in content:
        if key not in known:
            hint = f"it belongs under '{homes[key]}:'" if key in homes else f"did you mean {nearest(key, known)!r}?"
            raise DPZeroError(f"{key!r} is not a section of {path.name}: {hint}")
    for key in required:
        if content.get(key) is None:
            raise DPZeroError(f"{key!r} is missing in {path.name}; see docs/cli.md for what it holds.")
    for key in ("data", "dpzero", "training", "adapter"):
        if not isinstance(content.get(key, {}), Mapping):
            raise DPZeroError(f"{key!r} must hold keys of its own, one 'key: value' a line.")
    return dict(content)


def _names(kind: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if f.init]


def _choice(name: str, value: Any, choices: Mapping[str, Any]) -> str:
    if value not in choices:
        raise DPZeroError(
            f"{name} must be one of {', '.join(choices)}; got {value!r}: did you mean {nearest(value, choices)!r}?"
        )
    return str(value)


def _model_name(value: Any, folder: Path) -> str:
    if not isinstance(value, str):
        raise DPZeroError(f"model must be a folder or a Hub name, got {value!r}.")
    local = folder / Path(value).expanduser()
    if not local.is_dir() and (value.startswith((".", "/", "~")) or value.count("/") > 1):
        raise DPZeroError(f"model: there is no folder {local}.")
    return str(local) if local.is_dir() else value


def _data_settings(values: dict[str, Any], task: str, folder: Path) -> DataSettings:
    check_types("data", values, get_type_hints(DataSettings))
    for key in ("train", "text"):
        if not values.get(key):
            raise DPZeroError(f"data.{key} is missing.")
    named = [key for key in ("train", "eval", "public") if values.get(key)]
    sources = {key: source(f"data.{key}", values[key], folder) for key in named}
    data = DataSettings(**{**values, **sources})
    if not data.columns:
        raise DPZeroError("data.text names no column: write at least one as {column}.")
    if data.max_length is not None and data.max_length < 1:
        raise DPZeroError(f"data.max_length must be at least 1, got {data.max_length}.")
    if (task == "causal-lm") == bool(data.label):
        fix = "remove it" if data.label else "set it to the column that holds the class"
        raise DPZeroError(f"data.label {'has no use in' if data.label else 'is missing for'} task {task}: {fix}.")
    verbalizes = task.startswith("verbalizer")
    if verbalizes == (data.label_words is None):
        fix = "give a word for each class, such as {0: terrible, 1: great}" if verbalizes else "remove it"
        raise DPZeroError(f"data.label_words {'is missing for' if verbalizes else 'has no use in'} task {task}: {fix}.")
    if data.labels is not None and task != "sequence-classification":
        raise DPZeroError("data.labels serves task sequence-classification only: remove it.")
    if (task == "verbalizer-masked") != (f"{{{MASK}}}" in data.text):
        fix, example = "remove it; text ends at the word", "{sentence} It was"
        if task == "verbalizer-masked":
            fix, example = "write it where the label word goes", f"{{sentence}} It was {{{MASK}}}."
        raise DPZeroError(f"data.text and {{{MASK}}} in task {task}: {fix}, for example '{example}'.")
    return data


def source(name: str, value: str, folder: Path) -> str:
    """A file or folder within `folder` as a path, or a dataset's name as it is.

    Raises:
        DPZeroError: there is no such file, or its format is not known; `name` says whose.
    """
    local = folder / Path(value).expanduser()
    if local.exists():
        if local.is_file() and local.suffix not in FILE_FORMATS:
            raise DPZeroError(f"{name}: {value} must end in one of {', '.join(FILE_FORMATS)}.")
        return str(local)
    if local.suffix in FILE_FORMATS or value.startswith((".", "/", "~")):
        raise DPZeroError(f"{name}: there is no file {local}.")
    return value


def _adapter(values: dict[str, Any], task: str) -> PeftConfig | None:
    kind = _choice("adapter.kind", values.get("kind", "lora"), ADAPTERS)
    build = ADAPTERS[kind]
    fields = {key: value for key, value in values.items() if key != "kind"}
    if build is None:
        check_types("adapter", fields, {})
        return None
    hints = {name: hint for name, hint in get_type_hints(build).items() if name not in _PEFT_INTERNAL}
    check_types("adapter", fields, hints)
    if kind in ("prefix", "prompt"):
        fields.setdefault("num_virtual_tokens", 10)
    with explained("adapter"):
        return build(task_type=TASKS[task], **fields)


def _training_arguments(values: dict[str, Any], task: str, folder: Path) -> TrainingArguments:
    names = set(_names(TrainingArguments))
    hints = {name: hint for name, hint in get_type_hints(TrainingArguments).items() if name in names}
    check_types("training", values, hints)
    if not values.get("output_dir"):
        raise DPZeroError("training.output_dir is missing: name the folder that the result goes to.")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if values.get(name, 1) < 1:
            raise DPZeroError(f"training.{name} must be at least 1, got {values[name]}.")
    with explained("training"):
        defaults = {"prediction_loss_only": task == "causal-lm"}
        output_dir = str(folder / Path(values["output_dir"]).expanduser())
        arguments = TrainingArguments(**{**defaults, **values, "output_dir": output_dir})
        check_arguments(arguments)
        optimizer_for(arguments, [{"params": [torch.zeros(1)], "weight_decay": arguments.weight_decay}])
    return arguments


class _Loader(yaml.SafeLoader):
    """YAML with the booleans and numbers of version 1.2, in which `no` is a word and `1e-5` a number."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "float", "int")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := [key for i, key in enumerate(keys) if key in keys[:i]]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {repeated[0]!r} appears twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


_RESOLVERS: list[tuple[str, str, str]] = [
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+\.?[0-9]*)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf)$", "-+.0123456789"),
]
for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))
