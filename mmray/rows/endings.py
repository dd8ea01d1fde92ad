"""The token that is appended to a sample's text: the end of a document, or the token by which the model stops."""

from collections.abc import Sequence

from mmray.errors import UserError
from mmray.families import Family
from mmray.loss.sources import ending_token_ids, stop_token_ids
from mmray.rows.document import Document
from mmray.rows.settings import DatasetSettings


class Endings:
    """The ending tokens of a job's data sets."""

    def __init__(self, datasets: Sequence[DatasetSettings], family: Family) -> None:
        """Raises UserError for a data set whose end-of-document token the tokenizer lacks."""
        self.family, self._datasets = family, datasets
        self.token_ids = ending_token_ids(family)
        self._stop_token_ids = stop_token_ids(family)
        self._texts = tuple(map(str, family.tokenizer.convert_ids_to_tokens(list(self.token_ids))))
        self._documents = [
            self._end_of_document(dataset) if dataset.kind == "pretrain" else None for dataset in datasets
        ]

    @property
    def documents(self) -> tuple[int, ...]:
        """Ids of the tokens that end documents."""
        return tuple(sorted({token for token in self._documents if token is not None}))

    def of(self, document: Document, dataset: int, is_open: bool) -> list[int]:
        """Returns the token ids to append: none or one.

        A document gets its end-of-document token. A chat gets the token by which the model stops after its last
        answer, where the template leaves it to the next turn to write that token.
        is_open: whether the last answer is trained on and no stop token follows it.
        """
        end = self._documents[dataset]
        if end is not None and (document.ends or self._datasets[dataset].add_eos):
            return [end]
        if not self._stop_token_ids or not is_open or document.text.rstrip().endswith(self._texts):
            return []
        return [self._stop_token_ids[0]]

    def _end_of_document(self, dataset: DatasetSettings) -> int | None:
        token = dataset.end_of_document or self.family.tokenizer.eos_token
        if token is None and not dataset.add_eos:
            return None
        if token is None:
            raise UserError("the tokenizer has no end-of-document token (eos_token); set add_eos: false")
        try:
            return self.family.token_id(token)
        except ValueError as error:
            raise UserError(f"end_of_document: {error}") from error
