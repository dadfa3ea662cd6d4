#!/usr/bin/env bash
# From nothing but Python 3.11 and git to three answers: about an image, about a region of it, and with a mask.
#   bash scripts/quickstart.sh [FOLDER FOR THE PICTURES]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
prepare_environment
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

out=${1:-quickstart_out}
image=data/sample/images/fundus_00--Phantom--seed505case000004--0000.png
region=data/sample/masks/fundus_00--Phantom--seed505case000004--0000--0019_000.png

ask() { # ask NAME IMAGE QUESTION …: shows the command and runs it, its pictures in a folder of that name
  local name=$1 word
  shift
  printf '\n$ medplib ask'
  for word in "$@"; do
    case $word in *' '*) printf ' "%s"' "$word" ;; *) printf ' %s' "$word" ;; esac
  done
  printf '\n'
  medplib ask "$@" --out "$out/$name"
}

ask image "$image" "What kind of medical image is this?"
ask region "$image" "What is in the region?" --region "$region"
ask mask "$image" "Please segment the optic disc."
printf '\nThe pictures are in %s/. Ask about your own: medplib ask IMAGE "QUESTION"\n' "$out"
