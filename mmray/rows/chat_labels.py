"""Which tokens of a chat train, worked out when preparing.

`loss: sampled` takes it from the messages. With `loss: {roles: …}` the actors of a training find turns again by the
boundaries around them; here every row is compared with its messages. Where the scan says the same of every text and
stop token, the row is scanned when training. Where it does not, a row under the job's own boundaries is refused, since
they say what is meant; under the family's boundaries it carries what its messages say, token by token.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from mmray.errors import RowError, UserError
from mmray.families import Family
from mmray.loss.labels import LabelMaker, LossRule
from mmray.loss.roles import role_keep_mask
from mmray.loss.settings import Loss, RoleLoss
from mmray.loss.sources import label_maker
from mmray.rows.templates import RenderedChat
from mmray.rows.token_places import PlacedTokens, Span
from mmray.rows.trained import trained_text

_SHOWN = 60


@dataclass(frozen=True)
class ChatSpans:
    """What of a chat's text is whose and trains, in letters: of its own text, or (`moved`) of that which the tokenizer
    gets.

    ends: stop tokens, trained or not; texts: (message, role, span) of each of its texts; turns: the same of each
    stretch that is a message's own; baked: no scan finds what trains; is_open: the last message trains, and no stop
    token stands behind it.
    """

    trained: tuple[Span, ...]
    ends: tuple[Span, ...]
    texts: tuple[tuple[int, str, Span], ...]
    turns: tuple[tuple[int, str, Span], ...]
    baked: bool
    is_open: bool

    def moved(self, place: Callable[[int], int]) -> "ChatSpans":
        """The same of a text in which each letter stands elsewhere."""

        def span(old: Span) -> Span:
            return place(old[0]), place(old[1])

        return replace(
            self,
            trained=tuple(map(span, self.trained)),
            ends=tuple(map(span, self.ends)),
            texts=tuple((message, role, span(old)) for message, role, old in self.texts),
            turns=tuple((message, role, span(old)) for message, role, old in self.turns),
        )


class ChatLabels:
    """The trained tokens of the chats of one set of rows."""

    def __init__(self, loss: Loss, family: Family, *, is_job_wide: bool) -> None:
        """is_job_wide: the label maker of the training has this setting; else every row carries what trains."""
        self.loss, self._family = loss, family
        self._scans = isinstance(loss, RoleLoss)
        self._own_boundaries = isinstance(loss, RoleLoss) and loss.boundaries is not None
        self._is_job_wide = is_job_wide
        self._maker: LabelMaker | None = label_maker(loss, family) if self._scans else None

    def spans(self, rendered: RenderedChat) -> ChatSpans:
        """What trains of a chat, in letters of its own text. Raises UserError where the template's blocks differ."""
        found = trained_text(rendered, self.loss)
        if not self._scans and rendered.generated:
            self._check_blocks(rendered)
        messages, setting = rendered.chat.messages, self.loss
        baked = isinstance(setting, RoleLoss) and (
            setting.chooses_messages
            or any(message.trains is not None for message in messages)
            or any(part.trains is not None for message in messages for part in message.parts)
        )
        occurrences = rendered.plan.skeleton.occurrences
        texts = []
        for number, occurrence in enumerate(occurrences):
            message = rendered.leaves[occurrence.leaf].message
            if message is not None and rendered.filled.texts[number].strip():
                texts.append((message, messages[message].role, rendered.span(number)))
        turns = [
            (
                run.message,
                messages[run.message].role,
                (rendered.filled.place(run.start), rendered.filled.place(run.ended)),
            )
            for run in rendered.plan.runs
        ]
        place = rendered.filled.place
        ends = tuple((place(run.stop), place(run.ended)) for run in rendered.plan.runs if run.ended != run.stop)
        return ChatSpans(
            found.spans, ends, tuple(texts), tuple(turns), baked,
            found.last_is_open and not self._own_boundaries and self._trains_ends,
        )  # fmt: skip

    @property
    def _trains_ends(self) -> bool:
        return not isinstance(self.loss, RoleLoss) or self.loss.train_on_eos != "none"

    def tokens(
        self, spans: ChatSpans, ids: np.ndarray, placed: PlacedTokens, *, compare: bool = True
    ) -> tuple[LossRule, np.ndarray]:
        """The rule of a row, and which of its tokens train where the rule is GIVEN, bool [n]. ids: int32 [n], with one
        token for each tile. Raises RowError `turns_differ`, where rows are to be compared."""
        truth = placed.within(spans.trained)
        if not isinstance(self.loss, RoleLoss) or self._maker is None:
            return LossRule.GIVEN, truth
        maker = self._maker
        scanned = role_keep_mask(
            torch.from_numpy(ids), maker.boundaries,
            roles_to_train=maker.roles_to_train, train_on_eos=maker.train_on_eos,
        ).numpy()  # fmt: skip
        difference = self._difference(spans, scanned, placed)
        if self._own_boundaries:
            if compare and difference is not None:
                raise difference
            if not spans.baked and self._is_job_wide:
                return LossRule.ROLES, np.zeros(0, dtype=bool)
            of_turns = placed.within([span for _, _, span in spans.turns])
            return LossRule.GIVEN, scanned & ~(of_turns & ~truth)
        if spans.baked or difference is not None or not self._same_ends(spans, scanned, truth, placed):
            return LossRule.GIVEN, truth
        return (LossRule.ROLES, np.zeros(0, dtype=bool)) if self._is_job_wide else (LossRule.GIVEN, scanned)

    def _difference(self, spans: ChatSpans, scanned: np.ndarray, placed: PlacedTokens) -> RowError | None:
        """Where the scan and the messages differ on a text, whatever flags say."""
        assert isinstance(self.loss, RoleLoss)
        for message, role, span in spans.texts:
            tokens = placed.holding(span)
            found = scanned[tokens]
            trains = role in self.loss.roles
            wrong = np.flatnonzero(found != trains)
            if tokens.start == 0 and len(wrong) and wrong[0] == 0:
                wrong = wrong[1:]  # the first token of a sample never trains
            if len(wrong):
                first = tokens.start + int(wrong[0])
                last = first + int((np.diff(wrong) == 1).argmin() if (np.diff(wrong) != 1).any() else len(wrong) - 1)
                piece = placed.text_of(slice(first, last + 1))
                verb = "leaves out" if trains else "trains"
                return RowError(
                    "turns_differ",
                    f"message {message} ({role}): the boundaries' scan {verb} {piece!r:.{_SHOWN}}, which is this "
                    "message's text; mend loss.boundaries, or use loss: sampled",
                )
        return None

    def _same_ends(self, spans: ChatSpans, scanned: np.ndarray, truth: np.ndarray, placed: PlacedTokens) -> bool:
        """Whether the scan trains the same stop tokens as the messages."""
        ends = placed.within(spans.ends)
        return not (spans.is_open and self._family.stop_tokens) and bool((scanned[ends] == truth[ends]).all())

    def _check_blocks(self, rendered: RenderedChat) -> None:
        """Raise UserError unless `{% generation %}` blocks and messages agree but for blanks, stop tokens, pictures."""
        plain = trained_text(_without_flags(rendered), "sampled")
        letters = np.zeros((2, len(rendered.text)), dtype=bool)
        for which, spans in enumerate((rendered.generated, plain.spans)):
            for start, stop in spans:
                letters[which, start:stop] = True
        pictures = [match.span() for match in re.finditer(re.escape(self._family.placeholder_unit), rendered.text)]
        for start, stop in (*plain.ends, *pictures):
            letters[:, start:stop] = False
        differing = [place for place in np.flatnonzero(letters[0] != letters[1]) if rendered.text[place].strip()]
        if not differing:
            return
        blocks, own = (
            [rendered.text[start:stop] for start, stop in spans] for spans in (rendered.generated, plain.spans)
        )
        raise UserError(
            "loss: sampled: the chat template's {% generation %} blocks and the messages say different things, first "
            f"at {rendered.text[differing[0] : differing[0] + 40]!r}. The blocks mark {blocks!r:.300}; the model would "
            f"write {own!r:.300}. Mend the blocks, or leave them out of the template"
        )


def _without_flags(rendered: RenderedChat) -> RenderedChat:
    messages = tuple(
        replace(message, trains=None, parts=tuple(replace(part, trains=None) for part in message.parts))
        for message in rendered.chat.messages
    )
    return replace(rendered, chat=replace(rendered.chat, messages=messages))
