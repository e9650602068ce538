# shellcheck shell=bash
# What the jobs of this folder share: where the first node is, and how a job ends early and goes on later.
source launchers/slurm/cluster.sh
eval "$SETUP"

# srun takes the batch job's CPUs per task from here since SLURM 22.05
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK-1}

eval "container=($CONTAINER)" # words as in a shell, so that quotes keep a path with blanks together
# shellcheck disable=SC2034,SC2154 # used by the scripts that source this file; assigned by eval
run_python=("${container[@]}" "$PYTHON")

# The address by which the other nodes reach the job's first node.
first_node_address() {
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
}

# Where the ranks of a job meet; jobs that share a node take different ports.
name_first_node() {
  MASTER_ADDR=$(first_node_address)
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
  export MASTER_ADDR MASTER_PORT
}

# Which task of its array this job is, from 0, whatever number the array begins with.
array_index() {
  local first=${SLURM_ARRAY_TASK_MIN-0} stride=${SLURM_ARRAY_TASK_STEP-1} count=${SLURM_ARRAY_TASK_COUNT-1}
  if ((first + stride * (count - 1) != ${SLURM_ARRAY_TASK_MAX-0})); then
    echo "error: an array with gaps would leave work undone: give one as 0-15, 1-16 or 0-30:2" >&2
    exit 2
  fi
  echo $(((${SLURM_ARRAY_TASK_ID-0} - first) / stride))
}

#: number of the step that the next srun starts
step=0
#: seconds before the limit at which a command that has not stopped is killed, so that there is time to requeue
ENDING=20
#: whether the job was told to end, and what its command is told then
asked=0 signal=
#: called before the job is requeued
before_requeue=:

# through scancel: srun itself answers TERM by killing
trap 'asked=1; scancel --quiet --signal="${signal:-CONT}" "$SLURM_JOB_ID.$step" 2>/dev/null || true' USR1 TERM

# run_resumable SIGNAL srun COMMAND...: run COMMAND (a command that goes on where it stopped when it is run again).
# SLURM's warning before the time limit (USR1) and TERM are passed to it as SIGNAL; if it then leaves unfinished, or with
# status 85 ("saved on a signal"), the job is put back into the queue under its own id, so that jobs waiting for it keep
# waiting. One that has not left shortly before the limit is killed: it goes on from its last checkpoint or whole file.
run_resumable() {
  local status=0 child seconds
  ((!asked)) || requeue "before the next command"
  signal=$1
  shift
  "$@" &
  child=$!
  while :; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break # otherwise a signal ended the wait, not the command
    seconds=$((LEAD_TIME > 2 * ENDING ? LEAD_TIME - ENDING : LEAD_TIME / 2))
    while ((seconds-- > 0)) && kill -0 "$child" 2>/dev/null; do sleep 1; done
    kill -0 "$child" 2>/dev/null || continue
    echo "not stopped in time: killing it; give a larger LEAD_TIME"
    scancel --quiet --signal=KILL "$SLURM_JOB_ID.$step" || true
  done
  step=$((step + 1))
  if ((status == 85 || (asked && status != 0))) && [ "$(job_state)" = RUNNING ]; then
    requeue "with status $status"
  fi
  return "$status"
}

requeue() {
  echo "stopped early $1: requeueing job $SLURM_JOB_ID"
  "$before_requeue"
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60 # SLURM ends this script; leaving on our own would look like a finished job
}

# A job that is being cancelled or preempted is SLURM's to end or requeue, not ours.
job_state() { squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T | head -n 1; }
