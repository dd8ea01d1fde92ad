"""Which errors of workers end a run at once."""

import pytest

from jobs.mistakes import EndAtMistakes, mistake_in
from mmray.errors import PassingError, UserError

MISTAKE, PASSING, BUG = UserError("the seed is another"), PassingError("no space left"), RuntimeError("a bug")


@pytest.mark.parametrize(
    ("errors", "mistake"),
    [
        ({}, None),
        ({0: BUG}, None),
        ({0: PASSING, 1: BUG}, None),
        ({0: BUG, 1: MISTAKE}, MISTAKE),
        ({2: PASSING, 1: MISTAKE}, MISTAKE),
    ],
)
def test_a_mistake_ends_a_run_and_what_may_pass_does_not(
    errors: dict[int, Exception], mistake: UserError | None
) -> None:
    assert mistake_in(errors) is mistake
    if mistake is None:
        EndAtMistakes().after_exception(None, errors)
    else:
        with pytest.raises(UserError, match="the seed is another"):
            EndAtMistakes().after_exception(None, errors)
