from sftjax import config
from sftjax.clean.command import main

config.run(main)
