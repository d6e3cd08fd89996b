"""Files that survive a crash: written atomically, locked, published whole. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.spec.command_line import Refusal

TEMPORARY = ".tmp"


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to `path` so that a reader, or a crash at any instant, sees the old or the new
    bytes and nothing between.

    Raises OSError with the path and the number of bytes when the disk refuses (full, read-only);
    the old file is then untouched and the temporary one is gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        _write_new(temporary, data)
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(
            error.errno or errno.EIO, f"could not write {len(data)} bytes ({reason})", str(path)
        ) from error


def _write_new(path: Path, data: bytes | memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def fsync_directory(path: Path) -> None:
    """Make renames and unlinks in `path` durable (some FUSE mounts cannot, and say EINVAL)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, obj: Any) -> None:
    """`write_atomic` of indented JSON, keys in the order given. NaN and infinity: ValueError."""
    write_atomic(path, (json.dumps(obj, indent=2, allow_nan=False) + "\n").encode())


def remove_temporaries(directory: Path) -> None:
    """Delete what writers that died left in `directory`. Only the lock owner may call."""
    for path in directory.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def open_lock_file(path: Path) -> int:
    """Open (create) `path` to be flock'ed; the descriptor is closed in forked children.

    A flock lives as long as any copy of its descriptor: a compile worker that outlives a killed
    run would otherwise keep the run locked for ever.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    identity = _identity(descriptor)

    def close_in_child() -> None:
        with contextlib.suppress(OSError):  # closed before the fork, its number perhaps reused
            if _identity(descriptor) == identity:
                os.close(descriptor)

    os.register_at_fork(after_in_child=close_in_child)
    return descriptor


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; Refusal where it holds none. FileNotFoundError passes through."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        content = error
    if not isinstance(content, dict):
        raise Refusal(
            f"{path}: found no JSON object ({str(content)[:80]}); delete it or make it again"
        )
    return content


def make_directory(path: Path) -> None:
    """Create `path` and its parents; Refusal where a file is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise Refusal(f"{path}: found a file, expected a directory or a free name") from None


@contextlib.contextmanager
def locked(path: Path, waiting: str = "") -> Iterator[None]:
    """Hold an exclusive flock on `path` (created); waits for its owner and says so once.

    The lock dies with its process, so a killed owner never blocks the next one.
    """
    descriptor = open_lock_file(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = waiting or f"{path.parent}: another process is writing here, waiting for it"
            print(message, flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """An empty directory at `path` for unfinished files; gone afterwards, whatever happened.

    Only the owner of the output's lock may ask: what lies at `path` is left from a killed one.
    """
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def replace_directory(new: Path, final: Path) -> None:
    """Rename a finished directory to its name; one that has the name already gives way whole."""
    for path in new.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    fsync_directory(new)
    with scratch_directory(final.with_name(f".{final.name}-replaced")) as old:
        if final.exists():
            os.rename(final, old / final.name)
        os.rename(new, final)
    fsync_directory(final.parent)


def publish(scratch: Path, output: Path, manifest: str) -> None:
    """Move every file of `scratch` into `output`, the manifest last.

    An older manifest goes first, so that no reader ever takes half a result for a whole one.
    """
    (output / manifest).unlink(missing_ok=True)
    names = sorted(path.name for path in scratch.iterdir() if path.name != manifest)
    for name in [*names, manifest]:
        with (scratch / name).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch / name, output / name)
    fsync_directory(output)
