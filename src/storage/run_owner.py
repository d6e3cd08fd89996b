"""Which machine may write a run in a store: owner.json, claimed, left to settle, read again.

What this guarantees, and what it cannot, stands in `src/storage/remote.py`.
"""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.spec.command_line import Refusal
from src.storage.checkpoint import Bad, manifest_bytes, parse_manifest
from src.storage.files import read_json, write_json
from src.storage.object_store import ObjectStore
from src.storage.run_dir import Held

SCHEMA = 1
_MANIFEST = re.compile(r"g(\d{5,})-([0-9a-f]{8})-step-(\d{8,})\.json")


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


class RunOwner:
    """This process's claim on one run's place in a store.

    identity: of the run directory, so that it takes over from its own killed process at once.
    """

    def __init__(self, store: ObjectStore, place: str, identity: str, timing: Timing) -> None:
        self._store, self._place, self._timing = store, place, timing
        self._identity, self.token = identity, uuid.uuid4().hex
        self.generation = self._beats = 0
        self.next_beat = 0.0  # monotonic seconds

    @property
    def fencing_token(self) -> dict[str, Any]:
        """This writer's fencing token, as it stands in owner.json and in every manifest."""
        return {"token": self.token, "generation": self.generation}

    def acquire(self) -> None:
        """Raises Held where another machine has it and has shown life."""
        before = self._read()
        if before.get("token", self.token) != self.token:  # ours: a reply that was lost
            foreign = not before.get("released") and before.get("holder") != self._identity
            if foreign and self._age() < self._timing.stale_s:
                raise Held(self._place, before.get("pid"), before.get("host"))
        generations = [rank(name)[0] for name in manifest_names(self._store)]
        self.generation = 1 + max([int(before.get("generation", 0)), *generations])
        self._write()
        time.sleep(self._timing.settle_s)
        now = self._read()
        if now.get("token") != self.token:
            raise Held(self._place, now.get("pid"), now.get("host"))

    def _read(self) -> dict[str, Any]:
        """owner.json; {} where there is none."""
        try:
            return parse_manifest(self._store.get("owner.json"), "owner.json")
        except FileNotFoundError:
            return {}
        except Bad as error:
            raise OSError(f"{self._place}: {error}") from error

    def _write(self, released: bool = False) -> None:
        content = self.fencing_token | {
            "schema": SCHEMA,
            "holder": self._identity,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "heartbeat": self._beats,
            "released": released,
        }
        self._beats += 1
        self.next_beat = time.monotonic() + self._timing.heartbeat_s
        self._store.put("owner.json", manifest_bytes(content))

    def _age(self) -> float:
        """Seconds since the owner's last heartbeat, by the store's clock and no machine's."""
        clock = f"clock-{self.token}"
        self._store.put(clock, b"now")
        now, then = self._store.modified(clock), self._store.modified("owner.json")
        self._store.delete(clock)
        return 0.0 if now is None or then is None else (now - then).total_seconds()

    def check(self) -> None:
        """Raises Fenced where it is no longer ours."""
        now = self._read()
        if now.get("token") != self.token:
            raise Fenced(f"{self._place} is now owned by {now.get('host', 'nobody')}")
        above = [name for name in manifest_names(self._store) if rank(name)[0] > self.generation]
        if above:
            raise Fenced(f"{self._place} holds {above[0]}, of a later owner")

    def beat_if_due(self) -> None:
        """Show life; raises Fenced."""
        if time.monotonic() >= self.next_beat:
            self.next_beat = time.monotonic() + self._timing.heartbeat_s  # put() below ticks, too
            self.check()
            self._write()

    def release(self) -> None:
        """Give the run up, so that another machine can have it at once; raises Fenced."""
        self.check()
        self._write(released=True)


def manifest_names(store: ObjectStore) -> list[str]:
    """Names of a run's checkpoint manifests, the one to be preferred first."""
    names = [name for name in store.names("manifests") if _MANIFEST.fullmatch(name)]
    return sorted(names, key=rank, reverse=True)


def rank(name: str) -> tuple[int, int, str]:
    """(generation, step, token) of a manifest name."""
    match = _MANIFEST.fullmatch(name)
    assert match is not None
    return int(match[1]), int(match[3]), match[2]


def identity_of(local: Path | None) -> str:
    """What names a run directory of this machine since it booted; a new one each time without it.

    An owner of the same name has ended: a live one would hold the directory's lock. A copy of the
    directory, or another machine that sees it on a shared disk, has another name.
    """
    if local is None:
        return uuid.uuid4().hex
    path = local / "remote.json"
    try:
        holder = str(read_json(path)["holder"])
    except (FileNotFoundError, Refusal, KeyError):
        holder = uuid.uuid4().hex
        write_json(path, {"holder": holder})
    boot = Path("/proc/sys/kernel/random/boot_id")
    machine = boot.read_text() if boot.is_file() else str(uuid.getnode())
    return uuid.uuid5(uuid.NAMESPACE_URL, f"{holder} {machine.strip()} {local.resolve()}").hex
