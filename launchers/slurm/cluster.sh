# shellcheck shell=bash
# The facts of your cluster, all of them, in this one place. A variable already set in the environment wins.

export PARTITION=${PARTITION-gpu}            # sbatch --partition
export ACCOUNT=${ACCOUNT-}                   # sbatch --account; empty: your default
export TIME_LIMIT=${TIME_LIMIT-12:00:00}     # a job that needs longer saves, requeues itself and goes on
export GPUS_PER_NODE=${GPUS_PER_NODE-8}      # 0: no GPUs, one rank per node
export CPUS_PER_GPU=${CPUS_PER_GPU-12}       # CPUs per rank, too
export PYTHON=${PYTHON-.venv/bin/python}     # on a file system that every node sees
export CONTAINER=${CONTAINER-}               # put before each command, for instance: apptainer exec --nv duo-vsr.sif
export LOGS=${LOGS-runs/slurm}               # one file per job
