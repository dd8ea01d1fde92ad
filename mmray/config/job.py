"""The job file: one YAML that `jobs/prepare.py` and `jobs/train.py` both read.

Each part's settings live beside the code that uses them; here they are put together, read and checked once. A wrong
file gives one line per mistake: its place, what is wrong, the value there, and for an unknown key the nearest one that
exists.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, field_validator, model_validator

from mmray.base.redact import holds_secret
from mmray.base.settings import Settings
from mmray.base.words import counted
from mmray.config.mistakes import mistake_lines
from mmray.config.resources import ResourceSettings
from mmray.errors import UserError
from mmray.images import TilingPolicy
from mmray.loss.settings import LossSetting
from mmray.packing.settings import PackingSettings
from mmray.rows.settings import DatasetSettings, DataSettings
from mmray.run.scoring.settings import EarlyStoppingSettings, EvaluationSettings, KeepBestSettings
from mmray.run.tracking.settings import TrackingSettings
from mmray.schedule.balance import BalanceSettings
from mmray.schedule.mixture_settings import MixtureSettings, StageSettings, check_mixture
from mmray.training.settings import ModelSettings, TrainingSettings, check_quantised, load_deepspeed_overrides


class ExportSettings(Settings):
    """Settings of the model folder, loadable by transformers, with which a run may end."""

    at_end: bool = False
    """Write the model into the folder `model` of the run when training is finished, as `mmray export` does. The driver
    writes it, so its machine needs memory for the weights."""


class OutputSettings(Settings):
    """Locations of the results."""

    prepared: str
    """Folder or URI of the prepared dataset. The folders `train` and `eval` are created inside. All nodes must reach
    it."""

    run: str
    """Folder or URI of the training run: metrics.jsonl, TensorBoard files, checkpoints. All nodes must reach it."""

    export: ExportSettings = ExportSettings()
    """Export of a model folder, loadable by transformers, at the end of the run."""

    @field_validator("prepared", "run")
    @classmethod
    def _names_a_folder(cls, folder: str) -> str:
        if not folder.strip():
            raise ValueError("is empty: name a folder")
        return folder


class Job(Settings):
    """A whole job: the model, the rows, how pages are cut and samples packed, how to train, and where results are
    written."""

    name: str
    """A short name, shown with the job's progress."""
    model: ModelSettings
    """The model and its processor."""
    data: DataSettings
    """Rows to train and evaluate on."""
    images: TilingPolicy = TilingPolicy()
    """How pages are cut into tiles. Not set: pages stay whole, and the model's processor sizes them."""
    packing: PackingSettings
    """How samples are packed into bins."""
    loss: LossSetting = "sampled"
    """Choice of the tokens of `chat` and `tokenized` rows that are trained on. `sampled`: those the model would have
    sampled. `all`: every token except media. `{roles: […]}`: the turns of some roles. In `pretrain` rows every token
    except media is trained on."""
    training: TrainingSettings
    """Steps, optimizer, DeepSpeed, evaluation and checkpoints."""
    mixture: tuple[MixtureSettings, ...] = ()
    """Training: prepared datasets to train on by weights, in place of output.prepared, whose `eval` is still what is
    evaluated. All must have been prepared for the same processor, tiling, capacities and loss. Empty: no mixture."""
    stages: tuple[StageSettings, ...] = ()
    """Training: weights of the mixture that change with the steps. Empty: those of `mixture` throughout."""
    balance: BalanceSettings | None = BalanceSettings()
    """How ranks are given equal work. null: bins are dealt in plain shuffled order."""
    resources: ResourceSettings = ResourceSettings()
    """Actors, workers and GPUs."""
    output: OutputSettings
    """Locations of the results."""
    tracking: TrackingSettings = TrackingSettings()
    """Experiment trackers: Weights & Biases, MLflow."""
    evaluation: EvaluationSettings | None = None
    """Evaluation by loss and by the texts that the model writes, during training and by `jobs/evaluate.py`. null:
    `training.eval_every_steps` says how often the loss is computed, and nothing is generated during training."""
    keep_best: KeepBestSettings | None = None
    """Keep the best checkpoint in addition to the latest. null: only the latest are kept."""
    early_stopping: EarlyStoppingSettings | None = None
    """End the run when evaluations no longer improve. null: it goes to its last step."""

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, content: Any) -> Any:
        """Refuse passwords and tokens, since a job file's content is written into manifests and logs."""
        if secrets := [path for path, text in _texts(content) if holds_secret(text)]:
            raise ValueError(
                f"{secrets[0]} holds a password or a token; leave it out, and give credentials to every node by its "
                "environment, a configuration file or a role"
            )
        return content

    @model_validator(mode="after")
    def _evaluation_has_rows(self) -> "Job":
        settings, every_steps = self.evaluation, self.training.eval_every_steps
        if every_steps and not self.data.eval:
            raise ValueError("training.eval_every_steps is set but data.eval has no rows")
        if settings is None:
            return self
        if settings.every_steps and not self.data.eval:
            raise ValueError("evaluation.every_steps is set but data.eval has no rows")
        if settings.every_steps and every_steps and settings.every_steps != every_steps:
            raise ValueError(
                f"evaluation.every_steps is {settings.every_steps} and training.eval_every_steps is {every_steps}; "
                "leave the second out"
            )
        for number in settings.sets or () if self.data.eval else ():
            if not 0 <= number < len(self.data.eval):
                sets = counted(len(self.data.eval), "set")
                raise ValueError(f"evaluation.sets: {number}, but data.eval has {sets}, from 0")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> "Job":
        for name, setting in (("keep_best", self.keep_best), ("early_stopping", self.early_stopping)):
            if setting is None:
                continue
            if not self.data.eval or (self.evaluation is None and self.training.eval_every_steps is None):
                raise ValueError(f"{name} compares evaluations, but there are none; set evaluation and data.eval")
            metric = setting.metric.removeprefix("eval_")
            if metric != "loss" and (
                self.evaluation is None or not self.evaluation.generate.rows or metric not in self.evaluation.metrics
            ):
                raise ValueError(
                    f"{name}.metric is {setting.metric}, which is not measured: set evaluation, its generate.rows and "
                    f"{metric} among its metrics"
                )
        return self

    @model_validator(mode="after")
    def _quantised_can_train(self) -> "Job":
        try:
            check_quantised(self.model, self.training)
        except UserError as error:
            raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _states_follow_workers(self) -> "Job":
        optimizer, is_sharded = self.training.optimizer, self.training.zero_stage != 0 or self.model.dtype == "bf16"
        if self.resources.is_elastic and optimizer != "adamw" and is_sharded:
            raise ValueError(
                f"an elastic run cannot train with optimizer {optimizer}, whose states cannot be cut anew for another "
                "number of workers; give resources.workers one number, or set training.optimizer: adamw, or "
                "training.zero_stage: 0 with model.dtype: fp32"
            )
        return self

    @model_validator(mode="after")
    def _groups_fill_batches(self) -> "Job":
        batch = self.training.global_batch_bins
        if self.balance and self.balance.group_bins and batch % self.balance.group_bins:
            raise ValueError(
                f"balance.group_bins ({self.balance.group_bins}) must divide training.global_batch_bins ({batch})"
            )
        return self

    @model_validator(mode="after")
    def _costs_are_known(self) -> "Job":
        if self.packing.mode == "equal_cost" and self.balance is None:
            raise ValueError("packing.mode equal_cost packs by the costs of balance: take balance: null out")
        if self.packing.mode == "equal_cost" and self.balance and self.balance.one_shape_per_batch:
            raise ValueError("packing.mode equal_cost mixes shapes: leave out balance.one_shape_per_batch")
        return self

    @model_validator(mode="after")
    def _mixture_fits(self) -> "Job":
        check_mixture(self.mixture, self.stages)
        if self.mixture and self.training.steps is None:
            raise ValueError(
                "training.epochs: the datasets of a mixture end their epochs at different steps; give training.steps"
            )
        return self

    @property
    def packing_costs(self) -> BalanceSettings | None:
        """Costs by which bins are packed to equal cost; None in the other packing modes."""
        if self.packing.mode != "equal_cost" or self.balance is None:
            return None
        return self.balance.for_attention(self.model.attention or "sdpa")  # as before other values could be meant

    def prepared_path(self, split: str) -> str:
        """Path of the prepared dataset of one split, `train` or `eval`."""
        return f"{self.output.prepared.rstrip('/')}/{split}"

    def trained_paths(self, split: str) -> tuple[str, ...]:
        """Paths of the prepared datasets that training reads for one split: of `train`, all of the mixture."""
        if split == "train" and self.mixture:
            return tuple(f"{dataset.prepared.rstrip('/')}/{split}" for dataset in self.mixture)
        return (self.prepared_path(split),)


def prepared_paths(path: str) -> list[str]:
    """Lists the prepared datasets that a person names: that of the path, or those of a job file, its mixture's too.

    Raises what `load_job` raises.
    """
    if not path.endswith((".yaml", ".yml")):
        return [path]
    job = load_job(path)
    return [path for split in job.data.splits for path in job.trained_paths(split)]


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read and check a job file.

    path: the file. overrides: texts `key.path=value`, whose values are read as YAML and replace those of the file.
    Returns the job with absolute paths, since workers run in folders of their own; relative ones are taken from the
    current folder. Raises UserError with one line for each mistake.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        raise UserError(
            f"job file {path}: there is none in {Path(path).absolute().parent}; check the path (`ray job submit` takes "
            "along what its --working-dir holds, without what .gitignore and the runtime environment exclude)"
        ) from error
    except OSError as error:
        raise UserError(f"job file {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"job file {path} is not YAML: {_yaml_problem(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"job file {path}: the top of the file must be keys such as model: and data:")
    for override in overrides:
        _override(content, override)
    try:
        return _with_absolute_paths(Job.model_validate(content))
    except ValidationError as error:
        lines = list(mistake_lines(error, Job))
        count = counted(len(lines), "mistake")
        raise UserError("\n".join([f"job file {path}: {count}", *(f"  {line}" for line in lines)])) from error


class _Loader(yaml.SafeLoader):
    """Safe YAML loader that refuses a key written twice, because one of its two values would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if any(key.value == earlier.value for earlier in keys[:index]):
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is written twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in a job file's content as (path, text)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{path}.{number}")
    elif isinstance(value, str):
        yield path, value


def _yaml_problem(error: Exception) -> str:
    """Describe an error of YAML in one line: its place, if known, and what is wrong."""
    mark = getattr(error, "problem_mark", None)
    text = " ".join(str(getattr(error, "problem", None) or error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {text}" if mark else text


def _with_absolute_paths(job: Job) -> Job:
    """Return the job with absolute paths, and with the content of its DeepSpeed file in place of the path."""

    def datasets(sets: Sequence[DatasetSettings]) -> tuple[DatasetSettings, ...]:
        return tuple(
            dataset.model_copy(
                update={
                    "files": tuple(absolute(file) for file in dataset.files),
                    "image_root": None if dataset.image_root is None else absolute(dataset.image_root),
                }
            )
            for dataset in sets
        )

    model = {
        name: absolute(value)
        for name in ("path", "config", "processor")
        if isinstance(value := getattr(job.model, name), str) and Path(value).expanduser().exists()  # else a hub's name
    }
    output = {name: absolute(getattr(job.output, name)) for name in ("prepared", "run")}
    mixture = [part.model_copy(update={"prepared": absolute(part.prepared)}) for part in job.mixture]
    data: dict[str, Any] = {"train": datasets(job.data.train), "eval": datasets(job.data.eval)}
    if job.data.size_cache is not None:
        data["size_cache"] = absolute(job.data.size_cache)
    resources = {}
    if cache := job.resources.tile_cache:
        resources["tile_cache"] = cache.model_copy(update={"folder": absolute(cache.folder)})
    # A DeepSpeed file is read here, where it is: its content travels with the job.
    training: dict[str, Any] = {"deepspeed": load_deepspeed_overrides(job.training.deepspeed) or None}
    if (adapter := job.training.adapter) is not None and adapter.start_from is not None:
        training["adapter"] = adapter.model_copy(update={"start_from": absolute(adapter.start_from)})
    return job.model_copy(
        update={
            "model": job.model.model_copy(update=model),
            "data": job.data.model_copy(update=data),
            "mixture": tuple(mixture),
            "training": job.training.model_copy(update=training),
            "resources": job.resources.model_copy(update=resources),
            "output": job.output.model_copy(update=output),
        }
    )


def absolute(path: str) -> str:
    """A path as it is from the current folder, with `~` as the home folder; a URI as it is."""
    return path if "://" in path else str(Path.cwd() / Path(path).expanduser())


def _override(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override!r}: write key.path=value, for example training.steps=100")
    *parents, last = key.split(".")
    node: Any = content
    for parent in parents:
        node = _child(node, parent, override)
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: the value is not YAML: {_yaml_problem(error)}") from error
    if isinstance(node, list):
        node[_list_index(node, last, override)] = value
    else:
        node[last] = value


def _child(node: Any, key: str, override: str) -> Any:
    place: Any = _list_index(node, key, override) if isinstance(node, list) else key
    child = node[place] if isinstance(node, list) else node.setdefault(key, {})
    if child is None:
        child = node[place] = {}
    if not isinstance(child, (dict, list)):
        raise UserError(f"--set {override!r}: {key} is {child!r}, it has no keys inside")
    return child


def _list_index(node: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise UserError(f"--set {override!r}: {key!r} is no place of a list with {len(node)} entries, counted from 0")
    return int(key)
