#!/usr/bin/env bash
# Submit one command with the cluster's facts and print its job id:
#
#   launchers/slurm/submit.sh COMMAND [SBATCH OPTIONS] -- ARGUMENTS
#   launchers/slurm/submit.sh train --nodes=4 -- --config configs/wan-1.3b.yaml --stage base --data shards --output runs/base
#
# COMMAND is a script of this folder without its ending; ARGUMENTS are those of the command that it runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launchers/slurm/cluster.sh

script=launchers/slurm/${1-}.sbatch
[ -f "$script" ] || {
  commands=(launchers/slurm/*.sbatch)
  commands=("${commands[@]##*/}")
  echo "error: no command '${1-}'; there are ${commands[*]%.sbatch}" >&2
  exit 2
}
command=$1
shift
chosen=()
while (($#)) && [ "$1" != -- ]; do
  chosen+=("$1")
  shift
done
shift || true # the --

count=${GPUS_PER_NODE##*:} type=
[[ $GPUS_PER_NODE != *:* ]] || type=${GPUS_PER_NODE%:*}: # h100:8
[[ $count =~ ^[0-9]+$ ]] || {
  echo "error: GPUS_PER_NODE=$GPUS_PER_NODE: give a number, or a type and a number as h100:8" >&2
  exit 2
}
tasks=1 gpus=$count
case $command in
  train | preflight) tasks=$((count > 0 ? count : 1)) ;;
  upscale | build_preference | evaluate) gpus=$((count > 0 ? 1 : 0)) ;; # one GPU for each job of an array
esac
cpus=$((CPUS_PER_GPU * (gpus > 0 ? gpus : 1) / tasks))
options=(--time="$TIME_LIMIT" --signal="B:USR1@$LEAD_TIME" --ntasks-per-node="$tasks" --cpus-per-task="$cpus")
options+=(--output="$LOGS/%x-%A_%a.log")
[ -z "$PARTITION" ] || options+=(--partition="$PARTITION")
[ -z "$ACCOUNT" ] || options+=(--account="$ACCOUNT")
((gpus == 0)) || options+=(--gpus-per-node="$type$gpus")

mkdir -p "$LOGS"
exec sbatch --parsable --chdir="$PWD" "${options[@]}" "${chosen[@]}" "$script" "$@"
