"""python -m sftjax.plan: see command.py."""

from sftjax import config
from sftjax.plan.command import main

config.run(main)
