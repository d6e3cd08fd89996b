"""One run's directory: its lock, its config, its append-only metrics, and the signals that end it.

Nothing here imports torch: refusing a held or foreign directory must not cost its import.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from src.storage.files import (
    fsync_directory,
    open_lock_file,
    read_json,
    remove_temporaries,
    write_all,
    write_atomic,
    write_json,
)
from src.storage.run_config import begun_with

EXPORTED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Held(Exception):
    """Another process holds this run; it may be an orphan, so the caller should come again."""

    def __init__(self, path: Path | str, pid: int | None, host: str | None) -> None:
        self.pid, self.host = pid, host
        super().__init__(
            f"{path} is held by process {pid or 'unknown'} on host {host or 'unknown'}: "
            f"wait for it or stop it, then run the same command again."
        )


def read_failure(run: Path) -> dict[str, Any] | None:
    """A run's failure.json, None where it has not failed."""
    try:
        return read_json(run / "failure.json")
    except FileNotFoundError:
        return None


def exported(run: Path) -> bool:
    """Whether `final/` holds what other programs load."""
    return all((run / "final" / name).is_file() for name in EXPORTED)


def _parse_rows(data: bytes, path: Path) -> list[dict[str, Any]]:
    complete = data[: data.rfind(b"\n") + 1]  # a torn last line is a row that never happened
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object, {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, found {row!r}.")
        rows.append(row)
    return rows


def read_rows(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl` (of one `kind`), also while its run is writing; [] if missing.

    Raises ValueError (file and line) when a line that is not the torn last one is not JSON.
    """
    for attempt in range(3):
        try:
            rows = _parse_rows(path.read_bytes(), path)
            return [row for row in rows if kind is None or row.get("kind") == kind]
        except FileNotFoundError:
            return []
        except ValueError:  # its run may be cutting the file back this instant
            if attempt == 2:
                raise
            time.sleep(0.05)
    raise AssertionError("unreachable")


def read_curve(run: Path) -> list[tuple[int, float]]:
    """(tokens, dev perplexity) of a run's dev evaluations so far."""
    rows = read_rows(run / "metrics.jsonl", "dev")
    return [(row["tokens"], row["dev_perplexity"]) for row in rows if "dev_perplexity" in row]


def _resolve_run(log_dir: Path, run_name: str) -> Path:
    """`log_dir/run_name`, refused where it would leave `log_dir` or differ in case alone."""
    if not _RUN_NAME.fullmatch(run_name):
        raise ValueError(
            f"run name {run_name!r}: expected letters, digits, '.', '_' and '-', beginning with a "
            f"letter or digit; rename the experiment."
        )
    check_log_dir(log_dir)
    path = log_dir / run_name
    if path.resolve().parent != log_dir.resolve():
        raise ValueError(f"{path} leads to {path.resolve()}, outside {log_dir}: remove the link.")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is not a directory: move it away or rename the experiment.")
    others = os.listdir(log_dir) if log_dir.is_dir() else []
    clash = [o for o in others if o != run_name and o.casefold() == run_name.casefold()]
    if clash:
        raise ValueError(
            f"run name {run_name!r} differs from the existing {log_dir / clash[0]} in letter case "
            f"alone, which some file systems cannot tell apart: rename the experiment."
        )
    return path


def _take_lock(path: Path) -> int:
    descriptor = open_lock_file(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Held(path.parent, *_read_owner(path)) from None
    except OSError:
        os.close(descriptor)
        raise
    if not _is_open_at(descriptor, path):
        os.close(descriptor)  # its owner refused the run and took the directory away
        raise Held(path.parent, None, None)
    os.ftruncate(descriptor, 0)
    write_all(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
    return descriptor


def _is_open_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read_owner(path: Path) -> tuple[int | None, str | None]:
    for _ in range(20):  # the owner writes its name just after it has the lock
        try:
            owner = json.loads(path.read_text())
            return int(owner["pid"]), str(owner["host"])
        except (ValueError, KeyError, TypeError):
            time.sleep(0.01)
    return None, None


def check_log_dir(log_dir: Path) -> None:
    """Refuse (ValueError) a log directory that is a file, lies inside one, or cannot be spelled."""
    existing = next(p for p in [log_dir, *log_dir.absolute().parents] if os.path.lexists(p))
    if not existing.is_dir():
        raise ValueError(f"--log_dir: {existing} is no directory; expected one, or a free name")
    try:  # files are opened by libraries that take names as UTF-8 alone
        str(log_dir.absolute()).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"--log_dir: found {str(log_dir)!r}, which this locale cannot spell; set PYTHONUTF8=1"
        ) from None


def check_disk(directory: Path, bytes_needed: int) -> None:
    """OSError where three checkpoints of `bytes_needed` do not fit.

    Three: the two that are kept and the one being written; what a cut run has kept counts as room.
    """
    existing = next(p for p in [directory, *directory.resolve().parents] if p.exists())
    kept = list(directory.glob("step-*.pt"))
    free = shutil.disk_usage(existing).free + sum(path.stat().st_size for path in kept)
    if free < 3 * bytes_needed:
        raise OSError(
            f"{directory}: {free / 2**20:.0f} MiB of disk are free, expected at least "
            f"{3 * bytes_needed / 2**20:.0f} MiB (three checkpoints): free some space or choose "
            f"another --log_dir."
        )


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory` (not a run) against other processes; raises Held at once if one has it."""
    lock = _take_lock(directory / ".lock")
    try:
        yield
    finally:
        os.close(lock)


class RunDir:
    """`logs/<run>/`, held by this process. Get one with `RunDir.open`.

    path         the directory
    checkpoints  `<path>/checkpoints` (created by `open`)
    metrics_path `<path>/metrics.jsonl`, one JSON object a line, the record of the run
    """

    def __init__(self, path: Path, lock: int, created: Sequence[Path] = ()) -> None:
        self.path = path
        self._created = created  # by this process: `path` and parents of it that were not there
        self.checkpoints = path / "checkpoints"
        self.metrics_path = path / "metrics.jsonl"
        self._lock = lock
        self.checkpoints.mkdir(exist_ok=True)
        remove_temporaries(path)
        for half_built in path.glob(".final-*"):  # an export that was killed
            shutil.rmtree(half_built)
        self._metrics = os.open(
            self.metrics_path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666
        )
        self._cut_torn_line()

    @classmethod
    def open(cls, log_dir: Path, run_name: str) -> RunDir:
        """Create `log_dir/run_name` if need be and lock it until `close` or the process's end.

        Raises Held at once if another process has it, ValueError for a name that leaves `log_dir`
        or clashes. The lock is `flock`: the kernel drops it when the owner dies, however it dies.
        On NFS it holds between machines only where the mount passes locks on (NFSv4, or `lockd`;
        not `nolock`/`local_lock=flock`), and not at all on most object-store mounts: machines that
        share nothing else need `run_owner.py`.
        """
        path = _resolve_run(log_dir, run_name)
        created = [place for place in (path, *path.parents) if not place.exists()]
        path.mkdir(parents=True, exist_ok=True)
        return cls(path, _take_lock(path / ".lock"), created)

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, ValueError):
            self._discard()
        self.close()

    def _discard(self) -> None:
        """Delete the directory if this process made it and it has no rows and no checkpoints."""
        if not self._created or self.offset() or any(self.checkpoints.iterdir()):
            return
        shutil.rmtree(self.path)
        for parent in self._created[1:]:
            with contextlib.suppress(OSError):  # something else is in it by now
                parent.rmdir()

    def close(self) -> None:
        """Give the lock back. Nothing may be written through this object afterwards."""
        if self._lock >= 0:
            os.close(self._metrics)
            os.close(self._lock)
            self._lock = self._metrics = -1

    def finished(self) -> dict[str, Any] | None:
        """`metrics.json` if the run is done, else None."""
        try:
            return read_json(self.path / "metrics.json")
        except FileNotFoundError:
            return None

    def claim_config(self, resolved: dict[str, Any], *digests: str) -> str:
        """Write `config.yaml` on the first call; later, refuse one that has none of `digests`.

        `resolved` holds plain values only. Returns the digest that the run was begun with. Raises
        ValueError that lists `key: stored -> asked`.
        """
        digest = begun_with(self.path, resolved, *digests)
        if digest is None:
            self.write_config(resolved, digests[0])
        return digest or digests[0]

    def write_config(self, resolved: dict[str, Any], digest: str) -> None:
        content = {"config_digest": digest, **resolved}
        write_atomic(self.path / "config.yaml", yaml.safe_dump(content, sort_keys=False).encode())

    def forget_evaluation(self) -> None:
        """Take away what a finished run measured: it is a trained run again, to be evaluated."""
        (self.path / "metrics.json").unlink(missing_ok=True)  # first: it says that the rest is true
        fsync_directory(self.path)
        for left in (*self.path.glob("documents_*.npz"), self.path / "smallbench_items.jsonl"):
            left.unlink(missing_ok=True)

    def append(self, row: dict[str, Any]) -> int:
        """Add one row to `metrics.jsonl`; returns the file's size in bytes after it.

        The row is with the kernel when this returns (a killed process keeps it); `sync` makes it
        survive a power cut. NaN or infinity: ValueError. A full disk: OSError, and no half row.
        """
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        before = self.offset()
        try:
            write_all(self._metrics, line)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._metrics, before)
            raise OSError(
                error.errno, f"could not append {len(line)} bytes", str(self.metrics_path)
            ) from error
        return before + len(line)

    def offset(self) -> int:
        """Size of `metrics.jsonl` in bytes."""
        return os.fstat(self._metrics).st_size

    def sync(self) -> None:
        """Make every appended row durable; to be called before a checkpoint stores `offset()`.

        Raises OSError where the directory was moved or deleted meanwhile: what is written from then
        on would begin another one, which has neither this lock nor these rows.
        """
        if not _is_open_at(self._lock, self.path / ".lock"):
            what = "moved or deleted while its run was at work"
            raise OSError(errno.ENOENT, what, str(self.path))
        os.fsync(self._metrics)

    def misfit(self, state: Mapping[str, Any]) -> str | None:
        """Why `metrics.jsonl` is not the one that a checkpoint's state was saved with, or None."""
        offset = state.get("metrics_offset", 0)
        if not 0 <= offset <= self.offset():
            return f"{self.metrics_path} has lost rows: {self.offset()} of {offset} bytes are there"
        if offset and os.pread(self._metrics, 1, offset - 1) != b"\n":
            return f"{self.metrics_path}: no row ends at byte {offset}"
        return None

    def truncate(self, offset: int) -> None:
        """Cut `metrics.jsonl` back to the byte offset of a checkpoint that is no `misfit`."""
        assert self.misfit({"metrics_offset": offset}) is None
        os.ftruncate(self._metrics, offset)
        os.fsync(self._metrics)

    def replace_metrics(self, data: bytes) -> None:
        """Make `metrics.jsonl` hold `data`, rows that another machine wrote for this run."""
        os.ftruncate(self._metrics, 0)
        write_all(self._metrics, data)
        os.fsync(self._metrics)

    def _cut_torn_line(self) -> None:
        """Drop what a crash left of a row, so that the next one does not continue it."""
        data = self.metrics_path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.ftruncate(self._metrics, end)

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """This run's rows (of one `kind`: "train", "dev", "kill_rule" or "event"), oldest first."""
        return read_rows(self.metrics_path, kind)

    def record_failure(self, kind: str, message: str) -> None:
        """Leave `failure.json`, so that the aggregator lists this run as failed."""
        write_json(self.path / "failure.json", {"kind": kind, "message": message})

    def clear_failure(self) -> None:
        """Remove `failure.json`: the run goes on."""
        (self.path / "failure.json").unlink(missing_ok=True)

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write `metrics.json`, last of all: its existence means that the run is done."""
        self.sync()
        self.clear_failure()
        write_json(self.path / "metrics.json", metrics)


class Preemption:
    """Turns TERM, INT, USR1 and USR2 into a flag that the training loop reads between steps.

        with Preemption() as stop:
            ...
            if stop.requested: save and exit 75

    INT is installed explicitly because a shell starts `command &` with INT ignored. The first
    signal stays in `signal_name`; more of them change nothing, so that a save is never cut short.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.requested = False
        self.signal_name: str | None = None
        self._old: dict[signal.Signals, Callable[..., Any] | int | None] = {}

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.requested:
            self.signal_name = signal.Signals(number).name
        self.requested = True

    def __enter__(self) -> Preemption:
        for number in self.SIGNALS:
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            # None: the handler was not installed from Python and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
