"""python -m sftjax.plan: see command.py."""

from sftjax import exits
from sftjax.plan.command import main

exits.run(main)
