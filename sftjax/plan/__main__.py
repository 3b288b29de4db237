from sftjax import config
from sftjax.plan.command import main

config.run(main)
