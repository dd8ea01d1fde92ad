"""Records what a prepared dataset depends on, and hashes the record.

Two prepares with equal records give byte-equal bins; `differences` names, key by key, how two records differ.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from mmray.errors import UserError
from mmray.images import TilingPolicy
from mmray.loss.settings import Loss, loss_record
from mmray.packing.settings import PackingSettings
from mmray.prepared.schema import FORMAT_VERSION
from mmray.rows.dealing import DEALING
from mmray.rows.files import SourceFile
from mmray.rows.settings import DatasetSettings, DataSettings


def processor_record(processor: Any) -> dict[str, str]:
    """The record of a processor: hashes of the parts that decide tokens and image sizes."""
    image_settings = {
        key: value for key, value in processor.image_processor.to_dict().items() if not key.startswith("_")
    }
    # Attributes of the processor itself, such as patch sizes and the tokens of a picture.
    settings = {name: value for name, value in vars(processor).items() if isinstance(value, (int, float, str))}
    settings = {name: value for name, value in settings.items() if not name.startswith("_") and name != "chat_template"}
    return {
        "class": type(processor).__name__,
        "tokenizer": _tokenizer_hash(processor.tokenizer.backend_tokenizer.to_str()),
        "special_tokens": _hash(processor.tokenizer.special_tokens_map),
        "chat_template": _hash(processor.chat_template),
        "image_processor": _hash(image_settings),
        "settings": _hash(settings),
    }


def prepare_record(
    *, files: Sequence[SourceFile], datasets: Sequence[DatasetSettings], data: DataSettings, processor: Any,
    tiling: TilingPolicy, packing: PackingSettings, loss: Loss, costs: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The record of everything that changes the result of a prepare, as plain JSON.

    costs: `BalanceSettings.cost_record`; part of the record only when bins are packed to equal cost.
    """
    return {
        "format_version": FORMAT_VERSION,
        **({"costs": costs} if packing.mode == "equal_cost" else {}),
        **({"dealing": DEALING} if len(files) > 1 else {}),  # one file is dealt as it always was
        "files": [f"{file.uri} size={file.size} version={file.version}" for file in files],
        "datasets": [dataset.record() for dataset in datasets],
        **data.how_many_record(datasets),
        "max_image_pixels": data.max_image_pixels,
        "image_frames": data.image_frames,
        "duplicate_ids": data.duplicate_ids,
        **settings_record(processor=processor, tiling=tiling, packing=packing, loss=loss),
    }


def settings_record(*, processor: Any, tiling: TilingPolicy, packing: PackingSettings, loss: Loss) -> dict[str, Any]:
    """The part of a record that training shares with preparing, as plain JSON."""
    return {
        "processor": processor_record(processor),
        "tiling": tiling.record(),
        "packing": packing.model_dump(mode="json"),
        "loss": loss_record(loss),
    }


def check_settings(
    path: str, record: dict[str, Any], *, processor: Any, tiling: TilingPolicy, packing: PackingSettings,
    loss: Loss, datasets: Sequence[DatasetSettings], data: DataSettings,
) -> None:  # fmt: skip
    """Raise UserError when a prepared dataset was made with another processor or other settings than the job's.

    record: the record in the dataset's manifest. Of the sets of rows only their own `loss`, and how many rows are
    taken, are compared. The row files are not checked: a user may delete them once they are prepared.
    """
    now = settings_record(processor=processor, tiling=tiling, packing=packing, loss=loss)
    before = {key: record[key] for key in now} | _of_sets(record["datasets"])
    before |= {f"data.{name}": record.get(name) for name in _DATA}
    now |= _of_sets([dataset.record() for dataset in datasets])
    now |= {f"data.{name}": data.how_many_record(datasets).get(name) for name in _DATA}
    lines = differences(before, json.loads(json.dumps(now)))
    if lines:
        shown = "\n  ".join(lines[:8])
        raise UserError(
            f"{path} was prepared with other settings than the job has now:\n  {shown}\n"
            "Prepare it anew: jobs/prepare.py --replace"
        )


_COMPARED = ("loss", "repeat", "max_rows", "take", "weight")
"""Settings of a set of rows that must be those of the job that trains."""
_DATA = ("rows", "weigh_by", "seed")
"""Settings beside those of the sets that must be those of the job that trains."""


def _of_sets(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The compared settings of each set, as far as it has them."""
    return {
        f"datasets[{number}].{name}": record[name]
        for number, record in enumerate(records)
        for name in _COMPARED
        if name in record
    }


def fingerprint(record: dict[str, Any]) -> str:
    """The hash of a record, 16 hex digits."""
    return _hash(record)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines `path: old -> new` for every leaf in which two records differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, (a, b) in enumerate(zip(old, new)) for line in differences(a, b, f"{path}[{i}]")]
    return [] if old == new else [f"{path}: {old!r:.120} -> {new!r:.120}"]


_tokenizer_hashes: dict[bytes, str] = {}


def _tokenizer_hash(written: str) -> str:
    """The hash of a tokenizer's settings, as it writes them. It is kept: reading a large vocabulary takes a second, and
    one command asks for the record several times."""
    key = hashlib.blake2b(written.encode()).digest()
    if key not in _tokenizer_hashes:
        calls = ("truncation", "padding")  # left by the last call of the tokenizer; mmray uses neither
        settings = {name: value for name, value in json.loads(written).items() if name not in calls}
        _tokenizer_hashes[key] = _hash(settings)
    return _tokenizer_hashes[key]


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
