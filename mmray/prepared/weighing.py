"""Decides how many rows of each set a prepare takes, and measures how long rows are where weights are of tokens."""

from collections.abc import Sequence

import numpy as np

from mmray.errors import UserError
from mmray.prepared.stages import PrepareContext
from mmray.rows.files import RowIndex
from mmray.rows.plan import drawn_pieces, rows_of_sets
from mmray.rows.preflight import set_name
from mmray.rows.read import RowReader
from mmray.rows.sample import Sample
from mmray.rows.taking import Drawn, Taking, needs_tokens, takings

WEIGHED_ROWS = 512
"""Number of rows of each set, drawn over all of it, that are encoded to learn how many tokens its rows have."""


def tokens_per_row(context: PrepareContext, indexed: Sequence[RowIndex]) -> list[float]:
    """Measures the mean number of tokens of the rows of each set; [] where no weight is of tokens.

    Raises UserError for a set of which no row that was looked at can be used.
    """
    if not needs_tokens(context.datasets, context.data):
        return []
    encoder, reader = context.encoder(context.data.lenient, None), RowReader()
    means = []
    for number, count in enumerate(rows_of_sets(indexed, len(context.datasets))):
        drawn = Drawn(count, min(count, WEIGHED_ROWS), context.data.seed)
        rows = [row for piece in drawn_pieces(indexed, number, drawn) for row in reader.read(piece)]
        lengths = [len(result.input_ids) for result in encoder.encode(rows) if isinstance(result, Sample)]
        if not lengths:
            raise UserError(
                f"{set_name(context.split, number, context.datasets[number])}: of {len(rows):,} rows drawn to learn "
                "how many tokens its rows have (data.weigh_by: tokens) none can be used; mend the set, or weigh by rows"
            )
        means.append(float(np.mean(lengths)))
    return means


def decided_takings(
    context: PrepareContext, indexed: Sequence[RowIndex], set_tokens: Sequence[float]
) -> list[Taking]:  # fmt: skip
    """Decides how often the rows of each set are taken; [] where every row is taken once.

    set_tokens: `tokens_per_row`. Raises UserError for a set of which no row would be taken.
    """
    rows = rows_of_sets(indexed, len(context.datasets))
    return takings(context.datasets, context.data, rows, set_tokens, split=context.split)
