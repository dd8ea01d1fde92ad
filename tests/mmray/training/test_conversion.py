"""A checkpoint that all ranks convert together is the one that a single rank converts."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from mmray.errors import UserError
from mmray.training import conversion
from mmray.training.checkpoint import save_state
from mmray.training.conversion import SHARDS, converted
from mmray.training.ranks import Ranks
from tests.mmray.training import scenarios
from tests.mmray.training.ranks import RankGroup

CASES: list[scenarios.Case] = [(1, "bf16"), (3, "fp32")]


def saved(rank: int, world_size: int, folder: Path) -> None:
    """A step of each case, and its checkpoint."""
    for case in CASES:
        engine = scenarios.build(case, 2)
        scenarios.train(engine, 1)
        save_state(engine, folder / scenarios.checkpoint_name(case))
        engine.close()


def converted_both_ways(rank: int, world_size: int, folder: Path) -> dict[Any, Any]:
    """On two ranks: what one of them converts, what all convert, and what is said where a shard is damaged."""
    ranks, found = Ranks(), {}
    for case in CASES:
        source = folder / scenarios.checkpoint_name(case)
        with converted(source, 2, folder / "alone", "", ranks, nothing_more) as work:
            alone = contents(work) if rank == 0 else {}
            ranks.every(None)
        with (
            patch.object(conversion, "TOGETHER_BYTES", 0),
            converted(source, 2, folder / "all", "", ranks, nothing_more) as work,
        ):
            together = contents(work) if rank == 0 else {}
            ranks.every(None)
        found[case] = alone, together
    if rank == 0:
        shard = sorted((source / SHARDS).glob("*_optim_states.pt"))[1]
        shard.write_bytes(b"damaged")
    ranks.every(None)
    try:
        with (
            patch.object(conversion, "TOGETHER_BYTES", 0),
            converted(source, 2, folder / "all", "", ranks, nothing_more),
        ):
            found["error"] = "none"
    except UserError as error:
        found["error"] = str(error)
    return found


def nothing_more(shards: Path) -> None:
    """Adds nothing to a conversion."""


def contents(work: Path) -> dict[str, Any]:
    """The values of all files of a conversion, by name."""
    files = [file for file in (work / SHARDS).rglob("*") if file.is_file()]
    return {str(file.relative_to(work)): torch.load(file, weights_only=False) for file in files if file.suffix == ".pt"}


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right)


def test_all_ranks_convert_what_one_converts(tmp_path: Path) -> None:
    RankGroup(2, saved, tmp_path).results()
    found = RankGroup(2, converted_both_ways, tmp_path, new_python=True).results()
    for case in CASES:
        alone, together = found[0][case]
        assert len(alone) > 20
        assert together.keys() == alone.keys()
        for name, value in alone.items():
            assert same(value, together[name]), name
    for rank in found:
        assert "for another number of workers failed (exit 1)" in rank["error"], rank["error"]
    assert not list((tmp_path / "all").iterdir()), "nothing is left behind"
