"""The job file: one YAML that `jobs/prepare.py` and `jobs/train.py` both read.

Each part's settings live beside the code that uses them; here they are put together, read and checked once. A wrong
file gives one line per mistake: its place, what is wrong, the value there, and for an unknown key the nearest one that
exists.
"""

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from mmray.base.redact import holds_secret
from mmray.base.settings import Settings
from mmray.base.words import counted
from mmray.errors import UserError
from mmray.images import TilingPolicy
from mmray.loss.settings import LossSetting
from mmray.packing.settings import PackingSettings
from mmray.rows.settings import DatasetSettings, DataSettings
from mmray.run.scoring.settings import EarlyStoppingSettings, EvaluationSettings, KeepBestSettings
from mmray.run.tracking.settings import TrackingSettings
from mmray.schedule.balance import BalanceSettings
from mmray.schedule.mixture_settings import MixtureSettings, StageSettings, check_mixture
from mmray.training.part_settings import KIND
from mmray.training.settings import ModelSettings, TrainingSettings, check_quantised, load_deepspeed_overrides


class TileCacheSettings(Settings):
    """A cache of cut tiles on each machine that renders pages, so that later epochs need not cut them again."""

    folder: str
    """Cache folder on each machine's own disk, created if it does not exist. All render actors of a machine share
    it."""

    max_gigabytes: Annotated[float, Field(gt=0)]
    """Largest size of the cache on each machine, in units of 10^9 bytes. When it is full, entries unused for two days
    make room; no others are deleted."""

    @field_validator("folder")
    @classmethod
    def _is_local(cls, folder: str) -> str:
        if "://" in folder:
            raise ValueError("give a folder on each machine's own disk, not a URI")
        return folder

    @property
    def max_bytes(self) -> int:
        """`max_gigabytes` in bytes."""
        return int(self.max_gigabytes * 1e9)


LabelValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]
"""Value of a Ray node's label."""


class ResourceSettings(Settings):
    """Cluster resources the job uses. Actors are Ray actors; CPUs and GPUs are Ray's logical ones."""

    encode_actors: Annotated[int, Field(gt=0)] = 2
    """Prepare: number of actors that read headers and tokenise, one CPU each. The pool grows up to this number as CPUs
    become free. Eval rows of one chunk, up to 512, need none: the driver prepares them."""

    pack_actors: Annotated[int, Field(gt=0)] = 1
    """Prepare: number of actors that pack windows and write bins, one CPU each."""

    render_actors: Annotated[int, Field(gt=0)] = 1
    """Training: number of actors that decode and tile images, one CPU each."""

    mask_actors: Annotated[int, Field(gt=0)] = 1
    """Training: number of actors that compute labels and positions on CPUs, one CPU each, where no GPU trains or
    gpu_share is 0; never more than workers. Otherwise each GPU that trains has one."""

    gpu_share: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Fraction of each training GPU on which an actor computes labels and positions. The worker reserves the rest of
    its GPU, so that both fit. It must be under one half, so that two workers never share a GPU, and small enough that
    neither Ray Train nor the autoscaler counts more workers on a node than it has GPUs: 0.1 is, up to 8 GPUs a node. 0:
    labels are computed on CPUs, and workers have whole GPUs."""

    tile_cache: TileCacheSettings | None = None
    """Training: where each machine keeps cut tiles for later epochs. null: pages are cut again in each epoch."""

    workers: Annotated[int, Field(gt=0)] | tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] = 1
    """Number of training workers, one rank each. A run can continue with any other number. `[min, max]` makes the run
    elastic: it uses as many workers as the cluster has room for, shrinks when a node leaves and grows when one joins,
    each time continuing from its last checkpoint."""

    resize_seconds: Annotated[float, Field(gt=0)] = 60
    """How often, in seconds, an elastic run (workers `[min, max]`) checks whether more workers fit."""

    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPUs that each training worker uses."""

    use_gpu: bool | None = None
    """Train on GPUs, one per worker. null: if the cluster has any."""

    autoscaling: bool = False
    """Let a job that is larger than the cluster wait until the cluster adds nodes. false: such a job is refused."""

    prepare_labels: dict[str, LabelValue] = Field(default_factory=dict)
    """Prepare: labels, as given to `ray start --labels`, of the Ray nodes whose CPUs preparing uses. Empty: any
    node."""

    train_labels: dict[str, LabelValue] = Field(default_factory=dict)
    """Training: labels of the Ray nodes that run workers, render actors and mask actors. Empty: any node that has
    room."""

    @field_validator("workers")
    @classmethod
    def _least_before_most(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if not isinstance(workers, int) and workers[0] > workers[1]:
            raise ValueError(f"write [min, max], the smaller number first, not {list(workers)}")
        return workers

    @property
    def min_workers(self) -> int:
        """Smallest number of workers the run may have."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Largest number of workers the run may have."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    def labels_on_gpus(self, gpus: bool) -> bool:
        """True if labels are computed on shares of the training GPUs. gpus: whether ranks train on GPUs."""
        return gpus and self.gpu_share > 0

    @property
    def is_elastic(self) -> bool:
        """True if the number of workers follows the cluster."""
        return not isinstance(self.workers, int)


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
        lines = list(_explain(error))
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
                    "files": tuple(_absolute(file) for file in dataset.files),
                    "image_root": None if dataset.image_root is None else _absolute(dataset.image_root),
                }
            )
            for dataset in sets
        )

    model = {
        name: _absolute(value)
        for name in ("path", "config", "processor")
        if isinstance(value := getattr(job.model, name), str) and Path(value).exists()  # else a hub's name
    }
    output = {name: _absolute(getattr(job.output, name)) for name in ("prepared", "run")}
    mixture = [part.model_copy(update={"prepared": _absolute(part.prepared)}) for part in job.mixture]
    data: dict[str, Any] = {"train": datasets(job.data.train), "eval": datasets(job.data.eval)}
    if job.data.size_cache is not None:
        data["size_cache"] = _absolute(job.data.size_cache)
    resources = {}
    if cache := job.resources.tile_cache:
        resources["tile_cache"] = cache.model_copy(update={"folder": _absolute(cache.folder)})
    # A DeepSpeed file is read here, where it is: its content travels with the job.
    training: dict[str, Any] = {"deepspeed": load_deepspeed_overrides(job.training.deepspeed) or None}
    if (adapter := job.training.adapter) is not None and adapter.start_from is not None:
        training["adapter"] = adapter.model_copy(update={"start_from": _absolute(adapter.start_from)})
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


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path.cwd() / path)


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


# How pydantic's errors are explained.
#
# Job.model_validate reports mistakes as (location, type, message, input). Two things in them are not for a reader.
#
# 1. A value of several kinds is tried as each kind, and the mistakes of every kind are reported, with the kind as one
#    part of the location. For `images: {overview: [{max_ratio: 1, sizes: [512, 512]}]}`, where overview is a size or a
#    list of buckets:
#
#        images, overview, tuple[constrained-int, constrained-int], 0        should be an integer   (as a size)
#        images, overview, tuple[constrained-int, constrained-int], 1        is missing             (as a size)
#        images, overview, tuple[OverviewBucket, ...], 0, size               is missing             (as buckets)
#        images, overview, tuple[OverviewBucket, ...], 0, sizes              is unknown             (as buckets)
#
#    The kind that was meant is the one whose mistakes lie deepest, here the buckets. Only its mistakes are told,
#    without the kind: `images.overview.0.sizes: unknown key; did you mean 'size'?`
#
# 2. A list with a wrong entry is also reported as too short, since pydantic leaves the entry out. Only the entry's
#    mistake is told.


def _explain(error: ValidationError) -> Iterator[str]:
    """Yield a line for each mistake, `path: message`."""
    mistakes = error.errors()
    locations = [mistake["loc"] for mistake in mistakes]
    for mistake in mistakes:
        location = mistake["loc"]
        if mistake["type"] == "too_short" and any(_is_inside(other, location) for other in locations):
            continue
        kind_index = _kind_index(location)
        if kind_index is not None and not _is_kind_meant(location, kind_index, locations):
            continue
        path = ".".join(str(part) for index, part in enumerate(location) if index != kind_index and part != KIND)
        yield f"{path or 'job'}: {_message(dict(mistake))}"


def _message(mistake: dict[str, Any]) -> str:
    """Say what is wrong, with the value or, for an unknown key, with the nearest known one."""
    location, value = mistake["loc"], mistake["input"]
    if mistake["type"] == "extra_forbidden":
        known_keys = _known_keys(location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), known_keys, n=1, cutoff=0.5)
        remedy = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known_keys)}"
        return f"unknown key; {remedy}"
    if mistake["type"] == "missing":
        return "required and not given"
    plain_messages = {"model_type": "must be keys with values", "tuple_type": "must be a list"}
    message = plain_messages.get(mistake["type"], mistake["msg"].removeprefix("Value error, "))
    return message if isinstance(value, (dict, BaseModel)) else f"{message} (found {value!r:.80})"


def _is_inside(location: Sequence[Any], outer: Sequence[Any]) -> bool:
    """Tell whether a location lies below another one."""
    return len(location) > len(outer) and location[: len(outer)] == outer


def _is_kind_meant(location: Sequence[Any], kind_index: int, locations: Sequence[Sequence[Any]]) -> bool:
    """Tell whether a mistake belongs to the kind whose mistakes lie deepest among all kinds of its value.

    location: of the mistake, with its kind at kind_index; locations: of all mistakes.
    """
    same_value = [other for other in locations if _is_inside(other, location[:kind_index])]
    same_kind = [other for other in same_value if other[kind_index] == location[kind_index]]
    return max(map(len, same_kind)) == max(map(len, same_value))


def _kind_index(location: Sequence[Any]) -> int | None:
    """Return the index in a location where pydantic names the kind of a value, or None where it names no kind."""
    settings: Any = Job
    for index, part in enumerate(location[:-1]):
        if isinstance(part, int):
            continue
        fields = getattr(settings, "model_fields", {})
        if part not in fields:
            return None
        annotation = fields[part].annotation
        kinds = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
        if typing.get_origin(annotation) in (types.UnionType, typing.Union) and len(kinds) > 1:
            return index + 1
        settings = _settings_class(annotation)
    return None


def _known_keys(location: Sequence[Any]) -> list[str]:
    """Return the keys of the settings at a location of the job."""
    settings: Any = Job
    for part in location:
        fields = {} if isinstance(part, int) else getattr(settings, "model_fields", {})
        if part in fields:
            settings = _settings_class(fields[part].annotation)
    return list(getattr(settings, "model_fields", {}))


def _settings_class(annotation: Any) -> Any:
    """Return the Settings class inside an annotation such as `tuple[X, ...] | None`, or None."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, Settings) else None
    for inner in typing.get_args(annotation):
        settings = _settings_class(inner)
        if settings is not None:
            return settings
    return None
