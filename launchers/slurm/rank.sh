#!/usr/bin/env bash
# One rank of a training job: SLURM's numbering under the names that torch and DeepSpeed read.
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
exec "$@"
