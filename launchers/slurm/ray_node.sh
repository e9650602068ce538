#!/usr/bin/env bash
# One node of a Ray cluster at HEAD_ADDRESS: the first one starts the head and runs the command "$@", the others lend their CPUs
# and GPUs until it is done.
set -euo pipefail
read -ra prefix <<<"${CONTAINER-}"
ray=("${prefix[@]}" "$PYTHON" -m ray.scripts.scripts)
# Ray would count the machine's processors instead of those that SLURM gave, and fixed ports would be shared by jobs on one machine
node=(--num-cpus="$SLURM_CPUS_PER_TASK" --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0
  --disable-usage-stats --block)

wait_for_head() {
  local _
  for _ in {1..60}; do
    "${ray[@]}" health-check --address "$HEAD_ADDRESS" >/dev/null 2>&1 && return
    [ -z "${head-}" ] || kill -0 "$head" 2>/dev/null || break # it failed to start
    sleep 1
  done
  echo "error: no Ray head at $HEAD_ADDRESS; its start is in this log" >&2
  return 1
}

if ((SLURM_PROCID > 0)); then
  wait_for_head
  "${ray[@]}" start --address="$HEAD_ADDRESS" "${node[@]}" || true # leaves when the head does
  exit 0
fi

"${ray[@]}" start --head --port="${HEAD_ADDRESS##*:}" --node-ip-address="${HEAD_ADDRESS%:*}" --include-dashboard=false \
  "${node[@]}" &
head=$!
trap 'kill "$head" 2>/dev/null || true; wait "$head" || true' EXIT
wait_for_head
"$@" &
command=$!
trap 'kill -TERM "$command" 2>/dev/null || true' TERM USR1
while kill -0 "$command" 2>/dev/null; do # a signal ends a wait before the command does
  status=0
  wait "$command" || status=$?
done
exit "$status"
