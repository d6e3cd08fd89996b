"""What runs next and what is decided, phase by phase; no file, clock or GPU."""
