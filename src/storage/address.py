"""Addresses of object stores, looked at before anything is imported, connected to or written."""

from __future__ import annotations

import urllib.parse

# What may follow the `?`: where the store is. Keys, tokens and signatures may not.
_AZURE = ("blob_storage_authority", "dfs_storage_authority", "enable_tls")
OPTIONS = {
    "s3": ("endpoint_override", "region", "scheme", "tls_ca_file_path"),
    "gs": ("endpoint_override", "retry_limit_seconds", "scheme"),
    "abfs": _AZURE,
    "abfss": _AZURE,
    "file": (),
}


def check(uri: str) -> urllib.parse.SplitResult:
    """The parts of a `--remote`; ValueError for one that cannot be used, or holds credentials.

    Messages quote no more of it than scheme and option names: what is wrong may be a secret.
    """
    try:
        parts = urllib.parse.urlsplit(uri)
        options = urllib.parse.parse_qs(parts.query, True, bool(parts.query))
    except ValueError:
        raise ValueError(f"--remote: found no address, expected {_expected()}") from None
    scheme = parts.scheme
    if scheme not in OPTIONS:
        raise ValueError(f"--remote: found {scheme or 'no'} scheme, expected {_expected()}")
    if parts.password is not None or (scheme in ("s3", "file") and parts.username is not None):
        raise ValueError(
            "--remote holds credentials, which would end up in files and logs: leave them out of "
            "it and set the store's environment variables (AWS_ACCESS_KEY_ID and so on)"
        )
    unknown = sorted(set(options) - set(OPTIONS[scheme]))
    if unknown:
        raise ValueError(
            f"--remote: found the option {unknown[0]!r}, expected for {scheme}:// "
            f"{', '.join(OPTIONS[scheme]) or 'none'}; credentials belong in the environment"
        )
    if not (parts.netloc if scheme != "file" else parts.path.strip("/")):
        raise ValueError(f"--remote: found no bucket or path in it, expected {_expected()}")
    return parts


def _expected() -> str:
    return f"one of {', '.join(f'{scheme}://' for scheme in OPTIONS)} and a bucket or path"
