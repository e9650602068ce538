#!/usr/bin/env bash
# One node of the Ray cluster at HEAD_ADDRESS, until it is killed: ray_node.sh PYTHON... (the first node is the head).
set -euo pipefail
# Ray would count the machine's processors instead of those that SLURM gave; jobs that share a machine must not share ports
node=(--num-cpus="$SLURM_CPUS_PER_TASK" --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0
  --disable-usage-stats --block)
if ((SLURM_PROCID == 0)); then
  exec "$@" -m ray.scripts.scripts start --head --include-dashboard=false \
    --node-ip-address="${HEAD_ADDRESS%:*}" --port="${HEAD_ADDRESS##*:}" "${node[@]}"
fi
until "$@" -m ray.scripts.scripts health-check --address "$HEAD_ADDRESS" >/dev/null 2>&1; do sleep 1; done
exec "$@" -m ray.scripts.scripts start --address="$HEAD_ADDRESS" "${node[@]}"
