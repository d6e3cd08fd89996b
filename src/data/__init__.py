"""From the hub to a batch: memory-mapped tokens, task items, leakage."""
