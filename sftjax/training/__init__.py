"""The job: its workdir, what it builds, its data, checkpoints and log."""
