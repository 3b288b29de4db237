#!/usr/bin/env bash
# One environment for each peer, in .peers/NAME, with the versions that results/ were taken with.
#
#   benchmarks/peers/install.sh [trl] [tunix] [maxtext] [easydel] [levanter]     (default: all)
#
# Needs Python 3.11 and 3.12. Several gigabytes, minutes each. torch comes first and by pip, so that
# a CPU wheel that pip is set up to find serves; everything else by uv, whose resolver copes.
set -euo pipefail
cd "$(dirname "$0")/../.."

declare -A python=([trl]=3.11 [easydel]=3.11 [tunix]=3.12 [maxtext]=3.12 [levanter]=3.12)
declare -A torch=([trl]=2.13.0 [easydel]=2.13.0)
declare -A packages=(
  [trl]="trl==1.16.0 peft==0.21.2 transformers==5.23.0"
  [tunix]="google-tunix==0.1.7"
  [maxtext]="maxtext[tpu]==0.2.5"
  [easydel]="easydel==0.3.0 pillow"
  [levanter]="levanter==1.2.dev1644 jax==0.7.2 gitpython chex"
)

for name in "${@:-trl tunix maxtext easydel levanter}"; do
  for peer in $name; do
    [[ -n ${packages[$peer]:-} ]] || { echo "no peer $peer: ${!packages[*]}" >&2; exit 1; }
    home=.peers/$peer
    [[ -f $home/installed ]] && continue
    echo "== $peer" >&2
    rm -rf "$home"
    "python${python[$peer]}" -m venv "$home"
    "$home/bin/python" -m pip install -q uv ${torch[$peer]:+torch==${torch[$peer]}}
    "$home/bin/uv" pip install -q --python "$home/bin/python" ${packages[$peer]} \
      ${torch[$peer]:+torch==${torch[$peer]}}
    touch "$home/installed"
  done
done
