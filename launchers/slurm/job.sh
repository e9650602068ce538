# shellcheck shell=bash
# What the jobs of this folder share: where the first node is, and how a job ends early and goes on later.
source launchers/slurm/cluster.sh

# srun takes the batch job's CPUs per task from here since SLURM 22.05
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK-1}

read -ra container <<<"$CONTAINER"
# shellcheck disable=SC2034 # used by the scripts that source this file
run_python=("${container[@]}" "$PYTHON")

# The address by which the other nodes reach the job's first node.
first_node_address() {
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
}

#: number of the step that the next srun starts
step=0

# run_resumable SIGNAL srun COMMAND...: run COMMAND (a command that goes on where it stopped when it is run again).
# SLURM's warning before the time limit (USR1) and TERM are passed to it as SIGNAL; if it then leaves unfinished, or with
# status 85 ("saved on a signal"), the job is put back into the queue under its own id, so that jobs waiting for it keep waiting.
run_resumable() {
  local signal=$1 asked=0 status=0 child
  shift
  "$@" &
  child=$!
  # through scancel: srun itself answers TERM by killing
  trap 'asked=1; scancel --quiet --signal="$signal" "$SLURM_JOB_ID.$step" || true' USR1 TERM
  while :; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break # otherwise a signal ended the wait, not the command
  done
  step=$((step + 1))
  if ((status == 85 || (asked && status != 0))) && [ "$(job_state)" = RUNNING ]; then
    echo "stopped early with status $status: requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # SLURM ends this script; leaving on our own would look like a finished job
  fi
  return "$status"
}

# A job that is being cancelled or preempted is SLURM's to end or requeue, not ours.
job_state() { squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T | head -n 1; }
