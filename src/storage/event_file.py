"""TensorBoard's event files: a view of metrics.jsonl, written by the thread that trains.

`SummaryWriter` writes from a thread of its own: a full disk is then met there, as a traceback.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from src.storage.files import write_all


class EventFile:
    """One event file in `directory`; each scalar is with the kernel when `add_scalar` returns.

    `next_step`: the first step that is still to come, 0 for a new run. It is written as the start
    of a session, and hides what an earlier file has from that step on. TensorBoard's slow loader
    takes the first start that it sees for no restart, so the first file needs one, too.
    """

    def __init__(self, directory: Path, next_step: int, suffix: str = "") -> None:
        directory.mkdir(exist_ok=True)
        host, now = socket.gethostname(), time.time()
        # Files are read in the order of their names: seconds first, as every writer has it.
        name = f"events.out.tfevents.{int(now):010d}.{host}.{os.getpid()}.{time.time_ns()}{suffix}"
        self._path = directory / name
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o666)
        self._add(Event(wall_time=now, file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=now, step=next_step, session_log=start))

    def __enter__(self) -> EventFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Raises OSError that names the file where the disk refuses."""
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        self._add(Event(wall_time=time.time(), step=step, summary=summary))

    def _add(self, event: Event) -> None:
        RecordWriter(self).write(event.SerializeToString())

    def write(self, record: bytes) -> None:
        """The whole record, or none of it."""
        before = os.fstat(self._descriptor).st_size
        try:
            write_all(self._descriptor, record)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, before)
            what = f"could not append {len(record)} bytes"
            raise OSError(error.errno, what, str(self._path)) from error
