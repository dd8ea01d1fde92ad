"""What samples end with behind their text: the end of a document, or the token by which the model stops."""

from collections.abc import Sequence

from mmray.errors import UserError
from mmray.families import Family
from mmray.loss.settings import LossSource, ending_token_ids, stop_token_ids
from mmray.rows.document import Document
from mmray.rows.settings import DatasetSettings


class Endings:
    """The endings of a job's sets of rows."""

    def __init__(self, datasets: Sequence[DatasetSettings], sources: Sequence[LossSource], family: Family) -> None:
        """Raises UserError for a set whose end-of-document token the tokenizer lacks."""
        self.family, self._sources = family, sources
        self.token_ids = ending_token_ids(family)
        self._stop_token_ids = stop_token_ids(family)
        self._texts = tuple(map(str, family.tokenizer.convert_ids_to_tokens(list(self.token_ids))))
        self._documents = [
            self._end_of_document(dataset) if dataset.kind == "pretrain" and dataset.add_eos else None
            for dataset in datasets
        ]

    def of(self, document: Document, dataset: int) -> list[int]:
        """The token ids to append: none or one.

        To a document its end; to a chat the token by which the model stops after its last answer, where the template
        leaves it to the next turn to write it.
        """
        end = self._documents[dataset]
        if end is not None:
            return [end]
        if not self._stop_token_ids or not document.is_answered or document.text.rstrip().endswith(self._texts):
            return []
        source = self._sources[dataset]
        marked = bool(document.generated) and not document.text[document.generated[-1][1] :].strip()
        ends_open = source is LossSource.BOUNDARIES or (source is LossSource.TEMPLATE and marked)
        return [self._stop_token_ids[0]] if ends_open else []

    def _end_of_document(self, dataset: DatasetSettings) -> int:
        token = dataset.end_of_document or self.family.tokenizer.eos_token
        if token is None:
            raise UserError("the tokenizer has no end-of-document token (eos_token); set add_eos: false")
        try:
            return self.family.token_id(token)
        except ValueError as error:
            raise UserError(f"end_of_document: {error}") from error
