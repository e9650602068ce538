#!/usr/bin/env bash
# One node of the Ray cluster at HEAD_ADDRESS, until RAY_END exists: ray_node.sh PYTHON... (the first node is the head).
set -euo pipefail
# Ray would count the machine's processors instead of those that SLURM gave; jobs that share a machine must not share ports
node=(--num-cpus="$SLURM_CPUS_PER_TASK" --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0
  --disable-usage-stats --block)
if ((SLURM_PROCID == 0)); then
  node+=(--head --include-dashboard=false --node-ip-address="${HEAD_ADDRESS%:*}" --port="${HEAD_ADDRESS##*:}")
else
  until "$@" -m ray.scripts.scripts health-check --address "$HEAD_ADDRESS" >/dev/null 2>&1; do sleep 1; done
  node+=(--address="$HEAD_ADDRESS")
fi
# how to join the cluster is nobody's business
"$@" -m ray.scripts.scripts start "${node[@]}" >/dev/null &
ray=$!
until [ -e "$RAY_END" ]; do
  kill -0 "$ray" 2>/dev/null || exit 1
  sleep 1
done
((SLURM_PROCID > 0)) || sleep 3 # the others say goodbye to the head
kill "$ray"
wait "$ray" || true
