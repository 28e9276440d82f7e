"""``python -m QEfficient.finetune config.yaml learning_rate=1e-4``: the same as ``qefficient finetune``."""

import sys

from QEfficient.cli.main import app

if __name__ == "__main__":
    app(["finetune", *sys.argv[1:]], prog_name="python -m QEfficient")
