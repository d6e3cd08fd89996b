"""What the commands share: wrong arguments and refusals are one sentence and an exit code."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

# The exit codes of every command: finished, our fault, I/O, run me again, bad input.
OK, OUR_FAULT, IO_FAILED, TRY_AGAIN, BAD_INPUT = 0, 70, 74, 75, 78


class Refusal(ValueError):
    """Bad input: one whole sentence for the user, who has to change something."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes exit 78 with one sentence, like any other bad input."""

    def __init__(
        self, description: str | None = None, *, example: str | None = None, **options: Any
    ) -> None:
        if example is not None:
            options |= {
                "epilog": f"example: {example}",
                "formatter_class": argparse.RawDescriptionHelpFormatter,
                "allow_abbrev": False,
            }
        super().__init__(description=description, **options)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see --help", file=sys.stderr)
        raise SystemExit(BAD_INPUT)


def at_least(least: int) -> Callable[[str], int]:
    """An argument's `type`: a whole number of at least `least`."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"found {text!r}, expected a whole number of at least {least}"
            )
        return value

    return number


def refuse(error: ValueError | OSError) -> int:
    """Tell the user in one sentence; returns 74 for what could not be read or written, else 78."""
    if not isinstance(error, OSError):
        print(error, file=sys.stderr)
        return BAD_INPUT
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    print(f"could not read or write {what}", file=sys.stderr)
    return IO_FAILED


def run_script(main: Callable[[], None]) -> NoReturn:
    """Call `main` and exit: 0 done, 78 bad input, 74 not read or written, 70 our fault."""
    try:
        main()
    except (Refusal, OSError) as error:
        raise SystemExit(refuse(error)) from None
    except KeyboardInterrupt:
        print("interrupted: nothing unfinished is left, run the same command again")
        raise SystemExit(TRY_AGAIN) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(OUR_FAULT) from None
    raise SystemExit(OK)
