#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster, through XPK (pip install xpk):
#
#   CLUSTER=mine PROJECT=mine ZONE=us-west4-a IMAGE=gcr.io/mine/nestax \
#     launch/scripts/xpk.sh --config=hope_1_3b \
#     --config.data.source=jsonl --config.data.path='/mnt/runs/text/*.jsonl'
#
# hope_1_3b has a row for each of 256 chips; for others see tpu_pod.sh.
# The cluster once, with a Filestore share for checkpoints and metrics:
#   xpk cluster create --cluster="$CLUSTER" --tpu-type="$TYPE" --num-slices=1 \
#     --project="$PROJECT" --zone="$ZONE" --enable-gcpfilestore-csi-driver
#   xpk storage create runs --type=gcpfilestore --size=1024 --tier=BASIC_HDD \
#     --access-mode=ReadWriteMany --vol=default --mount-point=/mnt/runs \
#     --auto-mount=true --readonly=false \
#     --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE"
# The image once, from the root of the repository:
#   printf 'FROM python:3.12\nCOPY . /src\nRUN pip install -q "/src[tpu]"\n' |
#     docker build -t "$IMAGE" -f - . && docker push "$IMAGE"
#
# A pod that dies ends all others within --heartbeat seconds; Kubernetes starts
# them again, and they go on from the newest checkpoint.
set -euo pipefail

: "${CLUSTER:?the GKE cluster}"
: "${PROJECT:?the Google Cloud project}"
: "${ZONE:?its zone, such as us-west4-a}"
: "${IMAGE:?a container image with nestax[tpu] in it}"
NAME=${NAME:-nestax}
TYPE=${TYPE:-v5litepod-256}
HOSTS=${HOSTS:-64} # of the slice: chips / 4 or / 8
RESTARTS=${RESTARTS:-50}
WORKDIR=${WORKDIR:-/mnt/runs/$NAME}

command=$(printf '%q ' nestax-train --distributed --workdir="$WORKDIR" \
  --config.data.shards="$HOSTS" "$@")
xpk workload create --workload="$NAME" --command="$command" \
  --docker-image="$IMAGE" --tpu-type="$TYPE" --num-slices=1 \
  --max-restarts="$RESTARTS" \
  --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE"
