#!/usr/bin/env sh
# The data of configs/curriculum.py, from the quickstart's; from the repository's root.
set -eu
python=${PYTHON:-.venv/bin/python}
out=runs/curriculum_data
$python experiments/curriculum/make_data.py $out
$python experiments/quickstart/make_text.py $out/text.jsonl --documents 3000
$python experiments/quickstart/make_text.py $out/unseen_text.jsonl --documents 300 --seed 1
