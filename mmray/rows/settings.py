"""The `data` part of the job file: where rows come from and what they look like."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mmray.base.settings import RowKind, Settings

FIELDS: dict[RowKind, tuple[str, ...]] = {
    "pretrain": ("id", "text", "images"),
    "chat": ("id", "messages", "conversations", "images"),
    "tokenized": ("id", "input_ids", "labels", "sampled_mask", "images"),
}

ONE_IMAGE = "image"
"""What LLaVA and its children call the image of a row; read where a row has no `images`."""


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

    images_first: bool = False
    """Put a placeholder and a line break for each image before a `pretrain` text that has no placeholder: captions of
    WebDataset shards and most datasets of Hugging Face name their image nowhere."""

    add_eos: bool = True
    """Append the end-of-document token to `pretrain` rows."""

    end_of_document: str | None = None
    """That token; default: the tokenizer's eos_token. Of Qwen's chat models that is the end of a turn, `<|im_end|>`;
    they were pre-trained with `<|endoftext|>`."""

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

    def record(self) -> dict[str, Any]:
        """The settings as plain JSON, for what a prepared dataset depends on. `members` came later: without it the
        record is that of earlier versions."""
        values = self.model_dump(mode="json")
        return values if self.members else {name: value for name, value in values.items() if name != "members"}

    @property
    def used_columns(self) -> tuple[str, ...]:
        """Names in the file of all that rows are made of."""
        names = [self.column(field) for field in FIELDS[self.kind]]
        return (*names, ONE_IMAGE) if self.column("images") == "images" else tuple(names)

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

    image_frames: Literal["first", "reject"] = "first"
    """Files of several pages or frames (TIFF, GIF, animated PNG, WebP, AVIF). `first`: the first is the image.
    `reject`: the row is set aside with the reason `image_frames`."""

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
