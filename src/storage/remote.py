"""Copies of checkpoints in an object store, so that a machine with an empty disk can go on.

`s3://`, `gs://`, `abfs://` and `file://` through pyarrow's file systems. One background thread
copies; training never waits for it and never dies of it. In `<uri>/<run>/`:

    owner.json                      who may write: token, generation, heartbeat count, released
    objects/g<generation>-<name>-<sha>.pt, .jsonl   a checkpoint's object; its metrics.jsonl
    manifests/g<generation>-<token>-step-<step>.json  written after both, and after reading both
                                    back (stores and their stand-ins accept wrong checksums)
    final/..., final.json           a finished run's files, then what they are

What is guaranteed, on every store, because it needs only strongly consistent reads after writes
(S3, GCS, Azure Blob and POSIX have them):

1. A manifest is never there without its object and metrics, whole. Names contain the writer's
   generation and the content's hash and are never written twice with other bytes; only manifests
   are followed; they are deleted before what they name.
2. Readers take the highest generation, then the highest step, that verifies. What a writer that was
   fenced out still lands has a lower generation and can neither overwrite nor hide the winner's.
3. Two machines on one run: the one whose token stays in owner.json wins. The other is refused at
   `open` (Held), or, if both wrote at once or it slept through its own replacement, sees the other
   token, or a manifest of a higher generation, before its next manifest; it stops pushing and
   `fenced` turns true.

What is not guaranteed: that two never *compute* at the same time. S3 (If-None-Match), GCS
(generation match) and Azure (ETag) could refuse the second writer of owner.json outright, but
pyarrow exposes none of the three, so a claim is written, left to settle, and read again. Two
claimants may both believe in themselves for up to one heartbeat; point 2 holds meanwhile.
Uploads that were killed leave objects that no manifest names: a lifecycle rule removes them.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
import re
import socket
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
from pyarrow import fs

from src.storage import address, checkpoint
from src.storage.checkpoint import (
    Bad,
    NoValidCheckpoint,
    check_digests,
    manifest_bytes,
    parse_manifest,
)
from src.storage.run_dir import Held, RunDir, write_atomic, write_json

SCHEMA = 1
_CHUNK = 4 << 20
_MANIFEST = re.compile(r"g(\d{5,})-([0-9a-f]{8})-step-(\d{8,})\.json")
_STORE_ERRORS = (OSError, pa.ArrowException)
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds. A dead owner is replaced after `stale_s`, which must outlast a stalled request."""

    heartbeat_s: float = 30.0
    stale_s: float = 180.0
    settle_s: float = 2.0
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0
    request_timeout_s: float = 20.0
    connect_timeout_s: float = 10.0


class Fenced(Exception):
    """Another machine has taken this run over; this one must stop."""


# --- the store ----------------------------------------------------------------------------------


def _connect(uri: str, timing: Timing) -> tuple[fs.FileSystem, str]:
    """(file system, path below it) of a URI; ValueError for one that cannot be used."""
    parts = address.check(uri)
    try:
        if parts.scheme == "s3":
            return _connect_s3(parts, timing)
        return fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"--remote cannot be used: {error}") from error


def _connect_s3(parts: urllib.parse.SplitResult, timing: Timing) -> tuple[fs.FileSystem, str]:
    """As FileSystem.from_uri, which cannot set timeouts or turn background writes off."""
    options = dict(urllib.parse.parse_qsl(parts.query))
    in_environment = any(os.environ.get(n) for n in ("AWS_REGION", "AWS_DEFAULT_REGION"))
    if not (options.keys() & {"region", "endpoint_override"} or in_environment):
        options["region"] = fs.resolve_s3_region(parts.netloc)
    store = fs.S3FileSystem(
        **options,
        request_timeout=timing.request_timeout_s,
        connect_timeout=timing.connect_timeout_s,
        background_writes=False,  # else all the waiting is in close(), where no heartbeat fits
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),
    )
    return store, f"{parts.netloc}{parts.path}"


class _Store:
    """Whole objects by key below one path. `tick` is called between chunks."""

    def __init__(self, file_system: fs.FileSystem, base: str) -> None:
        self._fs, self._base = file_system, base.rstrip("/")
        self._local = file_system.type_name == "local"
        self.tick: Callable[[], None] = lambda: None

    def _path(self, key: str) -> str:
        return f"{self._base}/{key}"

    def put(self, key: str, source: bytes | BinaryIO) -> tuple[int, str]:
        """Write, then read back: OSError unless the store returns the same bytes.

        Returns their (size, SHA-256).
        """
        stream = io.BytesIO(source) if isinstance(source, bytes) else source
        stream.seek(0)
        path = self._path(key)
        target = path
        if self._local:  # object stores show whole objects alone; a POSIX directory does not
            target = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
            self._fs.create_dir(path.rpartition("/")[0], recursive=True)
        digest, size = hashlib.sha256(), 0
        with self._fs.open_output_stream(target) as out:
            while chunk := stream.read(_CHUNK):
                out.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                self.tick()
        if self._local:
            self._fs.move(target, path)
        if self.digest(key) != (size, digest.hexdigest()):
            raise OSError(f"{key} was read back with other bytes than were written")
        return size, digest.hexdigest()

    def _chunks(self, key: str) -> Iterator[bytes]:
        with self._fs.open_input_stream(self._path(key)) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
                self.tick()

    def get(self, key: str) -> bytes:
        """The object's bytes; FileNotFoundError if there is none."""
        return b"".join(self._chunks(key))

    def digest(self, key: str) -> tuple[int, str]:
        """(size, SHA-256) of what the store returns."""
        digest, size = hashlib.sha256(), 0
        for chunk in self._chunks(key):
            digest.update(chunk)
            size += len(chunk)
        return size, digest.hexdigest()

    def names(self, folder: str) -> list[str]:
        """Names of the objects in `folder`; [] if there is no such folder."""
        selector = fs.FileSelector(self._path(folder), allow_not_found=True)
        found = self._fs.get_file_info(selector)
        return [info.base_name for info in found if info.type == fs.FileType.File]

    def modified(self, key: str) -> datetime | None:
        """When the store says that the object was written, by its own clock."""
        info: fs.FileInfo = self._fs.get_file_info(self._path(key))
        return info.mtime

    def delete(self, key: str) -> None:
        """Delete the object if it is there."""
        try:
            self._fs.delete_file(self._path(key))
        except FileNotFoundError:
            pass


# --- what is uploaded ---------------------------------------------------------------------------


@dataclass(slots=True)
class _Checkpoint:
    """A checkpoint as it was at `push`: an open descriptor outlives the local pruning."""

    manifest: dict[str, Any]
    object_file: BinaryIO
    metrics: bytes


@dataclass(slots=True)
class _Final:
    """Files of a finished run, by their name in the run directory."""

    files: dict[str, Path]
    digests: dict[str, str]


class Remote:
    """One run's place in a store, owned by this process from `open` to `close`."""

    def __init__(self, store: _Store, place: str, timing: Timing) -> None:
        self._store, self._place, self._timing = store, place, timing
        self._token = uuid.uuid4().hex
        self._generation = 0
        self._beats = 0
        self._next_beat = 0.0
        self._reason: str | None = None  # why we are fenced
        self._checkpoint: _Checkpoint | None = None
        self._final: _Final | None = None
        self._busy = False
        self._ended = False
        self._holder = ""
        self._stop_at: float | None = None  # monotonic seconds after which retrying ends
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="remote", daemon=True)

    @classmethod
    def open(
        cls, uri: str, run_name: str, *, local: Path | None = None, timing: Timing | None = None
    ) -> Remote:
        """Become the owner of `<uri>/<run_name>` and start the background thread.

        `local` is the run directory, whose lock the caller holds: it keeps an identity by which
        the same directory takes over from its own killed process without waiting. Raises Held if
        another machine owns the run and has shown life within `stale_s`, ValueError for a URI that
        cannot be used, OSError if the store cannot be reached.
        """
        timing = timing or Timing()
        file_system, path = _connect(uri, timing)
        place = f"{uri.partition('?')[0].rstrip('/')}/{run_name}"
        remote = cls(_Store(file_system, f"{path.rstrip('/')}/{run_name}"), place, timing)
        remote._patiently(lambda: remote._acquire(_identity(local)))
        remote._store.tick = remote._beat_if_due
        remote._thread.start()
        return remote

    def _patiently(self, action: Callable[[], _T], attempts: int = 4) -> _T:
        """The result of a foreground action, tried again when the store fails."""
        for attempt in range(attempts):
            try:
                return action()
            except _STORE_ERRORS as error:
                if attempt == attempts - 1:
                    raise OSError(f"{self._place}: {error}") from error
                _log.warning("%s: %s; trying again", self._place, error)
                time.sleep(min(self._timing.backoff_s * 2**attempt, self._timing.backoff_max_s))
        raise AssertionError("unreachable")

    @property
    def stuck(self) -> bool:
        """Whether a request is still in flight after `close`. Python's exit then waits for it (up
        to 40 s with the store unreachable): end the process with `os._exit` instead."""
        return self._thread.is_alive()

    # --- ownership

    @property
    def fenced(self) -> bool:
        """Whether another machine has taken the run over: save locally and exit 75."""
        return self._reason is not None

    @property
    def owner(self) -> dict[str, Any]:
        """This writer's fencing token, as it stands in owner.json and in every manifest."""
        return {"token": self._token, "generation": self._generation}

    def _acquire(self, holder: str) -> None:
        record = self._read_owner()
        if record and record.get("token") != self._token:  # ours: an attempt whose answer was lost
            foreign = not record.get("released") and record.get("holder") != holder
            if foreign and self._age_of_owner() < self._timing.stale_s:
                raise Held(self._place, record.get("pid"), record.get("host"))
        known = int(record.get("generation", 0)) if record else 0
        manifests = (_MANIFEST.fullmatch(name) for name in self._store.names("manifests"))
        self._generation = 1 + max([known, *(int(m[1]) for m in manifests if m)])
        self._holder = holder
        self._write_owner()
        time.sleep(self._timing.settle_s)
        now = self._read_owner() or {}
        if now.get("token") != self._token:
            raise Held(self._place, now.get("pid"), now.get("host"))

    def _read_owner(self) -> dict[str, Any] | None:
        try:
            raw = self._store.get("owner.json")
        except FileNotFoundError:
            return None
        try:
            return parse_manifest(raw, "owner.json")
        except Bad as error:
            raise OSError(f"{self._place}: {error}") from error

    def _write_owner(self, released: bool = False) -> None:
        record = self.owner | {
            "schema": SCHEMA,
            "holder": self._holder,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "heartbeat": self._beats,
            "released": released,
        }
        self._beats += 1
        self._next_beat = time.monotonic() + self._timing.heartbeat_s
        self._store.put("owner.json", manifest_bytes(record))

    def _age_of_owner(self) -> float:
        """Seconds since the owner's last heartbeat, by the store's clock and no machine's."""
        probe = f"clock-{self._token}"
        self._store.put(probe, b"now")
        now, then = self._store.modified(probe), self._store.modified("owner.json")
        self._store.delete(probe)
        return 0.0 if now is None or then is None else (now - then).total_seconds()

    def _check_owner(self) -> None:
        record = self._read_owner()
        if record is None or record.get("token") != self._token:
            host = (record or {}).get("host", "nobody")
            raise Fenced(f"{self._place} is now owned by {host}")
        above = [n for n in self._manifest_names() if _rank(n)[0] > self._generation]
        if above:
            raise Fenced(f"{self._place} holds {above[0]}, of a later owner")

    def _beat_if_due(self) -> None:
        if time.monotonic() < self._next_beat:
            return
        self._next_beat = time.monotonic() + self._timing.heartbeat_s  # put() below ticks, too
        self._check_owner()
        self._write_owner()

    # --- pushing

    def push(self, object_path: Path, manifest_path: Path, metrics_path: Path) -> None:
        """Queue a checkpoint that was just saved; returns at once. A newer one replaces it.

        Opens the files now, so pruning them later is harmless. Does nothing once fenced. Raises
        `Bad` or OSError only if the local files are not what `checkpoint.save` has just written.
        """
        if self.fenced:
            return
        job = _Checkpoint(
            manifest=checkpoint.read_manifest(manifest_path),
            object_file=object_path.open("rb"),
            metrics=metrics_path.read_bytes(),
        )
        with self._changed:
            replaced, self._checkpoint = self._checkpoint, job
            self._changed.notify_all()
        if replaced is not None:
            replaced.object_file.close()

    def push_final(self, run: RunDir, names: Sequence[str], digests: dict[str, str]) -> None:
        """Queue a finished run's files (names in its directory, metrics.json among them)."""
        job = _Final({name: run.path / name for name in names}, digests)
        with self._changed:
            self._final = job
            self._changed.notify_all()

    def drain(self, timeout: float) -> bool:
        """Wait until everything pushed is in the store; False if `timeout` seconds, a fence or
        `close` came first. What is queued stays queued."""
        with self._changed:
            self._changed.wait_for(lambda: self._idle() or self._ended, timeout)
            return self._idle() and not self._ended

    def close(self, timeout: float = 20.0) -> bool:
        """`drain`, then give the run up, so that another machine can have it at once.

        Returns whether everything landed. If not, the thread may be left behind (see `stuck`),
        and the next machine waits for `stale_s`.
        """
        deadline = time.monotonic() + timeout
        landed = self.drain(timeout)
        with self._changed:
            self._stop_at = deadline
            self._changed.notify_all()
        self._thread.join(max(0.1, deadline - time.monotonic()))
        with self._changed:
            if self._checkpoint is not None:
                self._checkpoint.object_file.close()
                self._checkpoint = None
        return landed

    def _idle(self) -> bool:
        return not self._busy and self._checkpoint is None and self._final is None

    def _work(self) -> None:
        try:
            while self._serve_one():
                pass
        except Fenced as fence:
            self._reason = str(fence)
            _log.warning("%s: this process stops pushing", fence)
        finally:
            with self._changed:
                self._busy, self._ended = False, True
                self._changed.notify_all()

    def _serve_one(self) -> bool:
        """Upload the next job, or beat; False when it is time to end."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._idle() or self._stop_at is not None,
                timeout=max(0.0, self._next_beat - time.monotonic()),
            )
            checkpoint_job, self._checkpoint = self._checkpoint, None
            final_job = None if checkpoint_job else self._final
            if final_job:
                self._final = None
            self._busy = bool(checkpoint_job or final_job)
            stopping = self._stop_at is not None
        if checkpoint_job:
            with checkpoint_job.object_file:
                self._until_done(
                    lambda: self._upload_checkpoint(checkpoint_job), lambda: self._checkpoint
                )
        elif final_job:
            self._until_done(lambda: self._upload_final(final_job), lambda: None)
        elif stopping:
            self._until_done(self._release, lambda: None)
            return False
        else:
            self._until_done(self._beat_if_due, lambda: self._checkpoint or self._final)
        with self._changed:
            self._busy = False
            self._changed.notify_all()
        return True

    def _until_done(self, action: Callable[[], None], newer: Callable[[], object]) -> None:
        """Repeat `action` until the store takes it, something newer waits, or time is up."""
        backoff = self._timing.backoff_s
        while True:
            try:
                return action()
            except _STORE_ERRORS as error:
                _log.warning("%s: %s; trying again in %.0f s", self._place, error, backoff)
            with self._changed:
                self._changed.wait_for(lambda: newer() or self._time_is_up(), timeout=backoff)
                if newer() or self._time_is_up():
                    return None
            backoff = min(2 * backoff, self._timing.backoff_max_s)

    def _time_is_up(self) -> bool:
        return self._stop_at is not None and time.monotonic() >= self._stop_at

    def _release(self) -> None:
        self._check_owner()
        self._write_owner(released=True)

    def _upload_checkpoint(self, job: _Checkpoint) -> None:
        self._check_owner()
        local, prefix = job.manifest, f"g{self._generation:05d}"
        stem = f"{prefix}-step-{local['step']:08d}"
        object_key = f"objects/{stem}-{local['sha256'][:16]}.pt"
        if self._store.put(object_key, job.object_file) != (local["size"], local["sha256"]):
            _log.error("%s: the local file has changed since it was saved; not pushed", object_key)
            return
        metrics_sha = hashlib.sha256(job.metrics).hexdigest()
        metrics_key = f"objects/{stem}-{metrics_sha[:16]}.jsonl"
        self._store.put(metrics_key, job.metrics)
        content = {
            "schema": SCHEMA,
            "owner": self.owner,
            "manifest": {k: v for k, v in local.items() if k != "manifest_sha256"},
            "object": object_key,
            "metrics": metrics_key,
            "metrics_sha256": metrics_sha,
        }
        self._check_owner()
        name = f"{prefix}-{self._token[:8]}-step-{local['step']:08d}.json"
        self._store.put(f"manifests/{name}", manifest_bytes(content))
        self._prune()

    def _manifest_names(self) -> list[str]:
        """Manifests, the one to be preferred first."""
        names = [name for name in self._store.names("manifests") if _MANIFEST.fullmatch(name)]
        return sorted(names, key=_rank, reverse=True)

    def _prune(self, keep: int = 2) -> None:
        """Delete all but the preferred `keep` checkpoints, each manifest before its objects."""
        names = self._manifest_names()
        try:
            kept = [self._read_content(name) for name in names[:keep]]
        except (Bad, FileNotFoundError):
            return  # what the damaged one uses is unknown
        in_use = {content[key] for content in kept for key in ("object", "metrics")}
        for name in names[keep:]:
            try:
                content = self._read_content(name)
            except (Bad, FileNotFoundError):
                content = {}
            self._store.delete(f"manifests/{name}")
            for key in ("object", "metrics"):
                if key in content and content[key] not in in_use:
                    self._store.delete(content[key])

    def _upload_final(self, job: _Final) -> None:
        self._check_owner()
        listed = []
        for name, path in job.files.items():
            with path.open("rb") as file:
                size, sha256 = self._store.put(f"final/{name}", file)
            listed.append({"name": name, "size": size, "sha256": sha256})
        self._check_owner()
        content = {
            "schema": SCHEMA,
            "owner": self.owner,
            "digests": job.digests,
            "files": listed,
        }
        self._store.put("final.json", manifest_bytes(content))

    # --- fetching

    def _read_content(self, name: str) -> dict[str, Any]:
        content = parse_manifest(self._store.get(f"manifests/{name}"), name)
        if content.get("schema") != SCHEMA:
            raise Bad(f"{name} has schema {content.get('schema')!r}, expected {SCHEMA}")
        return content

    def fetch_latest(self, run: RunDir, *, digests: Mapping[str, str]) -> int | None:
        """Bring the store's newest checkpoint and its metrics into `run` if it is ahead of the
        newest local one that verifies; returns its step, or None if nothing was fetched.

        Everything is verified on this side before anything is written. Raises NoValidCheckpoint if
        the store has checkpoints and none verifies, ValueError if it was saved under other
        `digests`, OSError if the store cannot be read: never a silent start at 0.
        """
        names = self._patiently(self._manifest_names)
        here = checkpoint.newest_verified(run.checkpoints, misfit=run.misfit)
        reasons = []
        for name in names:
            if here is not None and _rank(name)[1] <= here["step"]:
                return None
            try:
                fetched = self._patiently(functools.partial(self._fetch, name, digests))
            except Bad as error:
                _log.warning("%s: %s; trying the one before", self._place, error)
                reasons.append(str(error))
                continue
            manifest, data, metrics = fetched
            # metrics first and the manifest last: a crash in between fetches again
            run.replace_metrics(metrics)
            write_atomic(run.checkpoints / manifest["file"], data)
            write_atomic(
                run.checkpoints / f"step-{manifest['step']:08d}.json", manifest_bytes(manifest)
            )
            return int(manifest["step"])
        if reasons and here is None:
            raise NoValidCheckpoint(
                f"{self._place} holds checkpoints, but none that can be trusted "
                f"({'; '.join(reasons)}). Delete it to start over from step 0."
            )
        return None

    def _fetch(self, name: str, digests: Mapping[str, str]) -> tuple[dict[str, Any], bytes, bytes]:
        try:
            content = self._read_content(name)
            manifest = content["manifest"]
            check_digests(f"{self._place}/manifests/{name}", manifest["digests"], digests)
            data, metrics = self._store.get(content["object"]), self._store.get(content["metrics"])
        except (FileNotFoundError, KeyError) as error:
            raise Bad(f"{name} or what it names is missing: {error}") from error
        if (len(data), hashlib.sha256(data).hexdigest()) != (manifest["size"], manifest["sha256"]):
            raise Bad(f"{content['object']} does not match its manifest")
        if hashlib.sha256(metrics).hexdigest() != content["metrics_sha256"]:
            raise Bad(f"{content['metrics']} does not match its manifest")
        if PurePosixPath(manifest["file"]).name != manifest["file"]:
            raise Bad(f"{name} names the file {manifest['file']!r}")
        return manifest, data, metrics

    def fetch_final(self, run: RunDir, *, digests: Mapping[str, str]) -> bool:
        """Bring a finished run's files into `run`, metrics.json last; False if there are none.

        Raises ValueError if it was finished under other `digests`, OSError if it cannot be read.
        """
        return self._patiently(lambda: self._fetch_final(run, digests))

    def _fetch_final(self, run: RunDir, digests: Mapping[str, str]) -> bool:
        try:
            content = parse_manifest(self._store.get("final.json"), "final.json")
        except FileNotFoundError:
            return False
        except Bad as error:
            raise OSError(str(error)) from error
        check_digests(f"{self._place}/final.json", content["digests"], digests)
        files: dict[str, bytes] = {}
        for entry in content["files"]:
            name, data = entry["name"], self._store.get(f"final/{entry['name']}")
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise OSError(f"final/{name} does not match final.json")
            if not (run.path / name).resolve().is_relative_to(run.path.resolve()):
                raise OSError(f"final.json names {name!r}, outside the run directory")
            files[name] = data
        for name in sorted(files, key=lambda name: name == "metrics.json"):
            if name == run.metrics_path.name:
                run.replace_metrics(files[name])
                continue
            (run.path / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(run.path / name, files[name])
        return True


def _rank(name: str) -> tuple[int, int, str]:
    """(generation, step, token) of a manifest name."""
    match = _MANIFEST.fullmatch(name)
    assert match is not None
    return int(match[1]), int(match[3]), match[2]


def _identity(local: Path | None) -> str:
    """What names a run directory on one disk, kept in it; a new one each time without it."""
    if local is None:
        return uuid.uuid4().hex
    path = local / "remote.json"
    try:
        return str(json.loads(path.read_bytes())["holder"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        holder = uuid.uuid4().hex
        write_json(path, {"holder": holder})
        return holder
