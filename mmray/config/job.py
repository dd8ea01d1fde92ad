"""The job file: one YAML that `jobs/prepare.py` and `jobs/train.py` both read.

Each part's settings live beside the code they steer; here they are put together, read and checked once. A wrong file
gives one line per mistake: where it is, what was found, and for an unknown key the nearest one that exists.
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
from mmray.errors import UserError
from mmray.images import TilingPolicy
from mmray.loss.settings import LossSetting
from mmray.packing.settings import PackingSettings
from mmray.rows.settings import DatasetSettings, DataSettings
from mmray.run.tracking.settings import TrackingSettings
from mmray.schedule.balance import BalanceSettings
from mmray.training.settings import ModelSettings, TrainingSettings, load_deepspeed_overrides


class TileCacheSettings(Settings):
    """Tiles of pages kept on the machines that render them, so that later epochs do not cut them anew."""

    folder: str
    """Folder on each machine's own disk, made where absent; all render actors of a machine share it."""

    max_gigabytes: Annotated[float, Field(gt=0)]
    """The most that the folder takes on each machine, in 10^9 bytes."""

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
    """What of the cluster a job takes. Actors are Ray actors; CPUs and GPUs are Ray's logical ones."""

    encode_actors: Annotated[int, Field(gt=0)] = 2
    """Prepare: actors that read headers and tokenise, one CPU each. The pool grows up to this as CPUs come."""

    pack_actors: Annotated[int, Field(gt=0)] = 1
    """Prepare: actors that pack windows and write bins, one CPU each."""

    render_actors: Annotated[int, Field(gt=0)] = 1
    """Training: actors that decode and tile images, one CPU each."""

    mask_actors: Annotated[int, Field(gt=0)] = 1
    """Training: actors that compute labels and positions; on a GPU share each, or one CPU where there is no GPU."""

    gpu_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Part of a GPU that one mask actor takes. Training workers reserve the rest of their GPU, so both fit. Under one
    half, so that two workers never share a GPU."""

    tile_cache: TileCacheSettings | None = None
    """Training: where each machine keeps the tiles of pages for later epochs; null: pages are cut each time."""

    workers: Annotated[int, Field(gt=0)] | tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] = 1
    """Training workers, one rank each. Any number continues a run begun with any other. `[min, max]`: as many as the
    cluster has room for; the run shrinks when a node goes and grows when one comes, each time going on from its last
    checkpoint."""

    resize_seconds: Annotated[float, Field(gt=0)] = 60
    """With workers `[min, max]`: seconds between looks whether there is room for more."""

    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPUs a training worker takes."""

    use_gpu: bool | None = None
    """Train on GPUs, one per worker. null: where the cluster has any."""

    autoscaling: bool = False
    """The cluster grows when work waits: a job larger than the cluster is now waits for nodes. false: it is refused."""

    prepare_labels: dict[str, LabelValue] = Field(default_factory=dict)
    """Prepare: labels of the Ray nodes whose CPUs it takes, as `ray start --labels` gives them. Empty: of any node."""

    train_labels: dict[str, LabelValue] = Field(default_factory=dict)
    """Training: labels of the Ray nodes for workers, render and mask actors. Empty: any node that has room."""

    @field_validator("workers")
    @classmethod
    def _least_before_most(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if not isinstance(workers, int) and workers[0] > workers[1]:
            raise ValueError(f"write [min, max], the smaller number first, not {list(workers)}")
        return workers

    @property
    def min_workers(self) -> int:
        """The workers that a run needs at least."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The workers that a run takes at most."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def is_elastic(self) -> bool:
        """The number of workers follows the cluster."""
        return not isinstance(self.workers, int)


class ExportSettings(Settings):
    """The model folder that a run ends with."""

    at_end: bool = False
    """Write the model when training is finished, as `mmray export` does, into the folder `model` of the run. The driver
    does it: its machine needs memory for the weights."""


class OutputSettings(Settings):
    """Where results go."""

    prepared: str
    """Folder or URI of the prepared dataset; `train` and `eval` are made inside. All nodes must reach it."""

    run: str
    """Folder or URI of the training run: metrics.jsonl, TensorBoard files, checkpoints. All nodes must reach it."""

    export: ExportSettings = ExportSettings()
    """Whether the run ends with a folder that transformers loads."""


class Job(Settings):
    """One job: what to train, on which rows, cut and packed how, with what, to where."""

    name: str
    """A short name, shown with the progress of its jobs."""
    model: ModelSettings
    """The model and its processor."""
    data: DataSettings
    """Rows to train and evaluate on."""
    images: TilingPolicy = TilingPolicy()
    """How pages are cut into tiles; nothing set: whole pages, sized by the model's processor."""
    packing: PackingSettings
    """How samples become bins."""
    loss: LossSetting = "sampled"
    """Which tokens of `chat` and `tokenized` rows train. `sampled`: those the model would have sampled; `all`: every
    token but media; or the turns of some roles, `{roles: […]}`. Of `pretrain` rows every token but media trains."""
    training: TrainingSettings
    """Steps, optimizer, DeepSpeed, evaluation and checkpoints."""
    balance: BalanceSettings | None = BalanceSettings()
    """How ranks are given equal work; null: bins are dealt in plain shuffled order."""
    resources: ResourceSettings = ResourceSettings()
    """Actors, workers and GPUs."""
    output: OutputSettings
    """Where results go."""
    tracking: TrackingSettings = TrackingSettings()
    """Weights & Biases, MLflow."""

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, content: Any) -> Any:
        """What a job file says is written into manifests and logs."""
        if found := [path for path, text in _texts(content) if holds_secret(text)]:
            raise ValueError(
                f"{found[0]} holds a password or a token; leave it out, and give credentials to every node by its "
                "environment, a configuration file or a role"
            )
        return content

    @model_validator(mode="after")
    def _evaluation_has_rows(self) -> "Job":
        if self.training.eval_every_steps and not self.data.eval:
            raise ValueError("training.eval_every_steps is set but data.eval has no rows")
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

    @property
    def packing_costs(self) -> BalanceSettings | None:
        """What samples cost, where bins are packed to equal cost."""
        if self.packing.mode != "equal_cost" or self.balance is None:
            return None
        return self.balance.for_attention(self.model.attention)

    def prepared_path(self, split: str) -> str:
        """The prepared dataset of `train` or `eval`."""
        return f"{self.output.prepared.rstrip('/')}/{split}"


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job file. overrides: `key.path=value` each, the value read as YAML.

    Relative paths are taken from the current folder and made absolute: workers run in folders of their own.
    Raises UserError with one line for each mistake.
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
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise UserError("\n".join([f"job file {path}: {count}", *(f"  {line}" for line in lines)])) from error


class _Loader(yaml.SafeLoader):
    """YAML without code, where a key written twice is an error: one of the two values would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if any(key.value == earlier.value for earlier in keys[:index]):
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is written twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a job file's content, with its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{path}.{number}")
    elif isinstance(value, str):
        yield path, value


def _yaml_problem(error: Exception) -> str:
    """One line: where and what."""
    mark = getattr(error, "problem_mark", None)
    text = " ".join(str(getattr(error, "problem", None) or error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {text}" if mark else text


def _with_absolute_paths(job: Job) -> Job:
    def datasets(sets: Sequence[DatasetSettings]) -> tuple[DatasetSettings, ...]:
        return tuple(
            each.model_copy(
                update={
                    "files": tuple(_absolute(file) for file in each.files),
                    "image_root": None if each.image_root is None else _absolute(each.image_root),
                }
            )
            for each in sets
        )

    model = {
        name: _absolute(value)
        for name in ("path", "config", "processor")
        if isinstance(value := getattr(job.model, name), str) and Path(value).exists()  # else a hub's name
    }
    output = {name: _absolute(getattr(job.output, name)) for name in ("prepared", "run")}
    data: dict[str, Any] = {"train": datasets(job.data.train), "eval": datasets(job.data.eval)}
    if job.data.size_cache is not None:
        data["size_cache"] = _absolute(job.data.size_cache)
    resources = {}
    if cache := job.resources.tile_cache:
        resources["tile_cache"] = cache.model_copy(update={"folder": _absolute(cache.folder)})
    # A DeepSpeed file is read here, where it is: its content travels with the job.
    training = {"deepspeed": load_deepspeed_overrides(job.training.deepspeed) or None}
    return job.model_copy(
        update={
            "model": job.model.model_copy(update=model),
            "data": job.data.model_copy(update=data),
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


def _explain(error: ValidationError) -> Iterator[str]:
    """A line for each mistake: path, what is wrong, what was found, the nearest known key."""
    mistakes = error.errors()
    for mistake in mistakes:
        location, kind = mistake["loc"], _kind_index(mistake["loc"])
        if any(mistake["type"] == "too_short" and _is_inside(other["loc"], location) for other in mistakes):
            continue  # only short because a wrong entry was left out
        if kind is not None and not _is_likely(location, kind, [other["loc"] for other in mistakes]):
            continue
        path = ".".join(str(part) for index, part in enumerate(location) if index != kind)
        yield f"{path or 'job'}: {_message(dict(mistake))}"


def _message(mistake: dict[str, Any]) -> str:
    if mistake["type"] == "extra_forbidden":
        known = _known_keys(mistake["loc"][:-1])
        near = difflib.get_close_matches(str(mistake["loc"][-1]), known, n=1, cutoff=0.5)
        return "unknown key; " + (f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}")
    if mistake["type"] == "missing":
        return "required and not given"
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "model_type":
        message = "must be keys with values"
    if mistake["type"] == "tuple_type":
        message = "must be a list"
    found = mistake["input"]
    return message if isinstance(found, (dict, BaseModel)) else f"{message} (found {found!r:.80})"


def _is_inside(location: Sequence[Any], outer: Sequence[Any]) -> bool:
    return len(location) > len(outer) and location[: len(outer)] == outer


def _is_likely(location: Sequence[Any], kind: int, others: Sequence[Sequence[Any]]) -> bool:
    """Of a value that may be of several kinds, pydantic tells the mistakes for each; what was meant is the kind that
    fits deepest."""
    rivals = [other for other in others if _is_inside(other, location[:kind])]
    own = max(len(other) for other in rivals if other[kind] == location[kind])
    return own == max(map(len, rivals))


def _kind_index(location: Sequence[Any]) -> int | None:
    """The place where a location says of which kind a value was taken, which is no key of the job file."""
    model: Any = Job
    for index, part in enumerate(location[:-1]):
        if isinstance(part, int):
            continue
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            return None
        kinds = [kind for kind in typing.get_args(fields[part].annotation) if kind is not types.NoneType]
        if typing.get_origin(fields[part].annotation) in (types.UnionType, typing.Union) and len(kinds) > 1:
            return index + 1
        model = _settings_class(fields[part].annotation)
    return None


def _known_keys(location: Sequence[Any]) -> list[str]:
    """The keys of the settings at a path of the job."""
    model: Any = Job
    for part in location:
        if isinstance(part, int):
            continue
        fields = getattr(model, "model_fields", {})
        if part in fields:
            model = _settings_class(fields[part].annotation)
    return list(getattr(model, "model_fields", {}))


def _settings_class(annotation: Any) -> Any:
    """The Settings class inside an annotation such as `tuple[X, ...] | None`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, Settings) else None
    for inner in typing.get_args(annotation):
        found = _settings_class(inner)
        if found is not None:
            return found
    return None
