#!/usr/bin/env bash
#SBATCH --job-name=nestax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# Trains on several GPU nodes of a Slurm cluster, a process a GPU:
#
#   sbatch launch/scripts/slurm.sh --config=hope_340m --workdir=/shared/runs/a \
#     --config.data.source=jsonl --config.data.path='/shared/text/*.jsonl'
#
# nestax has to be installed where the nodes see it (pip install 'nestax[cuda]');
# activate its environment before sbatch, which hands it on. Options above can
# be given to sbatch too (sbatch --nodes=4 launch/scripts/slurm.sh ...). Do not
# bind GPUs to tasks: a task takes the GPU of its own number among the node's.
#
# One node needs none of this: `nestax-train` alone takes all its GPUs.
#
# --signal: two minutes before the time is up every process is told, and saves;
# the job is queued again and goes on. So it does if a node is taken away.
# Where a process dies, --kill-on-bad-exit ends the others at once.
set -uo pipefail

: "${SLURM_NTASKS:?to be started by sbatch}"
srun --kill-on-bad-exit=1 \
  nestax-train --distributed --config.data.shards="$SLURM_NTASKS" "$@"
code=$?
if [ "$code" -eq 143 ]; then # stopped by SIGTERM, saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
