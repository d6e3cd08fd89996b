"""Numbers of many runs: decisions, comparisons, tables and figures."""
