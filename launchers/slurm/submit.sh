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

tasks=1 gpus=$GPUS_PER_NODE
case $command in
  train) tasks=$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1)) ;;
  upscale | build_preference | evaluate) gpus=$((GPUS_PER_NODE > 0 ? 1 : 0)) ;; # one GPU for each job of an array
esac
cpus=$((CPUS_PER_GPU * (gpus > 0 ? gpus : 1) / tasks))
options=(--time="$TIME_LIMIT" --ntasks-per-node="$tasks" --cpus-per-task="$cpus" --output="$LOGS/%x-%A_%a.log")
[ -z "$PARTITION" ] || options+=(--partition="$PARTITION")
[ -z "$ACCOUNT" ] || options+=(--account="$ACCOUNT")
((gpus == 0)) || options+=(--gpus-per-node="$gpus")

mkdir -p "$LOGS"
exec sbatch --parsable --chdir="$PWD" "${options[@]}" "${chosen[@]}" "$script" "$@"
