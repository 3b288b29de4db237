"""Show what is trained: see this package's docstring."""

from sftjax import exits
from sftjax.inspect_data import main

exits.run(main)
