"""The `loss` setting of the job file: which tokens of a sample are trained on.

Three modes: what the model would have sampled (`sampled`), every token (`all`), or the turns of some roles
(`RoleLoss`). `mmray.loss.sources` turns the setting into labels for a model family.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter, model_validator

from mmray.base.settings import Settings

TrainOnEos = Literal["turn", "all", "last", "none"]

SAMPLED_ROLE = "assistant"
"""Role whose turns a model samples."""


class BoundarySettings(Settings):
    """The text around the turns of one role."""

    role: str
    """Name of the role, as `roles` uses it. A role may have several boundaries."""
    start: str
    """Text that opens a turn, for example `<|im_start|>assistant\\n`. If several starts match, the longest wins, then
    the one written first."""
    end: Annotated[str, Field(min_length=1)] | None = None
    """Text that closes the turn. `eos_token` stands for the tokenizer's own; null: the turn ends with the sample."""
    include_start: bool = False
    """Train on the opening text too."""
    include_end: bool = True
    """Make the closing text part of the turn, trained on as `train_on_eos` says. false: it is not trained on, and may
    open the next turn."""
    until_next: bool = False
    """Continue the turn, which has no closing text, to the next `start` of any boundary or to the end of the sample."""

    @model_validator(mode="after")
    def _ends_in_one_way(self) -> "BoundarySettings":
        if self.until_next and self.end is not None:
            raise ValueError(f"until_next and end exclude each other; keep one (end is {self.end!r})")
        return self


class RoleLoss(Settings):
    """Loss on the turns of some roles, which are located by the text around them."""

    roles: tuple[str, ...] = (SAMPLED_ROLE,)
    """Roles whose turns are trained on."""
    train_on_eos: TrainOnEos = "turn"
    """Closing markers that are trained on. `turn`: those of trained turns; `all`: those of all turns; `last`: that of
    the last trained turn; `none`: none."""
    train_on_inputs: bool = False
    """Train on every token except media, whatever the role."""
    boundaries: tuple[BoundarySettings, ...] | None = None
    """Role boundaries to use instead of the model family's."""
    turns: Literal["all", "last"] = "all"
    """In `chat` rows, which turns are trained on. `all`: every turn of the trained roles; `last`: only the last of
    these in each row."""
    reasoning: Literal["all", "last", "none"] = "all"
    """In `chat` rows, which thoughts are trained on. `all`: those of every trained turn; `last`: only those of the last
    trained turn; `none`: none, for a model that is to answer at once."""
    train_empty_thoughts: bool = True
    """In `chat` rows, train on the empty think block that some templates write for a turn without a thought. false: the
    model does not learn to skip thinking."""
    allow_empty: bool = False
    """Keep rows without a trained token, and allow an empty `roles`. false: such rows are rejected."""

    @model_validator(mode="after")
    def _trains_something(self) -> "RoleLoss":
        if not self.roles and not self.allow_empty and not self.train_on_inputs:
            raise ValueError("roles: [] trains nothing; name a role, or set allow_empty: true")
        return self

    @property
    def chooses_messages(self) -> bool:
        """True if the settings leave out turns or thoughts, which only a chat's messages identify."""
        return any(getattr(self, name) != type(self).model_fields[name].default for name in _BY_MESSAGES)

    @model_validator(mode="after")
    def _trains_one_way(self) -> "RoleLoss":
        chosen = [name for name in _BY_TURNS if getattr(self, name) != type(self).model_fields[name].default]
        if self.train_on_inputs and chosen:
            raise ValueError(
                f"train_on_inputs: true trains every token, and leaves {', '.join(chosen)} without meaning; keep "
                f"train_on_inputs or {', '.join(chosen)}"
            )
        return self


_BY_MESSAGES = ("turns", "reasoning", "train_empty_thoughts")
"""Keys of `RoleLoss` that boundaries cannot express, because only a chat's messages identify what they choose."""
_BY_TURNS = ("roles", "train_on_eos", "boundaries", *_BY_MESSAGES)
"""Keys of `RoleLoss` that choose turns to train on, and parts of them."""


def _mode(value: Any) -> str | None:
    """Return the tag of a value's kind for pydantic; None for a value that is neither."""
    if isinstance(value, (dict, RoleLoss)):
        return "RoleLoss"
    return "word" if value in ("sampled", "all") else None


Loss = Literal["sampled", "all"] | RoleLoss
LossSetting = Annotated[
    Annotated[Literal["sampled", "all"], Tag("word")] | Annotated[RoleLoss, Tag("RoleLoss")],
    Discriminator(
        _mode,
        custom_error_type="loss",
        custom_error_message="Input should be 'sampled', 'all' or keys such as roles:",
    ),
]
"""`Loss` as the job file reads it; errors speak only of the kind of value that was meant."""

_ADAPTER: TypeAdapter[Loss] = TypeAdapter(LossSetting)


def loss_record(loss: Loss) -> Any:
    """Return the setting as plain JSON, without newer keys that have their default, as older versions wrote it."""
    record = _ADAPTER.dump_python(loss, mode="json")
    if isinstance(loss, RoleLoss):
        later = [name for name in _BY_MESSAGES if getattr(loss, name) == RoleLoss.model_fields[name].default]
        return {name: value for name, value in record.items() if name not in later}
    return record


def loss_of_record(record: Any) -> Loss:
    """Read a setting that `loss_record` wrote."""
    return _ADAPTER.validate_python(record)


def allows_empty(loss: Loss) -> bool:
    """Tell whether rows without a trained token are kept."""
    return isinstance(loss, RoleLoss) and loss.allow_empty
