"""A database that went away: the whole transaction is tried again, for as long as the limit allows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from searcher.errors import LongRopeError

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0  # seconds between two tries; each pause is twice the one before
REMINDER = 60.0  # seconds between two words to whoever watches

Given = ParamSpec("Given")
Result = TypeVar("Result")


class StoreLost(LongRopeError):
    """The database does not answer, or undid this transaction alone: the same may succeed later.

    Attributes
    ----------
    what, advice: the two halves of the message.
    """

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}. {advice}")
        self.what, self.advice = what, advice


@dataclass(frozen=True)
class Patience:
    """How long to wait for a database that is lost, each time that it is.

    Attributes
    ----------
    seconds: the limit; 0 waits for nothing.
    say: is told that the wait begins, goes on and ends.
    """

    seconds: float
    say: Callable[[str], None]

    def over(self, attempt: Callable[[], Result]) -> Result:
        """What ``attempt`` returns, which is called again after every StoreLost.

        Raises
        ------
        LongRopeError
            The database did not come back within the limit.
        """
        began: float | None = None
        pause, spoke = FIRST_PAUSE, 0.0
        while True:
            try:
                result = attempt()
            except StoreLost as lost:
                moment = time.monotonic()
                if self.seconds <= 0:
                    raise
                if began is None:
                    began = spoke = moment
                    self.say(f"{lost.what}; trying again for up to {self.seconds:g} s.")
                left = began + self.seconds - moment
                if left <= 0:
                    raise LongRopeError(
                        f"{lost.what}, and did not come back within {self.seconds:g} s. {lost.advice}"
                    ) from lost
                if moment - spoke > REMINDER:
                    spoke = moment
                    self.say(f"Still no answer from the store; giving up in {left:.0f} s.")
            else:
                if began is not None:
                    self.say(f"The store answers again after {time.monotonic() - began:.0f} s; the study goes on.")
                return result
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)


IMPATIENT = Patience(0.0, lambda _text: None)


class _Repeats(Protocol):
    def _repeat(self, attempt: Callable[[], Any]) -> Any: ...


Self = TypeVar("Self", bound=_Repeats)


def repeated(method: Callable[Concatenate[Self, Given], Result]) -> Callable[Concatenate[Self, Given], Result]:
    """Of a method that is one transaction, or reads before the one that writes: done again while the store is lost."""

    @wraps(method)
    def patiently(self: Self, /, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        return self._repeat(lambda: method(self, *args, **kwargs))  # type: ignore[no-any-return]

    return patiently
