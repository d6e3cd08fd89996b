"""Faults that a process does to itself at a named instant: die, run out of disk, meet a NaN.

Each function returns an arm, to be called in the forked process before the run starts. They wrap
the operating system's calls and the run's own methods; the run knows nothing of them.
"""

from __future__ import annotations

import errno
import importlib
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.bench import SAVE_EVERY

Arm = Callable[[], None]
OBJECT = re.compile(r"\.?step-\d+-g\d+\.pt(\..*\.tmp)?$")
MANIFEST = re.compile(r"\.?step-\d+\.json(\..*\.tmp)?$")
RECORD = re.compile(r"metrics\.jsonl$")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _name(descriptor: int) -> str:
    return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))


class _Nth:
    """True at the n-th call."""

    def __init__(self, nth: int) -> None:
        self.left = nth

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def _write(pattern: re.Pattern[str], nth: int, share: float) -> Arm:
    """Die in the n-th write of a file, `share` of its bytes written."""

    def arm() -> None:
        real, due = os.write, _Nth(nth)

        def write(descriptor: int, data: Any) -> int:
            if pattern.search(_name(descriptor)) and due():
                view = memoryview(data)
                real(descriptor, view[: int(len(view) * share)])
                die()
            return real(descriptor, data)

        os.write = write

    return arm


def _fsync(pattern: re.Pattern[str], nth: int) -> Arm:
    def arm() -> None:
        real, due = os.fsync, _Nth(nth)

        def fsync(descriptor: int) -> None:
            if pattern.search(_name(descriptor)) and due():
                die()
            real(descriptor)

        os.fsync = fsync  # type: ignore[assignment]

    return arm


def _replace(pattern: re.Pattern[str], nth: int, after: bool) -> Arm:
    def arm() -> None:
        real, due = os.replace, _Nth(nth)

        def replace(source: Any, target: Any) -> None:
            now = bool(pattern.search(os.path.basename(target))) and due()
            if now and not after:
                die()
            real(source, target)
            if now:
                die()

        os.replace = replace  # type: ignore[assignment]

    return arm


def _unlink(pattern: re.Pattern[str], nth: int) -> Arm:
    def arm() -> None:
        real, due = os.unlink, _Nth(nth)

        def unlink(path: Any, *args: Any, **kwargs: Any) -> None:
            if pattern.fullmatch(os.path.basename(path)) and due():
                die()
            real(path, *args, **kwargs)

        os.unlink = unlink

    return arm


def when(
    module: str,
    owner: str | None,
    name: str,
    nth: int,
    action: Callable[[], None],
    after: bool = False,
) -> Arm:
    """Call `action` just before, or just after, the n-th call of `module.owner.name` (or
    `module.name`)."""

    def arm() -> None:
        place: Any = importlib.import_module(module)
        place = getattr(place, owner) if owner else place
        real, due = getattr(place, name), _Nth(nth)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            now = due()
            if now and not after:
                action()
            result = real(*args, **kwargs)
            if now and after:
                action()
            return result

        setattr(place, name, wrapped)

    return arm


def _step_of(save: int) -> int:
    """An optimizer step (from 1) in the middle of the stretch after the n-th save."""
    return SAVE_EVERY * (save - 1) + SAVE_EVERY // 2


_OBJECT_FILE = re.compile(r"step-\d+-g\d+\.pt")
# The twelve instants; the number is the save, or the stretch of steps after it.
POINTS: dict[str, Callable[[int], Arm]] = {
    "before the optimizer step": lambda n: when(
        "src.train", "Trainer", "update", _step_of(n), die
    ),
    "between a step and its row": lambda n: when(
        "src.train", "Trainer", "update", _step_of(n), die, after=True
    ),
    "half a row": lambda n: _write(RECORD, _step_of(n), 0.5),
    "before a save syncs the record": lambda n: when(
        "src.storage.run_dir", "RunDir", "sync", n, die
    ),
    "object opened": lambda n: _write(OBJECT, n, 0.0),
    "object half written": lambda n: _write(OBJECT, n, 0.5),
    "object before its fsync": lambda n: _fsync(OBJECT, n),
    "object before its rename": lambda n: _replace(OBJECT, n, after=False),
    "object renamed, no manifest": lambda n: _replace(OBJECT, n, after=True),
    "manifest half written": lambda n: _write(MANIFEST, n, 0.5),
    "manifest before its rename": lambda n: _replace(MANIFEST, n, after=False),
    "pruned manifest, object left": lambda n: _unlink(_OBJECT_FILE, n),
}  # fmt: skip
SAVES = (1, 3, 5)  # of the seven that a run has; the first has nothing before it


def noise() -> None:
    """Make the loss draw from both generators, as dropout would."""
    from src import training_step

    real = training_step.next_token_loss

    def loss(*arguments: Any, **named: Any) -> Any:
        import torch

        objective, nats = real(*arguments, **named)
        return objective * (0.5 + torch.rand(()) + 0.1 * random.random()), nats

    training_step.next_token_loss = loss


def not_a_number(step: int) -> Arm:
    """The loss of optimizer step `step` (from 1) is NaN, and so are its gradients."""

    def arm() -> None:
        from src import train, training_step

        real_loss, real_accumulate = training_step.next_token_loss, train.Trainer.accumulate
        now = {"step": 0}

        def accumulate(self: Any) -> Any:
            now["step"] = self.step
            return real_accumulate(self)

        def loss(*arguments: Any, **named: Any) -> Any:
            objective, nats = real_loss(*arguments, **named)
            bad = float("nan") if now["step"] == step - 1 else 1.0
            return objective * bad, nats * bad

        train.Trainer.accumulate = accumulate  # type: ignore[method-assign]
        training_step.next_token_loss = loss

    return arm


def signalled_at(step: int, number: int) -> Arm:
    """The signal arrives during optimizer step `step`."""

    def arm() -> None:
        from src import train

        real = train.Trainer.update

        def update(self: Any, *args: Any) -> Any:
            if self.step == step - 1:
                os.kill(os.getpid(), number)
            return real(self, *args)

        train.Trainer.update = update  # type: ignore[method-assign, assignment]

    return arm


def clock_set_back(seconds: float) -> Arm:
    """The wall clock is `seconds` behind."""

    def arm() -> None:
        real = time.time
        time.time = lambda: real() - seconds

    return arm


def disk_full(pattern: str, nth: int, lasting: bool = True) -> Arm:
    """The n-th write of a matching file takes half of its bytes and then finds the disk full, as
    a real one does; so do all writes after it, or only that file's if it is not `lasting`."""
    matched = re.compile(pattern)

    def arm() -> None:
        real, due = os.write, _Nth(nth)
        full, file = False, ""

        def write(descriptor: int, data: Any) -> int:
            nonlocal full, file
            name = _name(descriptor)
            regular = not name.startswith(("pipe:", "socket:")) and not name.endswith(".out")
            if full and regular and (lasting or name == file):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if matched.search(name) and due():
                full, file = True, name
                view = memoryview(data)
                return real(descriptor, view[: max(1, len(view) // 2)])
            return real(descriptor, data)

        os.write = write

    return arm


def ballast(directory: Path) -> Callable[[], None]:
    """An action that fills the file system of `directory` to its last byte."""

    def fill() -> None:
        with (directory / "ballast").open("ab", buffering=0) as file:
            size = 1 << 20
            while size:
                try:
                    if file.write(b"\0" * size) < size:
                        size //= 2
                except OSError:
                    size //= 2

    return fill


def durability(log: Path) -> Arm:
    """Write down the order of fsyncs and renames in `log`."""

    def arm() -> None:
        real_fsync, real_replace = os.fsync, os.replace

        def note(text: str) -> None:
            with log.open("a") as file:
                file.write(text + "\n")

        def fsync(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            real_fsync(descriptor)
            note(f"fsync {path}")

        def replace(source: Any, target: Any) -> None:
            real_replace(source, target)
            note(f"rename {os.fspath(source)} {os.fspath(target)}")

        os.fsync, os.replace = fsync, replace  # type: ignore[assignment]

    return arm
