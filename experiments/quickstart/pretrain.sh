#!/usr/bin/env bash
# Make the quickstart's base model again: tokenizer, data, text, pretraining from random weights.
# About half an hour on two quiet cores. Run it from the repository's root after `make quickstart`.
set -euo pipefail
python=.venv/bin/python
here=experiments/quickstart
$python $here/make_tokenizer.py
$python $here/make_data.py
mkdir -p runs/pretrain_text
$python $here/make_text.py runs/pretrain_text/train.jsonl
$python -m sftjax.train --config=configs/pretrain_quickstart.py --workdir=runs/pretrain
cp runs/pretrain/export/model.safetensors $here/base_model/
