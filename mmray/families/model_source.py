"""A quick check in plain words that a model's folder or hub name can be read at all.

transformers takes a folder that is missing for a hub name, and tries to reach the hub for some 20 s.
"""

import functools
import re
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from mmray.base.words import one_line

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CONFIG_FILES = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
REACH_SECONDS = 5


def source_problem(name: str) -> str | None:
    """The problem with a folder, a config.json or a hub name, in a few words; None where loading it can be tried."""
    if Path(name).exists():
        return None
    if name.endswith(".json"):
        return "no such file"
    if name.startswith((".", "~", "/")) or not _HUB_NAME.fullmatch(name):
        return "no such folder"
    return _hub_problem(name)


@functools.cache
def _hub_problem(name: str) -> str | None:
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in _CONFIG_FILES):
        return None
    try:
        HfApi().model_info(name, timeout=REACH_SECONDS)
    except GatedRepoError as error:
        return f"no such folder, and the Hugging Face hub gives this model only with a token: {one_line(error)}"
    except RepositoryNotFoundError:
        return "no such folder, and the Hugging Face hub has no such model"
    except Exception:  # noqa: BLE001 (what the hub's client raises without a network is of many kinds)
        return "no such folder, and the Hugging Face hub cannot be reached"
    return None
