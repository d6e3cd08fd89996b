"""Per-document losses of a finished run: `documents_<split>.npz`, read in one place."""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Documents:
    """Of one run and split: nats (D,), tokens (D,), UTF-8 bytes (D,)."""

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    bytes: NDArray[np.int64]


def read(run: Path, split: str) -> Documents | None:
    """None where the run kept none; ValueError, with the way out, for a damaged file."""
    path = run / f"documents_{split}.npz"
    if not path.is_file():
        return None
    try:
        # from memory: np.load leaves a damaged file open
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            documents = Documents(
                nats=arrays["document_nats"].astype(np.float64),
                tokens=arrays["document_tokens"],
                bytes=arrays["document_bytes"],
            )
        if not documents.nats.shape == documents.tokens.shape == documents.bytes.shape:
            raise ValueError("arrays of several lengths")
    except (ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as bad:
        raise ValueError(
            f"{path}: found a damaged file ({bad}); delete {run / 'metrics.json'} and run the same "
            "command again: the run measures again from its last checkpoint"
        ) from None
    return documents
