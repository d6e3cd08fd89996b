"""Copies of checkpoints in an object store, so that a machine with an empty disk can go on.

One background thread copies; training never waits for it, and no error of it stops
training. In `<uri>/<run>/`:

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
   `open` (Held), or, if both wrote at once or it was suspended while replaced, sees the other
   token, or a manifest of a higher generation, before its next manifest; it stops pushing and
   `fenced` turns true.

What is not guaranteed: that two never *compute* at the same time. S3 (If-None-Match), GCS
(generation match) and Azure (ETag) could refuse the second writer of owner.json outright, but
pyarrow exposes none of the three, so a claim is written, left to settle, and read again. Two
processes may both act as owner until the next heartbeat; point 2 holds meanwhile.
Uploads that were killed leave objects that no manifest names: a lifecycle rule removes them.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from src.storage import checkpoint
from src.storage.checkpoint import (
    Bad,
    NoValidCheckpoint,
    check_digests,
    manifest_bytes,
    parse_manifest,
)
from src.storage.files import write_atomic
from src.storage.object_store import ERRORS, ObjectStore
from src.storage.run_dir import RunDir
from src.storage.run_owner import (
    SCHEMA,
    Fenced,
    RunOwner,
    Timing,
    identity_of,
    manifest_names,
    rank,
)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Remote:
    """One run's place in a store, owned by this process from `open` to `close`."""

    def __init__(self, store: ObjectStore, place: str, identity: str, timing: Timing) -> None:
        self._store, self._place, self._timing = store, place, timing
        self.owner = RunOwner(store, place, identity, timing)
        self._reason: str | None = None  # why we are fenced
        self._jobs: dict[str, Callable[[], None]] = {}  # what waits: a checkpoint, the final files
        self._busy = self._ended = False
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
        store = ObjectStore(
            uri, run_name, request_timeout_s=timing.request_timeout_s,
            connect_timeout_s=timing.connect_timeout_s,
        )  # fmt: skip
        place = f"{uri.partition('?')[0].rstrip('/')}/{run_name}"
        remote = cls(store, place, identity_of(local), timing)
        remote._patiently(remote.owner.acquire)
        store.tick = remote.owner.beat_if_due
        remote._thread.start()
        return remote

    def _patiently(self, action: Callable[[], _T], attempts: int = 4) -> _T:
        """The result of a foreground action, tried again when the store fails."""
        for attempt in range(attempts):
            try:
                return action()
            except ERRORS as error:
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

    @property
    def fenced(self) -> bool:
        """Whether another machine has taken the run over: save locally and exit 75."""
        return self._reason is not None

    # --- pushing

    def push(self, object_path: Path, manifest_path: Path, metrics_path: Path) -> None:
        """Queue a checkpoint that was just saved; returns at once. A newer one replaces it.

        Reads the files now, so pruning them later is harmless. Does nothing once fenced.
        """
        if self.fenced:
            return
        try:
            manifest = checkpoint.read_manifest(manifest_path)
            data = checkpoint.read_object(object_path.parent, manifest)
        except Bad as error:
            _log.error("not pushed: it has changed since it was saved: %s", error)
            return
        metrics = metrics_path.read_bytes()
        self._queue("checkpoint", lambda: self._upload_checkpoint(manifest, data, metrics))

    def push_final(self, run: RunDir, names: Sequence[str], digests: dict[str, str]) -> None:
        """Queue a finished run's files (names in its directory, metrics.json among them)."""
        self._queue("final", lambda: self._upload_final(run.path, names, digests))

    def _queue(self, name: str, job: Callable[[], None]) -> None:
        with self._changed:
            self._jobs[name] = job
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
        return landed

    def _idle(self) -> bool:
        return not self._busy and not self._jobs

    def _work(self) -> None:
        """Upload what waits, beat between, and give the run up when it is time to end."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._jobs or self._stop_at is not None,
                        timeout=max(0.0, self.owner.next_beat - time.monotonic()),
                    )
                    name = min(self._jobs, default=None)  # a checkpoint before the final files
                    job = self._jobs.pop(name) if name else None
                    self._busy, ending = job is not None, self._stop_at is not None
                self._until_done(
                    job or (self.owner.release if ending else self.owner.beat_if_due), name
                )
                if ending and job is None:
                    return
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
        except Fenced as fence:
            self._reason = str(fence)
            _log.warning("%s: this process stops pushing", fence)
        finally:
            with self._changed:
                self._busy, self._ended = False, True
                self._changed.notify_all()

    def _until_done(self, action: Callable[[], None], name: str | None) -> None:
        """Repeat `action` until the store takes it, a newer job of that name (of any, for a
        heartbeat) waits, or time is up."""

        def over() -> bool:
            late = self._stop_at is not None and time.monotonic() >= self._stop_at
            return late or (name in self._jobs if name else bool(self._jobs))

        backoff = self._timing.backoff_s
        while True:
            try:
                return action()
            except ERRORS as error:
                _log.warning("%s: %s; trying again in %.0f s", self._place, error, backoff)
            with self._changed:
                if self._changed.wait_for(over, timeout=backoff) or over():
                    return None
            backoff = min(2 * backoff, self._timing.backoff_max_s)

    def _upload_checkpoint(self, manifest: dict[str, Any], data: bytes, metrics: bytes) -> None:
        self.owner.check()
        prefix, step = f"g{self.owner.generation:05d}", f"step-{manifest['step']:08d}"
        metrics_sha = hashlib.sha256(metrics).hexdigest()
        object_key = f"objects/{prefix}-{step}-{manifest['sha256'][:16]}.pt"
        metrics_key = f"objects/{prefix}-{step}-{metrics_sha[:16]}.jsonl"
        self._store.put(object_key, data)
        self._store.put(metrics_key, metrics)
        content = {
            "schema": SCHEMA,
            "owner": self.owner.fencing_token,
            "manifest": {k: v for k, v in manifest.items() if k != "manifest_sha256"},
            "object": object_key,
            "metrics": metrics_key,
            "metrics_sha256": metrics_sha,
        }
        self.owner.check()
        name = f"{prefix}-{self.owner.token[:8]}-{step}.json"
        self._store.put(f"manifests/{name}", manifest_bytes(content))
        self._prune()

    def _prune(self, keep: int = 2) -> None:
        """Delete all but the preferred `keep` checkpoints, each manifest before its objects."""
        names = manifest_names(self._store)
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
            named = {content[key] for key in ("object", "metrics") if key in content}
            for key in named - in_use:
                self._store.delete(key)

    def _upload_final(self, path: Path, names: Sequence[str], digests: dict[str, str]) -> None:
        self.owner.check()
        listed = []
        for name in names:
            data = (path / name).read_bytes()
            self._store.put(f"final/{name}", data)
            sha256 = hashlib.sha256(data).hexdigest()
            listed.append({"name": name, "size": len(data), "sha256": sha256})
        self.owner.check()
        content = {
            "schema": SCHEMA,
            "owner": self.owner.fencing_token,
            "digests": digests,
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
        names = self._patiently(lambda: manifest_names(self._store))
        here = checkpoint.newest_verified(run.checkpoints, misfit=run.misfit)
        reasons = []
        for name in names:
            if here is not None and rank(name)[1] <= here["step"]:
                return None
            try:
                manifest, data, metrics = self._patiently(
                    functools.partial(self._fetch, name, digests)
                )
            except Bad as error:
                _log.warning("%s: %s; trying the one before", self._place, error)
                reasons.append(str(error))
                continue
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
        if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
            raise Bad(f"{content['object']} does not match its manifest")
        if hashlib.sha256(metrics).hexdigest() != content["metrics_sha256"]:
            raise Bad(f"{content['metrics']} does not match its manifest")
        if PurePosixPath(manifest["file"]).name != manifest["file"]:
            raise Bad(f"{name} names the file {manifest['file']!r}")
        return manifest, data, metrics

    def has_final(self) -> bool:
        """Whether the store has the results of the finished run."""
        return self._patiently(lambda: self._store.modified("final.json") is not None)

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
