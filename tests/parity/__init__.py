"""Our SmallBench against lm-evaluation-harness, item by item, on an exported checkpoint."""
