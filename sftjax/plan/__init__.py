"""The training step on hardware that is not here: what it needs, and how long it may take."""
