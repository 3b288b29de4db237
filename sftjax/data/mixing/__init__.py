"""Several sources in one run: shares, phases, streams."""
