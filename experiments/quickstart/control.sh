#!/usr/bin/env bash
# The test of the test: the quickstart with every answer moved to another prompt must learn nothing.
# Fails when exact match reaches 10%.
set -euo pipefail
python=.venv/bin/python
$python experiments/quickstart/make_data.py --shuffle-answers
$python -m sftjax.train --config=configs/quickstart.py:shuffled --workdir=runs/quickstart_shuffled
$python - <<'PY'
import json
after = json.load(open("runs/quickstart_shuffled/result.json"))["after"]["exact_match"]
print(f"exact match with shuffled answers: {after:.1%}")
raise SystemExit(after >= 0.1)
PY
