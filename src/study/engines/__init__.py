"""The same runs through local processes, Slurm or SkyPilot."""
