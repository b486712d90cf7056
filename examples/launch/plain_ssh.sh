#!/usr/bin/env bash
# One process per host over ssh. Run it anywhere that reaches the hosts without a password:
#
#   examples/launch/plain_ssh.sh my_run.toml --workdir /shared/runs/mine
#
# Change the three lines below. All hosts need the same code, run file and data at the same paths,
# and the run's folder on a file system that they share.
set -u

HOSTS=(host0 host1) # the first one is the coordinator
PORT=8476           # free on the first host, open to the others
CODE=$HOME/project  # the folder to start in; an environment in .venv, if there is one, is used

count=${#HOSTS[@]}
pid_file=/tmp/nfflax-$PORT.pid
words=$(printf '%q ' "$@")

pids=()
for i in "${!HOSTS[@]}"; do
    ssh -o BatchMode=yes "${HOSTS[$i]}" "cd '$CODE' || exit 2
        [ -f .venv/bin/activate ] && . .venv/bin/activate
        echo \$\$ > $pid_file
        exec nfflax train $words --resume \
            --coordinator ${HOSTS[0]}:$PORT --processes $count --process $i" </dev/null &
    pids+=($!)
done

# One process that is told to stop tells the others: all save the same step, and end with code 75.
trap 'ssh -o BatchMode=yes "${HOSTS[0]}" "kill -TERM \$(cat $pid_file)"' INT TERM

code=0
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done # a signal ends `wait` early
    wait "$pid"
    ended=$?
    ((code == 0)) && code=$ended
done
exit "$code"
