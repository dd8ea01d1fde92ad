"""The `data` part of the job file: where rows come from and what they look like."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_serializer, model_validator

from mmray.base.settings import RowKind, Settings
from mmray.loss.settings import LossSetting, RoleLoss, loss_record

FIELDS: dict[RowKind, tuple[str, ...]] = {
    "pretrain": ("id", "text", "images"),
    "chat": ("id", "messages", "conversations", "images", "system", "tools", "chat_template_kwargs"),
    "tokenized": ("id", "input_ids", "labels", "sampled_mask", "attention_mask", "images"),
}

ONE_IMAGE = "image"
"""Column in which LLaVA and its descendants name a row's image; read where a row has no `images`."""


FUNCTIONS = "functions"
"""Column in which OpenAI's older form names a chat's tools; read where a row has no `tools`."""


LIKE_IMAGES = tuple(
    f"{stem}{ending}"
    for stem in ("image", "img", "picture", "pic", "photo", "page_image", "scan", "image_path", "image_file")
    for ending in ("", "s")
)
"""Names of columns, in lower case, that look like images (`mmray.rows.columns`)."""

_OF_CHATS = ("roles", "ignore_message_keys", "allow_dropped", "chat_template_kwargs")
_HOW_MANY = ("repeat", "max_rows", "take", "weight")
"""Settings that say how many rows of a set are taken."""
_LATER = (*_OF_CHATS, "own_token_text", "join_documents", "loss", "members", "pdf_dpi", *_HOW_MANY)
"""Settings that came after the first version of prepared datasets."""


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class DatasetSettings(Settings):
    """A set of rows. If several sets are listed, their rows are dealt in proportion, so that every part of the data
    holds each set at its share."""

    files: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
    """Row files: one path, glob or URI, or a list of them. Files of a glob are read in sorted order."""

    kind: RowKind
    """Kind of the rows. `pretrain`: `text`; `chat`: `messages` or ShareGPT `conversations`; `tokenized`: `input_ids`,
    and `labels` or `sampled_mask`."""

    format: Literal["auto", "jsonl", "csv", "tsv", "parquet", "arrow", "webdataset", "huggingface"] = "auto"
    """File format. `auto` looks at the first bytes of a file, and at its ending where they do not tell: `.csv`, `.tsv`,
    `.parquet`, `.arrow`, `.tar` (WebDataset shards); anything else is JSON lines or a JSON array. `huggingface`:
    `files` are folders that `Dataset.save_to_disk` wrote."""

    members: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
    """Members of a WebDataset shard to read, named by the part after the key: `[jpg, txt]`, or with `*` for numbers,
    `["*.jpg", json]`. This leaves out masks and second encodings. Default: all."""

    image_root: str | None = None
    """Folder or URI that image paths are relative to and must stay inside. Default: the folder of the row file."""

    columns: dict[str, str] = Field(default_factory=dict)
    """Column names in the file that differ from mmray's, as mmray's name to the file's: `{text: markdown, images:
    page_images}`."""

    placeholder: str = "<image>"
    """Text that stands for an image in `text` and in message strings. The model's own image text also works."""

    own_token_text: str | None = None
    """Replacement text for the model's own image token (`<image>` of LLaVA), such as `< image >`, in rows that mention
    that token and mark their images with another `placeholder`. Default: that token counts as an image too."""

    images_first: bool = False
    """Put a placeholder and a line break for each image before a `pretrain` text that has no placeholder. Captions of
    WebDataset shards and most Hugging Face datasets have none."""

    add_eos: bool = True
    """Append the end-of-document token to `pretrain` rows."""

    end_of_document: str | None = None
    """End-of-document token of `pretrain` rows. Default: the tokenizer's eos_token, which for Qwen's chat models is the
    end of a turn, `<|im_end|>`; they were pre-trained with `<|endoftext|>`."""

    pdf_dpi: Annotated[int, Field(ge=18, le=1200)] | None = None
    """Resolution of PDF pages of this set, in pixels per inch. Default: `images.pdf_dpi`."""

    join_documents: str | None = None
    """Text between the documents of one `pretrain` row, such as the tokenizer's end-of-document token in files packed
    with it. Each occurrence is read as the end-of-document token, which is otherwise refused inside a text."""

    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(default_factory=dict)
    """In `chat` rows, additional role names, each with the role it stands for: `{narrator: user}`."""

    ignore_message_keys: tuple[str, ...] = ()
    """In `chat` rows, keys of messages and their parts to ignore. Any other key that mmray does not know rejects the
    row."""

    allow_dropped: tuple[Literal["reasoning"], ...] = ()
    """In `chat` rows, content that the chat template may drop. `reasoning`: thoughts, which the templates of thinking
    models keep in the last turn only; the manifest counts such rows. A row that loses anything else is rejected."""

    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """In `chat` rows, variables for the chat template, such as `{enable_thinking: false}`. A column of this name in the
    row takes precedence."""

    loss: LossSetting | None = None
    """Choice of the tokens of this set that are trained on. Default: the job's `loss`."""

    repeat: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)] | None = None
    """How many times each row of this set is taken. 2.5: every row twice, and a drawn half of them once more; 0.1: a
    drawn tenth. Which rows are drawn depends on `data.seed` and the place of each row alone. Default: once."""

    max_rows: Annotated[int, Field(gt=0)] | None = None
    """Largest number of rows of this set that are taken; the others are left out and counted."""

    take: Literal["sampled", "first"] = "sampled"
    """Choice of the rows that `max_rows` takes. `sampled`: rows drawn evenly over the whole set; `first`: its first
    rows, in the order of its files."""

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Share of this set among `data.rows`, relative to the weights of the other sets: rows are left out or repeated
    until the set has its share. All sets of `data.train` have a weight, or none has."""

    @field_serializer("loss")
    def _plain_loss(self, loss: Any) -> Any:
        return None if loss is None else loss_record(loss)

    def record(self) -> dict[str, Any]:
        """Return the settings as plain JSON for a prepared dataset's record.

        Settings newer than the first version of the record are left out if they are empty.
        """
        values = self.model_dump(mode="json")
        fields = type(self).model_fields
        empty = {name for name in _LATER if getattr(self, name) == fields[name].get_default(call_default_factory=True)}
        return {name: value for name, value in values.items() if name not in empty}

    @model_validator(mode="after")
    def _known_columns(self) -> "DatasetSettings":
        for name in self.columns:
            if name not in FIELDS[self.kind]:
                raise ValueError(
                    f"columns: {name!r} is not a field of {self.kind} rows; they have {', '.join(FIELDS[self.kind])}"
                )
        if not self.placeholder:
            raise ValueError("placeholder must not be empty")
        return self

    @model_validator(mode="after")
    def _fit_the_kind(self) -> "DatasetSettings":
        wrong = [name for name in _OF_CHATS if getattr(self, name) and self.kind != "chat"]
        if wrong:
            raise ValueError(f"{wrong[0]} is for chat rows; this set has {self.kind} rows")
        if self.join_documents is not None and (self.kind != "pretrain" or not self.join_documents):
            raise ValueError("join_documents is the text between documents of pretrain rows; it must not be empty")
        if self.loss is not None and self.kind == "pretrain":
            raise ValueError("loss: every token of pretrain rows trains; leave it out")
        if isinstance(self.loss, RoleLoss) and self.loss.allow_empty:
            raise ValueError("loss: allow_empty is for the job's loss; leave it out here")
        return self

    @model_validator(mode="after")
    def _says_once_how_many(self) -> "DatasetSettings":
        named = [name for name in ("repeat", "max_rows", "weight") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(
                f"{' and '.join(named)} each say how many rows of the set are taken: keep one of them, or list the "
                "files as two sets"
            )
        if self.take != "sampled" and self.max_rows is None:
            raise ValueError("take says which rows max_rows takes: set max_rows, or leave take out")
        return self

    def how_many_record(self) -> dict[str, Any]:
        """Return the settings that say how many rows are taken, as plain JSON; empty where each row is taken once."""
        return {name: value for name, value in self.record().items() if name in _HOW_MANY}

    @property
    def used_columns(self) -> tuple[str, ...]:
        """Column names in the file that rows are made of, and those that look like images, by which a set is judged."""
        names = [self.column(field) for field in FIELDS[self.kind]]
        names += [FUNCTIONS] if self.kind == "chat" else []
        return tuple(dict.fromkeys((*names, *(LIKE_IMAGES if self.column("images") == "images" else ()))))

    def column(self, field: str) -> str:
        """Return the column name in the file of one of mmray's fields."""
        return self.columns.get(field, field)


class DataSettings(Settings):
    """Rows to train and evaluate on."""

    train: Annotated[tuple[DatasetSettings, ...], Field(min_length=1)]
    """Sets of rows to train on."""

    eval: tuple[DatasetSettings, ...] = ()
    """Sets of rows to evaluate on; packed like the training rows, never shuffled."""

    rows: Annotated[int, Field(gt=0)] | None = None
    """Number of rows that all sets of `train` give together, each by its `weight`. A set with fewer rows than its share
    is repeated, of a larger one rows are drawn."""

    weigh_by: Literal["rows", "tokens"] = "rows"
    """Unit of the shares that weights are. `rows`: each set has its share of `data.rows`. `tokens`: each set has its
    share of the tokens; preparing encodes 512 drawn rows of each set to learn how long its rows are, so shares are met
    within the accuracy of that sample."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed by which rows are drawn for `repeat`, `max_rows` and `weight`."""

    on_bad_row: Literal["reject", "error"] = "reject"
    """`reject`: a row that cannot be used is written to rejected.parquet with its reason; a sample with an image that
    turns out to be missing or broken only during training is left out of the loss entirely and listed in the run's
    skipped.jsonl. `error`: the first such row or sample stops the job."""

    max_rejected_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Largest share of a set's rows that may be rejected. Preparing stops above it, once more than 20 rows are
    rejected, and also if none of the set's first 64 rows can be used: both point to a wrong column, image root or
    capacity, not to a few odd rows. 1: any number may be rejected."""

    max_skipped_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Largest share of the last 10,000 samples that may be left out of the loss. Training stops above it, once more
    than 20 are left out. A share that high means the storage is unreachable, not that pictures are broken."""

    duplicate_ids: Literal["keep", "reject"] = "keep"
    """Treatment of rows whose id an earlier row of the split has, in the order in which rows are dealt. `keep`: they
    are trained on too, as in files listed twice on purpose; the manifest counts them. `reject`: they are set aside with
    the reason `duplicate_id`; finding them reads all rows once more."""

    image_frames: Literal["first", "all", "reject"] = "first"
    """How files of several pages or frames are read (TIFF, GIF, animated PNG, WebP, AVIF). `first`: the first frame is
    the image; the manifest counts such files. `all`: each frame is an image with a placeholder of its own; every file
    is opened once more for it. `reject`: the row is set aside with the reason `image_frames`."""

    max_image_pixels: Annotated[int, Field(gt=0)] = 250_000_000
    """Largest number of pixels (width × height, from the header) of an image; larger images are refused."""

    size_cache: str | None = None
    """Cache of image sizes, kept from one prepare to the next so that images whose files have not changed are not
    opened again: a file (`.parquet`) or a folder, by path or URI. It never changes what is prepared."""

    verify_rows: Annotated[int, Field(ge=0)] = 16
    """Number of rows of each prepare, drawn by a fixed seed, whose tokens are compared with the real processor's (run
    on blank pages of the same sizes, so that nothing is decoded). A difference stops the job."""

    @model_validator(mode="after")
    def _weights_fit_together(self) -> "DataSettings":
        without = [number for number, dataset in enumerate(self.train) if dataset.weight is None]
        if len(without) == len(self.train):
            if self.rows is not None:
                raise ValueError("rows are dealt out by weight: give every set of train a weight, or leave rows out")
            if self.weigh_by != "rows":
                raise ValueError("weigh_by says what weights are of: give every set of train a weight, or leave it out")
        elif without:
            raise ValueError(f"train[{without[0]}] has no weight, and other sets have one: give every set a weight")
        elif self.rows is None:
            raise ValueError("train has weights but no number of rows to deal out by them: set data.rows")
        for number, dataset in enumerate(self.eval):
            if dataset.weight is not None:
                raise ValueError(f"eval[{number}].weight: weights deal out the rows of train; use max_rows or repeat")
            if dataset.repeat is not None and dataset.repeat > 1:
                raise ValueError(
                    f"eval[{number}].repeat is {dataset.repeat:g}: an evaluation counts each row once at most; leave "
                    "it out, or set it below 1"
                )
        return self

    def how_many_record(self, datasets: Sequence[DatasetSettings]) -> dict[str, Any]:
        """Return the settings that say, beside those of the sets of a split, how many rows are taken, as plain JSON."""
        weights = {"rows": self.rows, "weigh_by": self.weigh_by} if any(dataset.weight for dataset in datasets) else {}
        draws = any(dataset.how_many_record() for dataset in datasets)
        return weights | ({"seed": self.seed} if draws and self.seed else {})

    @property
    def splits(self) -> dict[str, tuple[DatasetSettings, ...]]:
        """Sets of rows of `train` and, if there are any, of `eval`."""
        return {"train": self.train} | ({"eval": self.eval} if self.eval else {})

    @property
    def lenient(self) -> Self:
        """Copy of the settings that rejects bad rows, for looking at rows without stopping at the first bad one."""
        return self.model_copy(update={"on_bad_row": "reject"})
