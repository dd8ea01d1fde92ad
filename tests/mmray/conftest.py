"""Processors small and real, and where the shared inputs lie."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from mmray.families import load_processor
from mmray.synthetic.processors import MODEL_TYPES, write_processor

SHARED = Path(__file__).parents[3] / "shared/data"
SHARED_PROCESSORS = ("qwen2-vl", "granite-docling")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are so small that threads wait for each other ten times longer than they work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real pages, rows and processors; the test is skipped where they are not."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared/data here")
    return SHARED


@functools.cache
def _load_shared(name: str) -> Any:
    """Loads a real processor once: its tokenizer takes a second, and pytest asks for it anew whenever tests with the
    other one came between."""
    return load_processor(SHARED / "processors" / name)


@pytest.fixture(scope="session", params=SHARED_PROCESSORS)
def shared_processor(request: pytest.FixtureRequest, shared_data: Path) -> Any:
    """Each real processor in turn. Not to be changed: tests that change settings copy."""
    return _load_shared(request.param)


@pytest.fixture(scope="session")
def processor_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a small processor for each model type."""
    root = tmp_path_factory.mktemp("processors")
    return {model_type: write_processor(root / model_type, model_type) for model_type in MODEL_TYPES}


@pytest.fixture(scope="session")
def processors(processor_folders: dict[str, Path]) -> dict[str, Any]:
    """The small processors, loaded. Not to be changed: tests that change settings copy."""
    return {model_type: load_processor(folder) for model_type, folder in processor_folders.items()}


@pytest.fixture(params=MODEL_TYPES)
def model_type(request: pytest.FixtureRequest) -> str:
    """Each model type in turn."""
    return request.param


@pytest.fixture
def processor(processors: dict[str, Any], model_type: str) -> Any:
    """The small processor of each model type in turn."""
    return processors[model_type]
