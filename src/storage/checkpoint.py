"""Checkpoints that are whole or absent: hashed, written atomically, verified before use.

A checkpoint is an object `step-<step>-g<generation>.pt` and a manifest `step-<step>.json`, which
is written last and so commits it. Object names never repeat: saving a step again replaces nothing
that the old manifest points to. `torch.load` notices a flipped bit in one load of 1,500, so the
SHA-256 in the manifest is the check of the bytes; the manifest carries one of its own.
The caller holds the run's lock: nobody else writes into the directory.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from src.storage.files import fsync_directory, remove_temporaries, write_atomic

SCHEMA = 1
_OBJECT = re.compile(r"step-(\d{8,})-g(\d{5,})\.pt")
_MANIFEST = re.compile(r"step-(\d{8,})\.json")
_FIELDS = {"schema", "step", "generation", "file", "size", "sha256", "digests", "environment"}
# what the weights-only unpickler raises for bytes that are not a state dict of ours
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
)


class NoValidCheckpoint(ValueError):
    """Checkpoints are there and none of them can be trusted; starting at 0 must be asked for."""


class Bad(Exception):
    """This one checkpoint cannot be trusted; the message says why."""


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The only byte form of a manifest: any other, by a single bit, is a damaged one."""
    fields = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    body = json.dumps(fields, sort_keys=True, allow_nan=False)
    fields["manifest_sha256"] = hashlib.sha256(body.encode()).hexdigest()
    return (json.dumps(fields, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def parse_manifest(raw: bytes, name: str) -> dict[str, Any]:
    """The object that `manifest_bytes` wrote as `raw`, every bit of it; raises Bad."""
    try:
        manifest = json.loads(raw)
    except ValueError as error:
        raise Bad(f"{name} is not JSON") from error
    if not isinstance(manifest, dict) or manifest_bytes(manifest) != raw:
        raise Bad(f"{name} does not match its own sha256")
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and verify a manifest; raises Bad."""
    try:
        manifest = parse_manifest(path.read_bytes(), path.name)
    except FileNotFoundError as error:
        raise Bad(f"{path.name} is missing") from error
    if manifest.get("schema") != SCHEMA:
        raise Bad(f"{path.name} has schema {manifest.get('schema')!r}, expected {SCHEMA}")
    if _FIELDS - set(manifest):
        raise Bad(f"{path.name} lacks {sorted(_FIELDS - set(manifest))}")
    named = _OBJECT.fullmatch(str(manifest["file"]))
    if (
        path.stem != f"step-{manifest['step']:08d}"
        or not named
        or int(named[1]) != manifest["step"]
    ):
        raise Bad(f"{path.name} describes step {manifest['step']}, file {manifest['file']!r}")
    return manifest


def read_object(directory: Path, manifest: Mapping[str, Any]) -> bytes:
    """The object's bytes, size and SHA-256 verified; raises Bad."""
    path = directory / manifest["file"]
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise Bad(f"{path.name} is missing") from error
    if len(data) != manifest["size"]:
        raise Bad(f"{path.name} has {len(data)} bytes, expected {manifest['size']}")
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise Bad(f"{path.name} does not match the sha256 in its manifest")
    return data


def _unpickle(data: bytes, name: str) -> dict[str, Any]:
    if not data.startswith(b"PK\x03\x04"):  # a zip archive; torch.load would take bare pickles too
        raise Bad(f"{name} is not an archive that torch.save wrote")
    try:
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except _UNPICKLING_ERRORS as error:
        raise Bad(f"{name} holds more than tensors and plain values: {error}") from error
    if not isinstance(state, dict):
        raise Bad(f"{name} holds a {type(state).__name__}, expected a dict")
    return state


def _manifests(directory: Path) -> list[Path]:
    """Manifest paths, newest step first: by the step in the name, never by a clock."""
    steps = [(int(m[1]), p) for p in directory.iterdir() if (m := _MANIFEST.fullmatch(p.name))]
    return [path for _, path in sorted(steps, reverse=True)]


def _objects(directory: Path) -> list[Path]:
    return sorted(p for p in directory.iterdir() if _OBJECT.fullmatch(p.name))


def _next_generation(directory: Path) -> int:
    """One more than any save that left a trace here, the ones set aside included."""
    names = (_OBJECT.match(path.name) for path in directory.iterdir())
    return 1 + max((int(match[2]) for match in names if match), default=0)


def save(
    directory: Path,
    state: dict[str, Any],
    *,
    step: int,
    digests: dict[str, str],
    environment: dict[str, Any],
    keep: int = 2,
    on_saved: Callable[[Path, Path], None] | None = None,
) -> Path:
    """Write `state` (nested dicts, lists, tensors, plain values) as the checkpoint of `step`.

    Returns the object's path, once object and manifest are durable; then all but the newest
    `keep` are deleted and `on_saved(object, manifest)` is called. `digests` (config, tokenizer,
    data) must be equal when it is loaded; `environment` is for people. Raises OSError with path
    and bytes when it cannot write: earlier checkpoints are then untouched.
    """
    assert step >= 0 and keep >= 1
    directory.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)  # to memory: on a full disk torch.save leaves a truncated file
    data = buffer.getbuffer()
    assert all(step >= int(path.stem.removeprefix("step-")) for path in _manifests(directory))
    _remove_leftovers(directory)
    generation = _next_generation(directory)
    object_path = directory / f"step-{step:08d}-g{generation:05d}.pt"
    manifest_path = directory / f"step-{step:08d}.json"
    manifest = {
        "schema": SCHEMA,
        "step": step,
        "generation": generation,
        "file": object_path.name,
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "digests": digests,
        "environment": environment,
    }
    raw_manifest = manifest_bytes(manifest)
    try:
        write_atomic(object_path, data)
        write_atomic(manifest_path, raw_manifest)
    except OSError:
        _discard_uncommitted(object_path, manifest_path, raw_manifest)
        raise
    _prune(directory, keep)
    if on_saved is not None:
        on_saved(object_path, manifest_path)
    return object_path


def _discard_uncommitted(object_path: Path, manifest_path: Path, raw_manifest: bytes) -> None:
    """Free the object's space, unless its manifest was renamed into place before the error."""
    try:
        committed = manifest_path.read_bytes() == raw_manifest
    except OSError:
        committed = False
    if not committed:
        object_path.unlink(missing_ok=True)


def _remove_leftovers(directory: Path) -> None:
    """Delete what killed saves left: temporary files, and objects that no manifest names.

    With unreadable manifests around, what they name is unknown, so objects are left alone.
    """
    remove_temporaries(directory)
    try:
        named = {read_manifest(path)["file"] for path in _manifests(directory)}
    except Bad:
        return
    for path in _objects(directory):
        if path.name not in named:
            path.unlink(missing_ok=True)


def _prune(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints: manifest first, so none outlives its object."""
    for path in _manifests(directory)[keep:]:
        path.unlink(missing_ok=True)
    fsync_directory(directory)
    _remove_leftovers(directory)


Misfit = Callable[[Mapping[str, Any]], str | None]
"""Says of a state that verifies why it cannot be gone on from all the same, or None."""


def newest_verified(directory: Path, *, misfit: Misfit = lambda _: None) -> dict[str, Any] | None:
    """Manifest of the newest checkpoint that `load_latest` would take; changes nothing."""
    for path in _manifests(directory) if directory.is_dir() else []:
        try:
            manifest = read_manifest(path)
            _read_state(directory, manifest, misfit)
        except Bad:
            continue
        return manifest
    return None


def _read_state(directory: Path, manifest: dict[str, Any], misfit: Misfit) -> dict[str, Any]:
    state = _unpickle(read_object(directory, manifest), manifest["file"])
    if (reason := misfit(state)) is not None:
        raise Bad(f"{manifest['file']}: {reason}")
    return state


def load_latest(
    directory: Path, *, digests: dict[str, str], misfit: Misfit = lambda _: None
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(state on the CPU, manifest) of the newest checkpoint that verifies; None if none was saved.

    Damaged ones, and those that are a `misfit` (their rows are lost, see `RunDir.misfit`), are
    warned about and, once an older one is taken, renamed to `*.bad`. Raises
    NoValidCheckpoint if there are checkpoints and none verifies, and ValueError if the newest was
    saved under another config, tokenizer or data (`digests`).

    "None was saved" is every state that a kill during the very first save can leave: nothing,
    temporary files, or the one object of generation 1 without its manifest.
    """
    if not directory.is_dir():
        return None
    manifests = _manifests(directory)
    if not manifests and _nothing_was_saved(directory):
        return None
    damaged: list[tuple[Path, str]] = []
    for path in manifests:
        try:
            manifest = read_manifest(path)
            check_digests(path, manifest["digests"], digests)
            state = _read_state(directory, manifest, misfit)
        except Bad as error:
            damaged.append((path, str(error)))
            continue
        for bad, reason in damaged:
            warnings.warn(
                f"checkpoint set aside: {reason}; going on from step {manifest['step']}.",
                stacklevel=2,
            )
            _set_aside(directory, bad, spare=manifest["file"])
        return state, manifest
    reasons = "; ".join(reason for _, reason in damaged) or "manifests are missing"
    raise NoValidCheckpoint(
        f"{directory} holds checkpoints, but none that can be trusted ({reasons}). Restore one "
        f"from a copy, or delete {directory} to start over from step 0."
    )


def _nothing_was_saved(directory: Path) -> bool:
    set_aside = any(path.suffix == ".bad" for path in directory.iterdir())
    generations = [int(m[2]) for p in _objects(directory) if (m := _OBJECT.fullmatch(p.name))]
    return not set_aside and generations in ([], [1])


def check_digests(path: Path | str, stored: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Raise ValueError that names the first of config, tokenizer and data that differs."""
    for name in {**stored, **current}:
        if stored.get(name) != current.get(name):
            raise ValueError(
                f"{path}, key digests.{name}: the checkpoint was saved with {stored.get(name)}, "
                f"this run has {current.get(name)}. Bring the {name} back as it was, or give the "
                f"experiment another name."
            )


def _set_aside(directory: Path, manifest: Path, spare: str) -> None:
    """Rename a damaged manifest and its step's objects; never `spare`, which is in use."""
    step = manifest.stem
    for path in [manifest, *_objects(directory)]:
        if path == manifest or (path.name.startswith(f"{step}-g") and path.name != spare):
            path.rename(path.with_name(f"{path.name}.bad"))
    fsync_directory(directory)


def pack_rng() -> dict[str, Any]:
    """States of every generator that training may draw from: torch CPU, Python, current GPU."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()  # of this process's device, wherever it resumes
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Undo everything drawn since `pack_rng`; a GPU's state is skipped where there is none."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
