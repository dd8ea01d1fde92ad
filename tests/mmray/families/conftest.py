"""Every member of the zoo in turn, with its processor."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmray.families import Family, family_of, load_processor
from tests.mmray.families.zoo import ZOO, Member


def _each(names: list[str], meaning: str) -> Any:
    """A fixture of some members in turn; skipped where the model needs what is not installed."""

    def fixture(request: pytest.FixtureRequest) -> Member:
        found = ZOO[request.param]
        if found.missing:
            pytest.skip(f"{found.name} needs {', '.join(found.missing)}")
        return found

    fixture.__doc__ = meaning
    return pytest.fixture(scope="session", params=names)(fixture)


member = _each(list(ZOO), "Each member of the zoo.")
packing = _each([name for name, each in ZOO.items() if not each.refuses], "Each that packs.")
refusing = _each([name for name, each in ZOO.items() if each.refuses], "Each that cannot pack.")
tiling = _each([name for name, each in ZOO.items() if each.tiling], "Each that takes tiles.")
packing_tiles = _each(
    [name for name, each in ZOO.items() if each.tiling and not each.refuses], "Each that packs tiles."
)
chatting = _each([name for name, each in ZOO.items() if each.turns], "Each with a chat template.")


@pytest.fixture(scope="session")
def zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder with the processor of a member, by its name."""

    @functools.cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        ZOO[name].write_processor(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def zoo_processor(zoo_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """The processor of a member, by its name. Not to be changed."""
    return functools.cache(lambda name: load_processor(zoo_folder(name)))


@pytest.fixture
def member_family(member: Member, zoo_processor: Callable[[str], Any]) -> Callable[..., Family]:
    """A function: the member's family, tiled or not."""
    return lambda tiled=False: family_of(zoo_processor(member.name), tiled=tiled, model_type=member.model_type)
