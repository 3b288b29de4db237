"""Show what is trained: see this package's docstring."""

from sftjax import config
from sftjax.inspect_data import main

config.run(main)
