"""A checkpoint as a model folder of transformers: `mmray export`.

The model is built without weights, as its configuration has it; each weight is put in its place as it is read; then
transformers' own `save_pretrained` writes them, under the names of the hub. Memory: the weights in their final dtype,
a shard that is written, and 1 GB (`benchmarks/bench_export.py`). The folder is written beside and renamed: it is there
whole or not at all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from mmray.base.version import __version__
from mmray.base.words import file_size
from mmray.errors import UserError
from mmray.families import Family, load_family
from mmray.images import TilingPolicy
from mmray.prepared.fingerprint import differences, processor_record
from mmray.run.export.adapter import BASE_FOLDER, merged_model, write_adapter
from mmray.run.export.processor_files import copy_code, copy_generation_config, copy_processor
from mmray.run.export.readme import readme
from mmray.run.export.sidecar import SIDECAR, Dtype, Sidecar, read_sidecar
from mmray.run.export.source import SourceCheckpoint, wants_masters
from mmray.run.export.target import writing_folder
from mmray.run.folder import MODEL_FOLDER
from mmray.storage import Folder, explained, library_write_errors
from mmray.training.model import DTYPES, empty_model, resize_embeddings
from mmray.training.saved_weights import SavedWeights
from mmray.training.settings import ModelSettings

SHARD_SIZE = "5GB"
Form = Literal["merged", "apart"]
"""How an adapter is exported: merged into its base model, or apart."""


@dataclass(frozen=True)
class ExportedModel:
    """An exported folder: its path, the step and dtype of its weights, its size in bytes."""

    folder: str
    step: int
    dtype: Dtype
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.folder}: step {self.step:,}, {self.dtype}, {file_size(self.num_bytes)}"


def export_model(
    source: str, out: str, *, step: int | None = None, dtype: Dtype | None = None,
    settings: ModelSettings | None = None, replace: bool = False, form: Form | None = None,
) -> ExportedModel:  # fmt: skip
    """Writes a checkpoint as a folder that `from_pretrained` loads, with its processor, `mmray.json` and a README.

    source: a run's folder or a checkpoint in it, by path or URI.
    out: the folder to write, by path or URI.
    step: which checkpoint of a run; None: the newest.
    dtype: that of the exported weights; None: that of the training.
    settings: the job's `model`, for checkpoints that do not hold it, and for adapters whose base has moved: of theirs
    `path` is taken.
    form: of an adapter, "merged" into its base or "apart" in a folder of peft's; None: merged, or the model itself
    where there is no adapter.
    replace: whether an earlier export in `out` is replaced.

    Raises UserError, in one line, where the checkpoint is missing or damaged, the processor has changed since the data
    was prepared, `out` is taken, or the disk is full.
    """
    checkpoint = SourceCheckpoint.find(source, step)
    known, adapter = checkpoint.settings, checkpoint.adapter
    if known is not None:
        moved = adapter is not None and adapter.base is not None and settings is not None and settings.path is not None
        settings = known[0].model_copy(update={"path": settings.path} if moved and settings is not None else {})
    if settings is None:
        raise UserError(f"{checkpoint} does not say which model it is of, as checkpoints now do; give --job JOB.yaml")
    trained: Dtype = "bf16" if checkpoint.state.dtype == "bf16" else "fp32"
    final = dtype or trained
    if form is not None and adapter is None:
        raise UserError(f"{checkpoint} holds no adapter: leave out --merge and --adapter")
    training_settings = settings.model_copy(update={"dtype": trained, "quantize": None})
    settings = settings.model_copy(update={"dtype": final, "quantize": None})
    prepared = checkpoint.prepared
    policy = TilingPolicy.model_validate(prepared["record"]["tiling"])
    model = empty_model(settings)
    if settings.resize_embeddings:
        resize_embeddings(model, settings)
    family = load_family(
        settings.processor_source, tiled=policy.is_tiled, model_type=model.config.model_type,
        trust_remote_code=settings.trust_remote_code,
    )  # fmt: skip
    _check_processor(family, settings, prepared["record"]["processor"])
    sidecar = Sidecar(
        mmray=__version__,
        model_type=model.config.model_type,
        dtype=final,
        step=checkpoint.state.step,
        tiling=policy,
        processor_call=family.processor_kwargs,
        kinds=tuple(sorted({dataset["kind"] for dataset in prepared["record"]["datasets"]})),
        prepared=prepared["path"],
        fingerprint=prepared["fingerprint"],
    )
    adapter_of = None
    if adapter is not None and form == "apart":
        adapter_of = f"./{BASE_FOLDER}" if adapter.base is None else settings.path
    with explained(out), library_write_errors(), writing_folder(out, replaces=replace) as folder:
        copy_processor(settings.processor_source, folder)
        if adapter is None:
            _fill(model, checkpoint, final)
        else:
            with opened_weights(checkpoint, final) as weights:
                if form == "apart":
                    write_adapter(adapter, training_settings, weights, DTYPES[final], folder)
                else:
                    model = merged_model(adapter, training_settings, weights, DTYPES[final])
        if form != "apart":
            model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        copy_generation_config(settings, folder)
        if settings.trust_remote_code:
            copy_code(settings, folder)
        (folder / SIDECAR).write_text(sidecar.text(), encoding="utf-8")
        (folder / "README.md").write_text(readme(checkpoint, sidecar, family, adapter_of), encoding="utf-8")
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return ExportedModel(out, sidecar.step, final, num_bytes)


def export_finished(run: str, settings: ModelSettings) -> ExportedModel:
    """Exports the newest checkpoint of a finished run into the run's folder `model`.

    An export of that checkpoint is kept, one of an earlier checkpoint is replaced. settings: the job's `model`. Raises
    the errors of `export_model`.
    """
    folder = f"{run.rstrip('/')}/{MODEL_FOLDER}"
    if Folder(folder).exists(SIDECAR):
        sidecar, checkpoint = read_sidecar(folder), SourceCheckpoint.find(run)
        if (sidecar.step, sidecar.dtype) == (checkpoint.state.step, checkpoint.state.dtype):
            return ExportedModel(folder, sidecar.step, sidecar.dtype, sum(Folder(folder).sizes().values()))
    return export_model(run, folder, settings=settings, replace=True)


def _check_processor(family: Family, settings: ModelSettings, record: dict[str, str]) -> None:
    """Raises UserError where the processor's files have changed since the data was prepared with them."""
    if lines := differences(record, processor_record(family.processor)):
        raise UserError(
            f"the processor in {settings.processor_source} is not the one that the data was prepared with: "
            f"{'; '.join(lines)}. Put its files back as they were"
        )


def _fill(model: PreTrainedModel, checkpoint: SourceCheckpoint, dtype: Dtype) -> None:
    """Puts the checkpoint's weights into a model on the meta device; tied weights stay tied."""
    state: dict[str, Tensor] = {}
    filled: dict[int, Tensor] = {}
    with opened_weights(checkpoint, dtype) as weights:
        for name, empty in model.state_dict(keep_vars=True).items():
            if id(empty) not in filled:
                filled[id(empty)] = weights.read(name, DTYPES[dtype])
            state[name] = filled[id(empty)]
        model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()


@contextmanager
def opened_weights(checkpoint: SourceCheckpoint, dtype: Dtype) -> Iterator[SavedWeights]:
    """The weights of a checkpoint, to be read in a dtype. Raises UserError where they are not those of the model that
    the block puts them into."""
    with checkpoint.weight_files(dtype) as folder:
        masters = wants_masters(checkpoint.state, dtype)
        try:
            yield SavedWeights(folder, zero_stage=checkpoint.state.zero_stage, masters=masters)
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"{checkpoint} does not hold the weights of the model that model.path or model.config describes: "
                f"{str(error).splitlines()[-1].strip()}"
            ) from error
