# shellcheck shell=bash
# The facts of your cluster, all of them, in this one place. A variable already set in the environment wins.

export PARTITION=${PARTITION-gpu}            # sbatch --partition
export ACCOUNT=${ACCOUNT-}                   # sbatch --account; empty: your default
export TIME_LIMIT=${TIME_LIMIT-12:00:00}     # a job that needs longer saves, requeues itself and goes on
export LEAD_TIME=${LEAD_TIME-120}            # seconds before the limit at which a job is told to save
export GPUS_PER_NODE=${GPUS_PER_NODE-8}      # or with a type, h100:8. 0: no GPUs, one rank per node
export CPUS_PER_GPU=${CPUS_PER_GPU-12}       # CPUs per rank, too
export PYTHON=${PYTHON-.venv/bin/python}     # on a file system that every node sees
export CONTAINER=${CONTAINER-}               # put before each command: apptainer exec --nv '/my images/duo-vsr.sif'
export SETUP=${SETUP-}                       # lines of shell that each job begins with: module load cuda/12.8
export LOGS=${LOGS-runs/slurm}               # one file per job
