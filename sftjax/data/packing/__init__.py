"""Which document goes into which row, and the arrays of a batch."""
