"""Decodes the pictures of a prepared dataset on a Ray cluster; all other parts of `mmray verify` are
`mmray.prepared.verify`'s.

    parts of 16 row groups ─ VerifyPart (an actor for each CPU: decode once, compare with the header) ─ the driver

Parts are delivered as they are done, not in order, and the driver writes the result of each, so that a stop loses at
most the parts that are under way. An actor holds one group of rows and one decoded picture.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayError

from mmray.errors import UserError
from mmray.prepared.arrow import binary_cell
from mmray.prepared.verify import Part, PartResult, verify_part
from pipelines.dataset import ERROR, cluster_amount, one_row_blocks, out_of_room


class VerifyPart:
    """Actor that decodes the pictures of one part of a dataset."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (first,), (stop,) = batch["first"], batch["stop"]
        error, result = None, b""
        try:
            result = verify_part(self.path, Part(int(first), int(stop))).encoded()
        except UserError as mistake:
            error = str(mistake)
        return {"first": [first], "result": binary_cell(result), ERROR: pa.array([error], pa.string())}


def run_parts(path: str, parts: Sequence[Part]) -> Iterator[tuple[int, PartResult]]:
    """Yields (first bin, result) of each part as it is done: the `verify.RunParts` of a cluster.

    Raises UserError where storage cannot be reached, or Ray lacks resources.
    """
    if not parts:
        return
    actors = max(1, min(int(cluster_amount("CPU", {})) - 1, len(parts)))
    dataset = one_row_blocks([{"first": part.first, "stop": part.stop} for part in parts], {})
    dataset.context.execution_options.preserve_order = False
    dataset = dataset.map_batches(
        VerifyPart, batch_size=1, fn_constructor_args=(path,), num_cpus=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(actors, len(parts)), initial_size=actors),
    )  # fmt: skip
    try:
        for row in dataset.iter_rows():
            if row[ERROR]:
                raise UserError(row[ERROR])
            yield int(row["first"]), PartResult.decoded(row["result"])
    except RayError as error:
        if lack := out_of_room(error):
            raise UserError(f"{lack}; the same command continues with the pictures that are not decoded yet") from error
        raise
