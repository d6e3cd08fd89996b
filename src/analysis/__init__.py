"""Numbers of many runs: decisions and comparison."""
