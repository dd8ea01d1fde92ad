"""Determines the trained tokens of a chat when preparing.

`loss: sampled` takes them from the messages. With `loss: {roles: …}` the actors of a training run find turns again by
the boundaries around them; here every row is compared with its messages. Where the scan agrees with the messages on
every text and stop token, the row is scanned during training. Where it does not, a row under the job's `boundaries` is
rejected, since they say what is meant; under the family's boundaries the row carries the mask that its messages give.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from mmray.errors import RowError, UserError
from mmray.families import Family
from mmray.loss.labels import LabelMaker
from mmray.loss.roles import role_keep_mask
from mmray.loss.rules import LossRule
from mmray.loss.settings import Loss, RoleLoss
from mmray.loss.sources import label_maker
from mmray.rows.templates import RenderedChat
from mmray.rows.token_places import PlacedTokens, Span
from mmray.rows.trained import trained_text

_SHOWN = 60


@dataclass(frozen=True)
class ChatSpans:
    """The spans of a chat's messages and trained text, in letters of its text or (`moved`) of the tokenizer's text.

    trained: the spans to train on.
    ends: the spans of stop tokens, trained on or not.
    texts: (message, role, span) of each text of a message.
    turns: (message, role, span) of each stretch that belongs to a message.
    baked: whether the trained spans cannot be found by a scan.
    is_open: whether the last message is trained on and no stop token follows it.
    """

    trained: tuple[Span, ...]
    ends: tuple[Span, ...]
    texts: tuple[tuple[int, str, Span], ...]
    turns: tuple[tuple[int, str, Span], ...]
    baked: bool
    is_open: bool

    def moved(self, place: Callable[[int], int]) -> "ChatSpans":
        """Returns these spans in another text. place: maps a place of this text to that of the other one."""

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
    """Determines the trained tokens of the chats of one data set."""

    def __init__(self, loss: Loss, family: Family, *, is_job_wide: bool) -> None:
        """Prepares labels for chats under a `loss` setting.

        is_job_wide: whether the label maker used in training has this setting; otherwise every row carries its mask.
        """
        self.loss, self._family = loss, family
        self._scans = isinstance(loss, RoleLoss)
        self._own_boundaries = isinstance(loss, RoleLoss) and loss.boundaries is not None
        self._is_job_wide = is_job_wide
        self._maker: LabelMaker | None = label_maker(loss, family) if self._scans else None

    def spans(self, rendered: RenderedChat) -> ChatSpans:
        """Returns the spans of a chat in letters of its text. Raises UserError where the template's `{% generation %}`
        blocks differ from the messages."""
        trained = trained_text(rendered, self.loss)
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
                (rendered.filled.place(run.start), rendered.filled.place(run.end[1])),
            )
            for run in rendered.plan.runs
        ]
        place = rendered.filled.place
        ends = tuple(
            (place(start), place(stop)) for start, stop in (run.end for run in rendered.plan.runs) if start != stop
        )
        return ChatSpans(
            trained.spans, ends, tuple(texts), tuple(turns), baked,
            trained.last_is_open and not self._own_boundaries and self._trains_ends,
        )  # fmt: skip

    @property
    def _trains_ends(self) -> bool:
        return not isinstance(self.loss, RoleLoss) or self.loss.train_on_eos != "none"

    def tokens(
        self, spans: ChatSpans, ids: np.ndarray, placed: PlacedTokens, *, compare: bool = True
    ) -> tuple[LossRule, np.ndarray]:
        """Returns the LossRule of a row, and the tokens to train on where the rule is GIVEN, bool [n].

        ids: its tokens, one for each tile, int32 [n].
        compare: whether to raise RowError `turns_differ` where `loss.boundaries` and the messages disagree.
        """
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
        """Returns the error for the first text on which scan and messages differ, whatever flags say; None where they
        agree."""
        assert isinstance(self.loss, RoleLoss)
        for message, role, span in spans.texts:
            tokens = placed.holding(span)
            scanned_tokens = scanned[tokens]
            trains = role in self.loss.roles
            wrong = np.flatnonzero(scanned_tokens != trains)
            if tokens.start == 0 and len(wrong) and wrong[0] == 0:
                wrong = wrong[1:]  # the first token of a sample is never trained on
            if len(wrong):
                first = tokens.start + int(wrong[0])
                last = first + int((np.diff(wrong) == 1).argmin() if (np.diff(wrong) != 1).any() else len(wrong) - 1)
                piece = placed.text_of(slice(first, last + 1))
                verb = "leaves out" if trains else "trains on"

                return RowError(
                    "turns_differ",
                    f"message {message} ({role}): the boundaries' scan {verb} {piece!r:.{_SHOWN}}, which is this "
                    "message's text; mend loss.boundaries, or use loss: sampled",
                )
        return None

    def _same_ends(self, spans: ChatSpans, scanned: np.ndarray, truth: np.ndarray, placed: PlacedTokens) -> bool:
        """Tells whether the scan trains on the same stop tokens as the messages."""
        ends = placed.within(spans.ends)
        return not (spans.is_open and self._family.stop_tokens) and bool((scanned[ends] == truth[ends]).all())

    def _check_blocks(self, rendered: RenderedChat) -> None:
        """Raises UserError unless `{% generation %}` blocks and messages agree, blanks, stop tokens, pictures aside."""
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
        blocks, message_texts = (
            [rendered.text[start:stop] for start, stop in spans] for spans in (rendered.generated, plain.spans)
        )
        raise UserError(
            "loss: sampled: the chat template's {% generation %} blocks and the messages say different things, first "
            f"at {rendered.text[differing[0] : differing[0] + 40]!r}. The blocks mark {blocks!r:.300}; the model would "
            f"write {message_texts!r:.300}. Mend the blocks, or leave them out of the template"
        )


def _without_flags(rendered: RenderedChat) -> RenderedChat:
    messages = tuple(
        replace(message, trains=None, parts=tuple(replace(part, trains=None) for part in message.parts))
        for message in rendered.chat.messages
    )
    return replace(rendered, chat=replace(rendered.chat, messages=messages))
