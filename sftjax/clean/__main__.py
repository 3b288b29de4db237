"""Clean a data set: see command.py."""

from sftjax import exits
from sftjax.clean.command import main

exits.run(main)
