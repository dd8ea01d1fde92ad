"""The `loss` setting of the job file as it is written: which tokens of a sample train.

Three modes: what the model would have sampled (`sampled`), every token (`all`), or the turns of some roles. What a
model family makes of the setting is in `mmray.loss.sources`.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter, model_validator

from mmray.base.settings import Settings

TrainOnEos = Literal["turn", "all", "last", "none"]

SAMPLED_ROLE = "assistant"
"""The role whose turns a model samples."""


class BoundarySettings(Settings):
    """The text around the turns of one role."""

    role: str
    """The role's name, as `roles` uses it. A role may have several boundaries."""
    start: str
    """Text that opens a turn, for example `<|im_start|>assistant\\n`. Of several that match, the longest wins, then the
    one written first."""
    end: Annotated[str, Field(min_length=1)] | None = None
    """Text that closes it; `eos_token` stands for the tokenizer's; null: the sample's end."""
    include_start: bool = False
    """Train the opening text too."""
    include_end: bool = True
    """The closing text belongs to the turn: it is consumed, and trained as `train_on_eos` says. false: it is not
    trained, and may open the next turn."""
    until_next: bool = False
    """No closing text: the turn goes on to where any boundary's `start` stands, or to the sample's end."""

    @model_validator(mode="after")
    def _ends_in_one_way(self) -> "BoundarySettings":
        if self.until_next and self.end is not None:
            raise ValueError(f"until_next and end exclude each other; keep one (end is {self.end!r})")
        return self


class RoleLoss(Settings):
    """Loss on the turns of some roles, found by the text around them."""

    roles: tuple[str, ...] = (SAMPLED_ROLE,)
    """Roles whose turns are trained."""
    train_on_eos: TrainOnEos = "turn"
    """Closing markers to train: of the trained turns, of all turns, of the last trained turn, or none."""
    train_on_inputs: bool = False
    """Train every token but media, whatever the role."""
    boundaries: tuple[BoundarySettings, ...] | None = None
    """Role boundaries to use instead of the model family's."""
    turns: Literal["all", "last"] = "all"
    """Of `chat` rows: turns to train. `last`: only the last of the trained roles' turns in each row."""
    reasoning: Literal["all", "last", "none"] = "all"
    """Of `chat` rows: thoughts of trained turns to train. `last`: only those of the last trained turn; `none`: never,
    as for a model that is to answer at once."""
    train_empty_thoughts: bool = True
    """Of `chat` rows: train the empty think block that some templates write where a turn has no thought. false: the
    model does not learn to think nothing."""
    allow_empty: bool = False
    """Keep rows that train no token, and allow an empty `roles`; else such rows are rejected."""

    @model_validator(mode="after")
    def _trains_something(self) -> "RoleLoss":
        if not self.roles and not self.allow_empty and not self.train_on_inputs:
            raise ValueError("roles: [] trains nothing; name a role, or set allow_empty: true")
        return self

    @property
    def chooses_messages(self) -> bool:
        """Something is left out that only a chat's messages tell: turns but the last, or thoughts."""
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
"""Keys of `RoleLoss` that boundaries cannot express: what they choose is known from a chat's messages alone."""
_BY_TURNS = ("roles", "train_on_eos", "boundaries", *_BY_MESSAGES)
"""Keys of `RoleLoss` that say which turns train, and what of them."""


def _mode(value: Any) -> str | None:
    """The tag of a value's kind; None for what is neither."""
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
"""`Loss` as the job file reads it: of a value only the kind that was meant is spoken of."""

_ADAPTER: TypeAdapter[Loss] = TypeAdapter(LossSetting)


def loss_record(loss: Loss) -> Any:
    """The setting as plain JSON. Keys that came later are left out where they say what was so before them."""
    record = _ADAPTER.dump_python(loss, mode="json")
    if isinstance(loss, RoleLoss):
        later = [name for name in _BY_MESSAGES if getattr(loss, name) == RoleLoss.model_fields[name].default]
        return {name: value for name, value in record.items() if name not in later}
    return record


def loss_of_record(record: Any) -> Loss:
    """The inverse of `loss_record`."""
    return _ADAPTER.validate_python(record)


def allows_empty(loss: Loss) -> bool:
    """Whether rows that train no token are kept."""
    return isinstance(loss, RoleLoss) and loss.allow_empty
