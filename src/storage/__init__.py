"""Bytes that survive a crash: atomic files, lock, run directory, checkpoints, object store."""
