"""Device, precision, autotuning, process group."""
