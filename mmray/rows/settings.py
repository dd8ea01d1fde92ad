"""The `data` part of the job file: where rows come from and what they look like."""

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
"""What LLaVA and its children call the image of a row; read where a row has no `images`."""


LIKE_IMAGES = tuple(
    f"{stem}{ending}"
    for stem in ("image", "img", "picture", "pic", "photo", "page_image", "scan", "image_path", "image_file")
    for ending in ("", "s")
)
"""Columns, in small letters, that look like images (`mmray.rows.columns`)."""

_OF_CHATS = ("roles", "ignore_message_keys", "allow_dropped", "chat_template_kwargs")
_LATER = (*_OF_CHATS, "own_token_text", "join_documents", "loss", "members", "pdf_dpi")
"""Settings that came after the first version of prepared datasets."""


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class DatasetSettings(Settings):
    """One set of rows. Several sets may be listed; their rows are dealt so that each is at its share everywhere."""

    files: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
    """Row files: paths, globs or URIs, one or a list. Order is the sorted order of each glob."""

    kind: RowKind
    """`pretrain` (`text`), `chat` (`messages` or ShareGPT `conversations`) or `tokenized` (`input_ids`, and
    `labels` or `sampled_mask`)."""

    format: Literal["auto", "jsonl", "csv", "tsv", "parquet", "arrow", "webdataset", "huggingface"] = "auto"
    """File format; `auto` goes by the first bytes of a file, and by its ending where they say nothing: `.csv`, `.tsv`,
    `.parquet`, `.arrow`, `.tar` (WebDataset shards), anything else is JSON lines or a JSON array. `huggingface`:
    `files` are folders that `Dataset.save_to_disk` wrote."""

    members: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
    """Members of a WebDataset shard that are read, by what stands behind the key: `[jpg, txt]`, or with `*` for
    numbers, `["*.jpg", json]`. Masks and second encodings are left out so. Default: all."""

    image_root: str | None = None
    """Folder or URI that image paths are relative to, and must stay inside. Default: the folder of the row file."""

    columns: dict[str, str] = Field(default_factory=dict)
    """Names in the file where they differ from mmray's: `{text: markdown, images: page_images}`."""

    placeholder: str = "<image>"
    """Text that stands for an image in `text` and in message strings. The model's own text for it works too."""

    own_token_text: str | None = None
    """Where rows speak of the model's own image token (`<image>` of LLaVA) and name their images by another
    `placeholder`: what stands in the text for it, such as `< image >`. Default: that token is an image, too."""

    images_first: bool = False
    """Put a placeholder and a line break for each image before a `pretrain` text that has no placeholder: captions of
    WebDataset shards and most datasets of Hugging Face name their image nowhere."""

    add_eos: bool = True
    """Append the end-of-document token to `pretrain` rows."""

    end_of_document: str | None = None
    """That token; default: the tokenizer's eos_token. Of Qwen's chat models that is the end of a turn, `<|im_end|>`;
    they were pre-trained with `<|endoftext|>`."""

    pdf_dpi: Annotated[int, Field(ge=18, le=1200)] | None = None
    """Pixels an inch of pages of PDFs in this set. Default: `images.pdf_dpi`."""

    join_documents: str | None = None
    """Text between the documents of one `pretrain` row, such as the tokenizer's end-of-document token where packed
    files join them by it. Each is read as that token, which is otherwise refused inside a text."""

    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(default_factory=dict)
    """Of `chat` rows: further names of roles, `{narrator: user}`."""

    ignore_message_keys: tuple[str, ...] = ()
    """Of `chat` rows: keys of messages and their parts that are not to be read. Any other key that mmray does not know
    rejects the row."""

    allow_dropped: tuple[Literal["reasoning"], ...] = ()
    """Of `chat` rows: what the chat template may leave out of the text. `reasoning`: thoughts, which the templates of
    thinking models keep in the last turn alone. Counted in the manifest. Anything else that is left out rejects the
    row."""

    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Of `chat` rows: variables for the chat template, such as `{enable_thinking: false}`. A row's own column of this
    name comes before it."""

    loss: LossSetting | None = None
    """Which tokens of this set train, where it is not as the job's `loss` says."""

    @field_serializer("loss")
    def _plain_loss(self, loss: Any) -> Any:
        return None if loss is None else loss_record(loss)

    def record(self) -> dict[str, Any]:
        """The settings as plain JSON, for a prepared dataset's record. Keys that came after its first version stand
        there only where they say something."""
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

    @property
    def used_columns(self) -> tuple[str, ...]:
        """Names in the file of all that rows are made of, and those by which a set is judged."""
        names = [self.column(field) for field in FIELDS[self.kind]]
        return tuple(dict.fromkeys((*names, *(LIKE_IMAGES if self.column("images") == "images" else ()))))

    def column(self, field: str) -> str:
        """The name in the file of one of mmray's fields."""
        return self.columns.get(field, field)


class DataSettings(Settings):
    """Rows to train and evaluate on."""

    train: Annotated[tuple[DatasetSettings, ...], Field(min_length=1)]
    """Sets of rows to train on."""

    eval: tuple[DatasetSettings, ...] = ()
    """Sets of rows to evaluate on; packed like the training rows, never shuffled."""

    on_bad_row: Literal["reject", "error"] = "reject"
    """`reject`: a row that cannot be used goes to rejected.parquet with its reason; a sample whose picture is found to
    be gone or broken only when training is left out of the loss, whole, and listed in the run's skipped.jsonl.
    `error`: the first one stops."""

    max_rejected_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Preparing stops when more than this share of the rows of a set is rejected, and more than 20, or when none of its
    first 64 rows can be used: a wrong column, image root or capacity rather than a few odd rows. 1: any number may be
    rejected."""

    max_skipped_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Training stops when more than this share of the last 10,000 samples was left out, and more than 20: then storage
    is away rather than some pictures broken."""

    duplicate_ids: Literal["keep", "reject"] = "keep"
    """Rows whose id a row of the split has that is dealt earlier. `keep`: they train too, as in files listed twice on
    purpose; the manifest counts them. `reject`: they are set aside with the reason `duplicate_id`; all rows are read
    once more."""

    image_frames: Literal["first", "all", "reject"] = "first"
    """Files of several pages or frames (TIFF, GIF, animated PNG, WebP, AVIF). `first`: the first is the image; the
    manifest counts such files. `all`: each is an image with a placeholder of its own, for which every file is opened
    once more. `reject`: the row is set aside with the reason `image_frames`."""

    max_image_pixels: Annotated[int, Field(gt=0)] = 250_000_000
    """Images with more pixels (width × height, from the header) are refused."""

    size_cache: str | None = None
    """Where the sizes of images are kept from one prepare to the next, so that images whose files have not changed are
    not opened again: a file (`.parquet`) or a folder, by path or URI. It never changes what is prepared."""

    verify_rows: Annotated[int, Field(ge=0)] = 16
    """Rows of each prepare, drawn by a fixed seed, whose tokens are compared with the real processor's (run on blank
    pages of the same sizes, so that nothing is decoded). A difference stops the job."""

    @property
    def splits(self) -> dict[str, tuple[DatasetSettings, ...]]:
        """The sets of rows of `train` and, where there are any, of `eval`."""
        return {"train": self.train} | ({"eval": self.eval} if self.eval else {})

    @property
    def lenient(self) -> Self:
        """The same settings with bad rows rejected, for looking at rows without stopping at the first bad one."""
        return self.model_copy(update={"on_bad_row": "reject"})
