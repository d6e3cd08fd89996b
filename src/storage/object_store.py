"""Whole objects by key below one address, by pyarrow's file systems; each write is read back."""

from __future__ import annotations

import contextlib
import hashlib
import os
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime

import pyarrow as pa
from pyarrow import fs

from src.storage import address

ERRORS = (OSError, pa.ArrowException)  # of a store that cannot be reached or refuses
_CHUNK = 4 << 20


class ObjectStore:
    """Objects below `<uri>/<folder>`. `tick` is called between chunks of a transfer.

    Timeouts in seconds. Raises ValueError for a URI that cannot be used.
    """

    def __init__(
        self, uri: str, folder: str, *, request_timeout_s: float, connect_timeout_s: float
    ) -> None:
        parts = address.check(uri)
        try:
            if parts.scheme == "s3":
                self._whole, base = _s3(parts, request_timeout_s, connect_timeout_s)
            else:
                self._whole, base = fs.FileSystem.from_uri(uri)
        except (pa.ArrowException, ValueError) as error:
            raise ValueError(f"--remote cannot be used: {error}") from error
        self._base = f"{base.rstrip('/')}/{folder}"
        self._fs = fs.SubTreeFileSystem(self._base, self._whole)
        self._local = self._whole.type_name == "local"
        self.tick: Callable[[], None] = lambda: None

    def put(self, key: str, data: bytes) -> None:
        """Write, then read back: OSError unless the store returns the same bytes."""
        target = key
        if self._local:  # object stores show whole objects alone; a POSIX directory does not
            target = f"{key}.{uuid.uuid4().hex[:8]}.tmp"
            self._whole.create_dir(f"{self._base}/{key}".rpartition("/")[0], recursive=True)
        with self._fs.open_output_stream(target) as out:
            for start in range(0, len(data), _CHUNK):
                out.write(data[start : start + _CHUNK])
                self.tick()
        if self._local:
            self._fs.move(target, key)
        if self.sha256(key) != hashlib.sha256(data).hexdigest():
            raise OSError(f"{key} was read back with other bytes than were written")

    def _chunks(self, key: str) -> Iterator[bytes]:
        with self._fs.open_input_stream(key) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
                self.tick()

    def get(self, key: str) -> bytes:
        """The object's bytes; FileNotFoundError if there is none."""
        return b"".join(self._chunks(key))

    def sha256(self, key: str) -> str:
        """Of what the store returns."""
        digest = hashlib.sha256()
        for chunk in self._chunks(key):
            digest.update(chunk)
        return digest.hexdigest()

    def names(self, folder: str) -> list[str]:
        """Names of the objects in `folder`; [] if there is no such folder."""
        infos = self._fs.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        return [info.base_name for info in infos if info.type == fs.FileType.File]

    def modified(self, key: str) -> datetime | None:
        """When the store says that the object was written, by its own clock."""
        return self._fs.get_file_info(key).mtime

    def delete(self, key: str) -> None:
        """Delete the object if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(key)


def _s3(
    parts: urllib.parse.SplitResult, request_timeout_s: float, connect_timeout_s: float
) -> tuple[fs.FileSystem, str]:
    """As FileSystem.from_uri, which cannot set timeouts or turn background writes off."""
    options = dict(urllib.parse.parse_qsl(parts.query))
    in_environment = any(os.environ.get(n) for n in ("AWS_REGION", "AWS_DEFAULT_REGION"))
    if not (options.keys() & {"region", "endpoint_override"} or in_environment):
        options["region"] = fs.resolve_s3_region(parts.netloc)
    store = fs.S3FileSystem(
        **options,
        request_timeout=request_timeout_s,
        connect_timeout=connect_timeout_s,
        background_writes=False,  # else all the waiting is in close(), where no heartbeat fits
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),
    )
    return store, f"{parts.netloc}{parts.path}"
