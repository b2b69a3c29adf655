#!/usr/bin/env bash
# Rehearse two machines on one: two torchrun agents that meet on a port of the loopback, PROCESSES processes each.
#
#   PROCESSES=1 examples/two_nodes.sh distill --config train/configs/distill.yaml --output OUTPUT
#
# On two real machines, start the same torchrun line on each, with its own --node_rank and the first one's address.
# Machines that share no file system each need the pairs and features; the first one writes the output.

set -euo pipefail
if [ $# -lt 1 ]; then
    echo "usage: [PROCESSES=1] [PORT=29511] two_nodes.sh COMMAND [--key value ...]" >&2
    exit 2
fi
command=$1
shift
processes=${PROCESSES:-1}
port=${PORT:-29511}
if ! command -v nvidia-smi > /dev/null; then
    export ACCELERATE_USE_CPU=1
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

agent() { # NODE_RANK, then the command's arguments
    local node=$1
    shift
    if [ -z "${ACCELERATE_USE_CPU:-}" ]; then # each agent its own GPUs, as two machines would have
        local first=$((node * processes))
        CUDA_VISIBLE_DEVICES=$(seq -s, "$first" $((first + processes - 1)))
        export CUDA_VISIBLE_DEVICES
    fi
    exec torchrun --nnodes=2 --node_rank="$node" --nproc_per_node="$processes" \
        --master_addr=127.0.0.1 --master_port="$port" -m "mmkd.train.$command" "$@"
}

agent 1 "$@" &
second=$!
trap 'kill "$second" 2> /dev/null || true' EXIT
(agent 0 "$@")
wait "$second"
trap - EXIT
