"""The files that are copied beside exported weights: the processor's, generation settings, a model's own code.

They are copied and not saved anew: mmray's processor has no video processor, so the output of its `save_pretrained`
does not load.
"""

import shutil
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from mmray.base.words import one_line
from mmray.errors import UserError
from mmray.training.settings import ModelSettings

WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack",
    "*.index.json", "*.npz",
)  # fmt: skip
"""Names of files with weights, which a source folder may hold beside its processor."""

GENERATION_CONFIG = "generation_config.json"


def copy_processor(source: str, folder: Path) -> None:
    """Copies all files of a processor's folder or hub name, except weights and hidden files. Raises UserError."""
    _copy(_local(source), folder)


def copy_generation_config(settings: ModelSettings, folder: Path) -> None:
    """Copies the generation settings, where the folder of the model's weights or configuration has any."""
    for source in (settings.path, settings.config):
        if isinstance(source, str) and not Path(source).is_file():
            file = _local(source) / GENERATION_CONFIG
            if file.is_file():
                shutil.copyfile(file, folder / GENERATION_CONFIG)


def copy_code(settings: ModelSettings, folder: Path) -> None:
    """Copies the Python files of a model's own code."""
    for source in (settings.path, settings.config):
        if isinstance(source, str) and not Path(source).is_file():
            _copy(_local(source), folder, patterns=("*.py",))


def _copy(source: Path, folder: Path, patterns: Sequence[str] = ("*",)) -> None:
    for path in _files(source):
        name = path.relative_to(source)
        if any(fnmatch(path.name, pattern) for pattern in patterns):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def _files(source: Path) -> Iterator[Path]:
    for path in sorted(source.rglob("*")):
        hidden = any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(source).parts)
        if path.is_file() and not hidden and not any(fnmatch(path.name, pattern) for pattern in WEIGHTS):
            yield path


def _local(source: str) -> Path:
    """The folder itself, or the local copy of a hub name's files."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, ignore_patterns=list(WEIGHTS)))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(f"the files of {source} cannot be read: {one_line(error)}") from error
