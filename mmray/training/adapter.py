"""Adapters by peft: put into a model before DeepSpeed wraps it, recorded in checkpoints, and read back.

peft replaces the adapted modules by its own, which hold the old ones as `base_layer`; the model stays an object of its
class, so everything that trains, evaluates and generates with a plain model does so with an adapted one. All weights of
the base are frozen: they cost no gradient and no optimizer state, and checkpoints leave them out where they lie in
files. Such a checkpoint knows the digests of the files (`base_weights.py`), and is of use with them alone.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from mmray.base.words import one_line
from mmray.errors import UserError
from mmray.training.adapter_settings import FREE_TO_CHANGE, AdapterSettings
from mmray.training.adapter_targets import AdapterTargets
from mmray.training.base_weights import BaseFiles
from mmray.training.deepspeed_config import import_deepspeed
from mmray.training.model import empty_model, knows_of_zero3, seeded
from mmray.training.quantized import quantised_layers
from mmray.training.settings import ModelSettings
from mmray.training.weights import listed

ADAPTER_FILE = "adapter.json"
NAME = "default"
"""The adapter's name in peft, which is a part of the names of its weights."""
PREFIX = "base_model.model."
"""Beginning of the names in an adapter's file, where peft's own wrapper is around the model."""
START_WEIGHTS = "adapter_model.safetensors"
"""File of an adapter's weights, as peft names it."""
NEW_RUN = "with the folder that `mmray export` makes of this one as model.path"
"""The way to go on with other weights than those of a checkpoint."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Adapter:
    """The adapter of a training: its settings, what it touches, and the base that it belongs to."""

    settings: AdapterSettings
    targets: AdapterTargets
    base: BaseFiles | None
    """The files of the base; None for a base with weights that were drawn at random, which checkpoints hold."""
    quantize: str | None = None
    """How the base is quantised; None where it is not."""
    drawn: str | None = None
    """Device and version of torch with which a base with random weights was drawn: others draw other numbers. None for
    a base in files."""

    @classmethod
    def of(
        cls, model: ModelSettings, settings: AdapterSettings, base: BaseFiles | None, device: torch.device = _CPU
    ) -> "Adapter":
        """The adapter of a job. device: where random weights are drawn. Raises UserError where its targets are not in
        the model."""
        empty = empty_model(model)
        targets = AdapterTargets.of(empty, settings)
        if model.quantize is not None:
            codes = {f"{name}.weight" for name in quantised_layers(empty)}
            if trained := [name for name in targets.whole if name in codes]:
                raise UserError(
                    f"training.adapter.save_whole: {listed(trained)} would be quantised (model.quantize) and cannot be "
                    "trained whole; adapt them, or leave model.quantize out"
                )
        drawn = f"{device.type}, torch {torch.__version__}" if base is None else None
        return cls(settings, targets, base, model.quantize, drawn)

    def record(self) -> dict[str, Any]:
        """The content of `adapter.json`."""
        base = None if self.base is None else self.base.digests
        return {
            "settings": self.settings.model_dump(mode="json"), "targets": asdict(self.targets), "base": base,
            "quantize": self.quantize, "drawn": self.drawn,
        }  # fmt: skip

    @classmethod
    def read(cls, checkpoint: Path) -> "Adapter | None":
        """The adapter that a checkpoint holds; None for a checkpoint without one. Raises UserError."""
        path = checkpoint / ADAPTER_FILE
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            targets = AdapterTargets(**{name: tuple(names) for name, names in content["targets"].items()})
            base = None if content["base"] is None else BaseFiles(content["base"])
            return cls(AdapterSettings(**content["settings"]), targets, base, content["quantize"], content["drawn"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} cannot be read: {one_line(error)}; it was written by another mmray") from error

    def write(self, checkpoint: Path) -> None:
        """Writes `adapter.json` into a checkpoint's folder."""
        (checkpoint / ADAPTER_FILE).write_text(json.dumps(self.record(), indent=1) + "\n")

    def config(self, base: str | None = None) -> Any:
        """peft's configuration. base: the folder or hub name of the base model, for whoever loads the adapter."""
        settings = self.settings
        alpha = int(settings.alpha) if float(settings.alpha).is_integer() else settings.alpha
        return _peft().LoraConfig(
            r=settings.rank, lora_alpha=alpha, lora_dropout=settings.dropout, use_dora=settings.kind == "dora",
            use_rslora=settings.rslora, target_modules=list(self.targets.modules),
            target_parameters=list(self.targets.parameters) or None, base_model_name_or_path=base,
        )  # fmt: skip

    def put_into(self, model: PreTrainedModel, seed: int = 0, zero3_config: dict[str, Any] | None = None) -> None:
        """Freezes a model and adds the adapter, which changes nothing yet: its product begins at zero.

        seed: of the thin matrices that begin at random values; they are drawn on the CPU, the same for every ZeRO
        stage, rank and device. zero3_config: the DeepSpeed configuration of a ZeRO-3 run. Raises UserError where peft
        is not installed.
        """
        inject = _peft().inject_adapter_in_model
        with seeded(seed, _CPU), nullcontext() if zero3_config is None else knows_of_zero3(zero3_config):
            inject(self.config(), model, NAME, low_cpu_mem_usage=model.device.type == "meta")
        whole = set(self.targets.whole)
        for name, parameter in plain_named_parameters(model):
            if name in whole:
                parameter.requires_grad_(True)
        if zero3_config is not None:
            self._gather_at_once(model)

    def _gather_at_once(self, model: PreTrainedModel) -> None:
        """Lets ZeRO-3 gather all weights of an adapted module together.

        DoRA and experts compute with the weights of modules inside them, which ZeRO-3 has for the calls of those alone.
        And the loss calls what is inside an adapted head once for each chunk of tokens: ranks with other numbers of
        tokens would gather other numbers of times, and wait for each other forever. ZeRO-3 lets go of the weights when
        the gradient of its input is there, so every input asks for one. Token ids cannot: raises UserError for an
        adapter on embeddings.
        """
        from deepspeed.utils.z3_leaf_module import set_z3_leaf_module

        for module in model.modules():
            if isinstance(module, _peft().tuners.tuners_utils.BaseTunerLayer):
                if isinstance(module.get_base_layer(), torch.nn.Embedding):
                    raise UserError(
                        "training.adapter: embeddings cannot be adapted with training.zero_stage 3; set zero_stage: 2, "
                        "or train them whole (save_whole: [embeddings])"
                    )
                set_z3_leaf_module(module, True)
                module.register_forward_pre_hook(_ask_for_gradient)

    def check_same(self, saved: "Adapter", checkpoint: Path) -> None:
        """Raises UserError, naming what differs, where a checkpoint holds another adapter, `saved`. Bases are not
        compared."""
        before, now = saved.settings.model_dump(), self.settings.model_dump()
        changed = [
            f"training.adapter.{name} was {before[name]}, is {now[name]}"
            for name in now if before[name] != now[name] and name not in FREE_TO_CHANGE
        ]  # fmt: skip
        if saved.quantize != self.quantize:
            changed.append(f"model.quantize was {saved.quantize}, is {self.quantize}")
        if changed:
            raise UserError(
                f"{checkpoint} holds another adapter: {'; '.join(changed)}. Set it back; or begin a new run "
                f"(output.run) {NEW_RUN}"
            )
        if saved.targets != self.targets:
            names = set(sum(asdict(saved.targets).values(), ())) ^ set(sum(asdict(self.targets).values(), ()))
            raise UserError(
                f"{checkpoint} holds another adapter: {listed(sorted(names))} are touched by one of the two alone. Use "
                "the mmray and transformers that it was written with"
            )

    def check_base(self, checkpoint: Path) -> None:
        """Raises UserError, naming what differs, where the adapter in a checkpoint belongs to another base."""
        saved = Adapter.read(checkpoint)
        assert saved is not None
        difference = ""
        if (saved.base is None) != (self.base is None):
            difference = "the base was " + ("random weights" if saved.base is None else "files (model.path)")
        elif saved.drawn != self.drawn:
            difference = f"its random base was drawn on {saved.drawn}, which here would be {self.drawn}"
        if difference:
            raise UserError(
                f"{checkpoint} holds an adapter of another base: {difference}. Set it back; or begin a new run "
                f"(output.run) {NEW_RUN}"
            )
        if self.base is not None and saved.base is not None:
            saved.base.check_equal(self.base, f"the adapter in {checkpoint}")


def check_adapter(checkpoint: Path, adapter: Adapter | None) -> None:
    """Raises UserError, naming what differs, where a checkpoint holds another adapter than the one that is to be
    trained, or one of both is None. Bases are not compared."""
    saved = Adapter.read(checkpoint)
    if adapter is not None and saved is not None:
        adapter.check_same(saved, checkpoint)
    elif saved is not None:
        raise UserError(
            f"{checkpoint} holds an adapter (training.adapter: {saved.settings.kind} of rank {saved.settings.rank}); "
            f"set it back; or, to train the whole weights, begin a new run (output.run) {NEW_RUN}"
        )
    elif adapter is not None:
        raise UserError(
            f"{checkpoint} is of a training without an adapter; remove training.adapter, or begin a new run "
            f"(output.run) {NEW_RUN}"
        )


def _ask_for_gradient(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lets the first input of an adapted module have a gradient, which goes no further."""
    first, *others = inputs
    if torch.is_grad_enabled() and first.is_floating_point() and not first.requires_grad:
        first = first.detach().requires_grad_()
    return first, *others


def plain_name(name: str) -> str:
    """The name in the plain model of a weight of an adapted one."""
    return name.replace(".base_layer", "")


def plain_named_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters of an adapted model that the plain model has, too, by their plain names."""
    return [(plain_name(name), parameter) for name, parameter in model.named_parameters() if not is_adapter(name)]


def is_adapter(name: str) -> bool:
    """True for the name of a weight that the adapter adds to the model."""
    return any(part.startswith("lora_") for part in name.split("."))


def trained_weights(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The weights of an adapted model that are trained, by name; a tied one by each of its names, which are plain."""
    named = model.named_parameters(remove_duplicate=False)
    return {name if is_adapter(name) else plain_name(name): weight for name, weight in named if weight.requires_grad}


def to_file_names(names: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of an adapter by their names in an adapter's file, from those in the adapted model."""
    magnitude = "lora_magnitude_vector"
    return {
        PREFIX
        + name.replace(f"{magnitude}.{NAME}.weight", magnitude)
        .replace(f".{NAME}.", ".")
        .removesuffix(f".{NAME}"): value
        for name, value in names.items()
    }


def check_start(model: PreTrainedModel, adapter: Adapter) -> None:
    """Checks that the folder `start_from` holds this adapter, by its configuration and the names and shapes of its
    weights, none of which is read.

    model: one that the adapter has been put into, with or without memory. Raises UserError, naming what differs.
    """
    folder = Path(adapter.settings.start_from or "")
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("adapter_config.json is no JSON object")
        with safe_open(folder / START_WEIGHTS, framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"training.adapter.start_from: {folder} holds no adapter that can be read: {one_line(error)}; give a "
            f"folder with adapter_config.json and {START_WEIGHTS}"
        ) from error
    wanted = adapter.config().to_dict()
    problems = [
        f"{name} is {config.get(name)} there and {wanted[name]} here"
        for name in ("peft_type", "r", "lora_alpha", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "bias")
        if (config.get(name) or None) != (wanted[name] or None)
    ]
    if not problems:
        problems = _differences(stored, to_file_names(trained_weights(model)))
    if problems:
        raise UserError(
            f"training.adapter.start_from: {folder} holds another adapter: {'; '.join(problems)}. Give rank, parts and "
            "save_whole of that adapter, or another folder"
        )
    if (saved := Adapter.read(folder)) is not None and saved.base is not None and adapter.base is not None:
        saved.base.check_equal(adapter.base, f"training.adapter.start_from: the adapter in {folder}")


def _differences(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Tensor]) -> list[str]:
    """How the weights in an adapter's file differ from those of an adapter, in words. stored: their shapes."""
    problems = []
    for what, names in (("lacks", wanted.keys() - stored.keys()), ("has also", stored.keys() - wanted.keys())):
        if names:
            problems.append(f"it {what} {listed(sorted(name.removeprefix(PREFIX) for name in names))}")
    shapes = {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in wanted.items()}
    misfits = [name for name in shapes.keys() & stored.keys() if stored[name] != shapes[name]]
    if misfits:
        problems.append(f"of another shape are {listed(sorted(name.removeprefix(PREFIX) for name in misfits))}")
    return problems


def load_start(model: PreTrainedModel, adapter: Adapter) -> None:
    """Puts the weights of `start_from` into a model that the adapter has been put into; under ZeRO-3 before DeepSpeed
    partitions them. Raises UserError as `check_start`."""
    check_start(model, adapter)
    stored: dict[str, Tensor] = load_file(Path(adapter.settings.start_from or "") / START_WEIGHTS)
    with torch.no_grad():
        for name, weight in to_file_names(trained_weights(model)).items():
            with _whole(weight):
                weight.copy_(stored[name].to(weight.dtype))


@contextmanager
def _whole(weight: torch.nn.Parameter) -> Iterator[None]:
    """Gathers a weight that ZeRO-3 has partitioned, and partitions it anew after the block, as rank 0 has it."""
    if not hasattr(weight, "ds_id"):
        yield
        return
    with import_deepspeed().zero.GatheredParameters([weight], modifier_rank=0):
        yield


def _peft() -> Any:
    """The peft module. Raises UserError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError(f"training.adapter needs peft: pip install 'mmray[adapters]' ({error})") from error
    return peft
