"""How far a long stage is: a bar on a terminal of one's own, else plain lines that begin with the
run's name.

    with Progress("emb35-rank: test perplexity", total, "windows") as progress:
        progress.advance(16)

Commands that run beside each other would write over each other's bars. A shell takes the terminal
from what it starts with `&` (its input, or its foreground), and so do the study and the launcher
when they start several runs: whoever lacks it prints lines.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

Item = TypeVar("Item")

FIRST_LINE_S = 5.0  # a stage that is over by then says nothing
LONGEST_SHARE = 0.1  # of the time so far passes between two lines: a long stage prints fewer


def has_terminal() -> bool:
    """Whether this process alone writes to a terminal."""
    if sys.stderr is None or not (
        sys.stderr.isatty() and sys.stdin is not None and sys.stdin.isatty()
    ):
        return False
    try:
        return os.tcgetpgrp(sys.stderr.fileno()) == os.getpgrp()
    except OSError:
        return False


def say(name: str, what: str) -> None:
    """One line about a stage that cannot tell how far it is."""
    print(f"{name}: {what}", file=sys.stderr, flush=True)


class Progress:
    """Counts up to `total` (None where nobody knows); closed, it has said how long it took."""

    def __init__(
        self,
        name: str,
        total: float | None,
        unit: str,
        *,
        done: float = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done, self._before, self._clock = done, done, clock
        self._begun = clock()
        self._next_line = self._begun + FIRST_LINE_S
        self._bar: Any = None
        if has_terminal():
            from tqdm import tqdm

            scale = not isinstance(total, int) or total > 99_999  # 12.3k, not 12345.678
            self._bar = tqdm(
                total=total, initial=done, desc=name, unit=f" {unit}", unit_scale=scale
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *failed: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._clock() - self._begun >= FIRST_LINE_S:
            say(self.name, f"{'stopped' if failed[0] else 'done'}, {self._numbers()}")

    def advance(self, by: float = 1, note: str = "") -> None:
        """So much more is done; `note` says what a reader would like to know of it."""
        self.done += by
        if self._bar is not None:
            self._bar.update(by)
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            return
        now = self._clock()
        if now >= self._next_line:
            self._next_line = now + max(FIRST_LINE_S, LONGEST_SHARE * (now - self._begun))
            say(self.name, self._numbers() + (f", {note}" if note else ""))

    def _numbers(self) -> str:
        seconds = self._clock() - self._begun
        text = f"{self.done:,.0f}"
        if self.total:
            text += f" of {self.total:,.0f} {self.unit} ({self.done / self.total:.0%})"
        else:
            text += f" {self.unit}"
        text += f" after {_clock_text(seconds)}"
        advanced = self.done - self._before
        if self.total and 0 < advanced and self.done < self.total:
            text += f", {_clock_text(seconds * (self.total - self.done) / advanced)} left"
        return text


def track(items: Iterable[Item], name: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """`items` one by one, counted; `total` where they have no length."""
    known = len(items) if total is None and isinstance(items, Sized) else total
    with Progress(name, known, unit) as progress:
        for item in items:
            yield item
            progress.advance()


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
