"""A hub on 127.0.0.1 that serves a mirror's files, so that the hub's real client can be tested."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT, CONVERTED_COMMIT = "a" * 40, "b" * 40
CONVERTED_FOLDER = "converted-to-parquet"  # what the branch refs/convert/parquet holds


@contextlib.contextmanager
def tiny_hub(root: Path, *, cut_files: bool = False) -> Iterator[str]:
    """Serve the datasets under `root` and yield the address, for HF_ENDPOINT.

    With `cut_files`, parquet files break off in the middle. Only the requests that `datasets` and
    huggingface_hub make for public datasets are answered.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(root, cut_files))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(root: Path, cut_files: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:  # the name is the standard library's
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            match parts:
                case [""]:
                    self._send(200, b"a hub")
                case ["api", "datasets", owner, name]:
                    self._info(root / owner / name, COMMIT)
                case ["api", "datasets", owner, name, "revision", revision]:
                    self._info(root / owner / name, revision)
                case ["api", "datasets", owner, name, "tree", revision, *path]:
                    top = _top(root / owner / name, revision)
                    self._tree(top, top.joinpath(*path))
                case ["datasets", owner, name, "resolve", revision, *path]:
                    self._file(_top(root / owner / name, revision).joinpath(*path), revision)
                case _:
                    self._send(404)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

        def _info(self, dataset: Path, revision: str) -> None:
            top = _top(dataset, revision)
            if not top.is_dir():
                self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                return
            files = [str(f.relative_to(top)) for f in sorted(top.rglob("*")) if f.is_file()]
            self._json(
                {
                    "id": f"{dataset.parent.name}/{dataset.name}",
                    "sha": CONVERTED_COMMIT if CONVERTED_FOLDER in top.name else COMMIT,
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "cardData": {"license": "cc0-1.0"},
                    "siblings": [{"rfilename": file} for file in files],
                }
            )

        def _tree(self, top: Path, folder: Path) -> None:
            if not folder.is_dir():
                self._json({"error": "none"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            entries = [
                {
                    "type": "directory" if entry.is_dir() else "file",
                    "oid": _etag(entry),
                    "size": 0 if entry.is_dir() else entry.stat().st_size,
                    "path": str(entry.relative_to(top)),
                }
                for entry in sorted(folder.iterdir())
            ]
            self._json(entries)

        def _file(self, file: Path, revision: str) -> None:
            if not file.is_file():
                self._json({"error": "none"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": revision}
            self._send(200, file.read_bytes(), headers, cut=cut_files and file.suffix == ".parquet")

        def _json(self, content: Any, status: int = 200, headers: Mapping[str, str] = {}) -> None:
            headers = {"Content-Type": "application/json", **headers}
            self._send(status, json.dumps(content).encode(), headers)

        def _send(
            self,
            status: int,
            body: bytes = b"",
            headers: Mapping[str, str] = {},
            *,
            cut: bool = False,
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = cut

    return Handler


def _top(dataset: Path, revision: str) -> Path:
    converted = revision in (CONVERTED_COMMIT, "refs/convert/parquet")
    return dataset / CONVERTED_FOLDER if converted else dataset


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes() if path.is_file() else b"").hexdigest()
