#!/usr/bin/env bash
# Trains by DeepSpeed's launcher, which reaches other hosts by ssh. It does not start processes again after a failure:
# where that matters, or hosts come and go, take torchrun.sh.
#
#   launch/deepspeed.sh name=big experiment=...                  the GPUs of this host
#   HOSTS=hosts launch/deepspeed.sh name=big experiment=...      those of the hosts in a file
#
# HOSTS      a file with a line for each host, as in `host0 slots=8`. k2train is to be at the same place on all of them
# PROCESSES  on each host (one for each GPU)
set -euo pipefail

exec deepspeed ${HOSTS:+--hostfile "$HOSTS"} ${PROCESSES:+--num_gpus "$PROCESSES"} \
    --no_local_rank --module k2train train "$@"
