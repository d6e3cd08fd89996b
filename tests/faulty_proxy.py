"""A loopback TCP proxy that resets, cuts or stalls connections, for tests of remote stores."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable

Fault = tuple[str, int] | None


class Proxy:
    """Loopback TCP proxy. `fault()` is asked per connection for None or (kind, bytes): after so
    many bytes in either direction the connection is reset, cut, or stalls until `heal`."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.fault: Callable[[], Fault] = lambda: None
        self.faults = 0
        self._healed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def heal(self) -> None:
        self.fault = lambda: None
        self._healed.set()

    def break_with(self, fault: Callable[[], Fault]) -> None:
        self._healed.clear()
        self.fault = fault

    def close(self) -> None:
        self._healed.set()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self.target)
            fault = self.fault()
            for a, b in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(a, b, fault), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, fault: Fault) -> None:
        passed = 0
        try:
            while data := source.recv(4096):
                if fault and passed + len(data) > fault[1]:
                    sink.sendall(data[: fault[1] - passed])
                    self.faults += 1
                    if fault[0] == "stall":
                        self._healed.wait(60)
                    elif fault[0] == "reset":
                        for end in (source, sink):
                            linger = struct.pack("ii", 1, 0)
                            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    break
                sink.sendall(data)
                passed += len(data)
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            end.close()
