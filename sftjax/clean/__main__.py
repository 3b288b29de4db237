"""Clean a data set: see command.py."""

from sftjax import config
from sftjax.clean.command import main

config.run(main)
