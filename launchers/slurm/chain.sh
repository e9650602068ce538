#!/usr/bin/env bash
# Submit all steps, each job waiting for the one before: videos -> shards -> base -> Stage I -> Stage II -> pairs -> Stage III,
# and, where a test set is given, its upscaling and scoring. Submit it again after a failure: finished work is not repeated.
#
#   launchers/slurm/chain.sh CONFIG VIDEOS OUTPUT [LOW_RESOLUTION REFERENCE]
#   NODES=4 ARRAY=16 launchers/slurm/chain.sh configs/wan-1.3b.yaml videos runs/wan test/low test/high
set -euo pipefail
(($# == 3 || $# == 5)) || {
  echo "usage: [NODES=1] [ARRAY=1] ${BASH_SOURCE[0]} CONFIG VIDEOS OUTPUT [LOW_RESOLUTION REFERENCE]" >&2
  exit 2
}
config=$1 videos=$2 output=$3
folder=$(dirname "${BASH_SOURCE[0]}")
nodes=(--nodes="${NODES:-1}")
array=(--array="0-$((${ARRAY:-1} - 1))")
waiting=()

# submit NAME COMMAND [SBATCH OPTIONS] -- ARGUMENTS: submit a job that waits for the one submitted before
submit() {
  local name=$1 command=$2 job
  shift 2
  job=$("$folder/submit.sh" "$command" --job-name="duo-vsr-$name" "${waiting[@]}" "$@")
  job=${job%%;*} # a federation adds the cluster's name
  echo "$job $name"
  waiting=(--dependency="afterok:$job" --kill-on-invalid-dep=yes)
}

# train STAGE DATA [--init MODEL] [--teacher MODEL]
train() {
  local stage=$1 data=$2
  shift 2
  submit "$stage" train "${nodes[@]}" -- --config "$config" --stage "$stage" --data "$data" --output "$output/$stage" "$@"
}

submit shards build_shards "${nodes[@]}" -- --config "$config" --input "$videos" --output "$output/shards"
train base "$output/shards"
train progressive "$output/shards" --init "$output/base/model"
train dual_stream "$output/shards" --init "$output/progressive/model" --teacher "$output/progressive/teacher"
submit pairs build_preference "${array[@]}" -- --config "$config" --model "$output/dual_stream/model" \
  --data "$output/shards" --output "$output/pairs"
train preference "$output/pairs" --init "$output/dual_stream/model"
if (($# == 5)); then
  submit upscale upscale "${array[@]}" -- "$4" "$output/upscaled" --model "$output/preference/model" --lossless
  submit evaluate evaluate -- --video "$output/upscaled" --reference "$5" --output "$output/metrics.json"
fi
