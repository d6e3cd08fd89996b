"""What the data scripts share: refusals, exit codes, atomic files, locked output directories."""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

FAULT, IO_FAILURE, AGAIN, BAD_INPUT = 70, 74, 75, 78


class Refusal(ValueError):
    """Bad input: one whole sentence for the user, who has to change something."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes exit 78 with one sentence, like any other bad input."""

    def __init__(self, description: str, *, example: str) -> None:
        super().__init__(
            description=description,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; --help says what is accepted", file=sys.stderr)
        raise SystemExit(BAD_INPUT)


def run_script(main: Callable[[], None]) -> NoReturn:
    """Call `main` and exit: 0 done, 78 bad input, 74 not read or written, 70 our fault."""
    try:
        main()
    except Refusal as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"error: could not read or write {what}", file=sys.stderr)
        raise SystemExit(IO_FAILURE) from None
    except KeyboardInterrupt:
        print("interrupted: nothing unfinished is left, run the same command again")
        raise SystemExit(AGAIN) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(FAULT) from None
    raise SystemExit(0)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write so that a reader, or a crash at any instant, sees the old or the new bytes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json(path: Path, content: Any) -> None:
    """`write_atomic` of indented JSON; NaN and infinity are refused by json (ValueError)."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def sync_directory(path: Path) -> None:
    """Make renames in `path` durable; file systems that cannot (some network mounts) are let be."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Parse a JSON file; Refusal if it is not one. FileNotFoundError passes through."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise Refusal(f"{path}: found no valid JSON ({error}); make the file again") from None


def make_directory(path: Path) -> None:
    """Create `path` and its parents; Refusal where a file is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise Refusal(f"{path}: found a file, expected a directory or a free name") from None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive flock on `path` (created); waits for a holder and says so once.

    The lock dies with its process, so a killed holder never blocks the next one.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path.parent}: another process is writing here, waiting for it", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def workshop(path: Path) -> Iterator[Path]:
    """An empty directory at `path` for unfinished files; gone afterwards, whatever happened.

    Only the holder of the output's lock may ask: what lies at `path` is left from a killed one.
    """
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def publish(workshop_dir: Path, output: Path, manifest: str) -> None:
    """Move every file of `workshop_dir` into `output`, the manifest last.

    An older manifest goes first, so that no reader ever takes half a result for a whole one.
    """
    (output / manifest).unlink(missing_ok=True)
    names = sorted(path.name for path in workshop_dir.iterdir() if path.name != manifest)
    for name in [*names, manifest]:
        with (workshop_dir / name).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(workshop_dir / name, output / name)
    sync_directory(output)
