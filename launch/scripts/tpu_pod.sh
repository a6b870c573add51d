#!/usr/bin/env bash
# Trains on a TPU pod slice: asks for it through queued resources, waits until
# it is there, and starts nestax-train once on every host. What follows the
# script's own settings goes to nestax-train:
#
#   PROJECT=mine ZONE=us-west4-a SHARE=10.0.0.2:/runs SOURCE=/mnt/runs/nestax.whl \
#     launch/scripts/tpu_pod.sh --config=hope_1_3b \
#     --config.data.source=jsonl --config.data.path='/mnt/runs/text/*.jsonl'
#
# hope_1_3b has 256 rows a batch, one for each chip of TYPE; 1,024 chips take
# --config.train.batch=1024. hope_340m and hope_760m have 128: two chips share a
# row by --config.mesh.tensor=2, or TYPE=v5litepod-128 HOSTS=32 is enough.
# nestax-compile says beforehand what fits.
# The same command again goes on with the run: slice and checkpoints are found.
# The slice costs money until it is deleted:
#   gcloud compute tpus queued-resources delete "$NAME" --force --quiet \
#     --project="$PROJECT" --zone="$ZONE"
set -euo pipefail

: "${PROJECT:?the Google Cloud project}"
: "${ZONE:?its zone, such as us-west4-a}"
: "${SHARE:?an NFS export that all hosts can mount, such as 10.0.0.2:/runs}"
: "${SOURCE:?what pip installs on every host: a wheel below /mnt/runs, or a git+https URL}"
NAME=${NAME:-nestax}
TYPE=${TYPE:-v5litepod-256}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} # v5p: v2-alpha-tpuv5; v6e: v2-alpha-tpuv6e
HOSTS=${HOSTS:-64}                      # of the slice: chips / 4 or / 8
WORKDIR=${WORKDIR:-/mnt/runs/$NAME}
SPOT=${SPOT:-}                          # SPOT=1: cheaper, taken back at will

where=(--project="$PROJECT" --zone="$ZONE")
queue=(gcloud compute tpus queued-resources)

state() {
  "${queue[@]}" describe "$NAME" "${where[@]}" --format='value(state.state)'
}

if ! state >/dev/null 2>&1; then
  "${queue[@]}" create "$NAME" "${where[@]}" --node-id="$NAME" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${SPOT:+--spot}
fi
until [ "$(state)" = ACTIVE ]; do
  case $(state) in
    FAILED | SUSPENDED) echo "the queued resource $NAME is $(state)" >&2; exit 1 ;;
  esac
  echo "waiting for $TYPE ($(state))"
  sleep 30
done

# On every host: mount the share, install, train. JAX finds the other hosts
# itself. A host that dies ends all others within --heartbeat seconds; they
# then start again together, from the newest checkpoint. 2 is a command that is
# wrong, and 130 and 143 are Ctrl-C and SIGTERM: no reason to try again.
# What stands in single quotes is for the hosts to expand.
# shellcheck disable=SC2016
host='set -u
sudo mkdir -p /mnt/runs
mountpoint -q /mnt/runs || sudo mount -t nfs "$SHARE" /mnt/runs
[ -d ~/nestax ] || python3 -m venv ~/nestax
. ~/nestax/bin/activate
case $SOURCE in *://*) what="nestax[tpu] @ $SOURCE" ;; *) what="$SOURCE[tpu]" ;; esac
pip install -q "$what" || exit 2
while :; do
  nestax-train --distributed "$@"
  code=$?
  case $code in 0 | 2 | 130 | 143) exit $code ;; esac
  sleep 10
done'
command=$(printf 'SHARE=%q SOURCE=%q bash -c %q nestax-train' \
  "$SHARE" "$SOURCE" "$host")
arguments=$(printf ' %q' --workdir="$WORKDIR" --config.data.shards="$HOSTS" "$@")
gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all \
  --command="$command$arguments"
