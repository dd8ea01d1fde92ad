"""The `training.adapter` part of the job file."""

from typing import Literal, Self

from pydantic import Field, model_validator

from mmray.base.settings import Settings

FREE_TO_CHANGE = ("dropout", "start_from")
"""Settings of an adapter that a resumed run may change: its weights stay what they are, and what they began with is
done."""


class AdapterSettings(Settings):
    """An adapter (LoRA, by peft): small matrices beside frozen weights are trained, and the weights stay as they
    are."""

    kind: Literal["lora", "dora"] = "lora"
    """Kind of adapter. lora: a product of two thin matrices is added to each adapted matrix. dora: the same, with the
    lengths of the matrix's rows trained apart, which costs more time."""

    rank: int = Field(default=16, ge=1)
    """Width of the thin matrices."""

    alpha: float = Field(default=32.0, gt=0)
    """Scale of the adapter: its product is multiplied by alpha / rank."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapted module's inputs that the adapter does not see in training, drawn at random."""

    parts: tuple[str, ...] = Field(default=("language",), min_length=1)
    """Adapted layers: parts of the model (vision, projector, language, embeddings), which stand for all their linear
    layers and experts, or patterns of module names with `*` for any text, such as `q_proj` or `model.visual.*.qkv`. A
    pattern also matches the end of a name, and a module stands for the layers in it. One that matches nothing is an
    error."""

    rslora: bool = False
    """Scale by alpha / √rank (rank-stabilised LoRA), for ranks of 64 and more."""

    save_whole: tuple[str, ...] = ()
    """Weights outside the adapter that are trained and saved whole, such as [projector, embeddings]: parts, or patterns
    of the names of modules or weights."""

    start_from: str | None = None
    """Folder of a trained adapter, of peft or from `mmray export --adapter`, whose weights a new run begins with. It
    must adapt the same modules with the same rank."""

    @model_validator(mode="after")
    def _not_both(self) -> Self:
        if both := [name for name in self.parts if name in self.save_whole]:
            raise ValueError(f"{both[0]!r} is in parts and in save_whole: it is either adapted or trained whole")
        return self
