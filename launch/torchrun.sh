#!/usr/bin/env bash
# Trains on one host or on several, one process for each GPU. What follows the name are overrides of `k2train train`; a
# first word without = is another command, which is not started again after it failed.
#
#   launch/torchrun.sh name=big experiment=...                               one host
#   NODES=4 HEAD=host0:29400 launch/torchrun.sh name=big experiment=...      the same command on each of four
#   launch/torchrun.sh doctor name=big experiment=...                        looks at the machines first
#
# NODES      hosts (1). MIN:MAX starts as soon as MIN are there, and starts again when one is lost or comes
# HEAD       host:port at which they find each other: one of them, and a port of it that is free and open to the others
# PROCESSES  on each host (one for each GPU; one where there are none)
# RESTARTS   how often all processes start again after one has failed (3)
set -euo pipefail

command=train
if [[ "${1:-=}" != *=* && "$1" != -* ]]; then
    command=$1
    shift
    [ "$command" = train ] || RESTARTS=0
fi
# What is wrong with a config is told once, and not by all processes at each of their starts.
[ "$command" != train ] || k2train train "$@" --cfg job >/dev/null
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
if [ "${NODES:-1}" = 1 ]; then
    meeting=(--standalone)
else
    meeting=(--nnodes "$NODES" --rdzv-id "${SLURM_JOB_ID:-k2train}" --rdzv-backend c10d
        --rdzv-endpoint "${HEAD:?several hosts need HEAD=host:port, the same on each}")
fi
# k2train divides the cores among its processes by itself; without a value torchrun gives each one core, and says so.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores = $(nproc) / processes) > 0 ? cores : 1))}
# SIGUSR1 is SLURM's word before a time limit. A step is finished and saved before anybody goes: that may take a while.
exec torchrun "${meeting[@]}" --nproc-per-node "$processes" --max-restarts "${RESTARTS:-3}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 280 -m k2train "$command" "$@"
