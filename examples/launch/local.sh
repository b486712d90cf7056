#!/usr/bin/env bash
# Several processes of one run on this machine, to try out what several hosts would do:
#
#   examples/launch/local.sh 2 digits --workdir runs/two --resume
#
# With GPUs each process takes one. To train, one process that has all of them is as fast:
# plain `nfflax train`. Ctrl-C, or SIGTERM to this script: all processes save and stop.
set -u

count=$1
shift
port=${PORT:-$((20000 + RANDOM % 10000))}

pids=()
for ((i = 0; i < count; i++)); do
    JAX_LOCAL_DEVICE_IDS=$i python -m nfflax train "$@" \
        --coordinator "127.0.0.1:$port" --processes "$count" --process "$i" &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' INT TERM

# The exit code is that of the first process that did not end well.
code=0
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done # a signal ends `wait` early
    wait "$pid"
    ended=$?
    ((code == 0)) && code=$ended
done
exit "$code"
