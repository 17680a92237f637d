#!/usr/bin/env bash
# One process of a run: says its rank by the names that torch.distributed knows, passes signals on, and notes how it ended.
#
# Where SLURM tracks processes by cgroups, a signal reaches this shell only; elsewhere, the process gets it twice within
# milliseconds, which it takes for once (dalle_ds/resilience/signals.py).
readonly SIGNALS=(TERM USR1 USR2 INT HUP)
trap '' "${SIGNALS[@]}"
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
echo "--- $(date -u +%FT%TZ) rank $RANK of $WORLD_SIZE on $(hostname), restart ${SLURM_RESTART_COUNT:-0}"

# The status is in the name of an empty file: complete as soon as it is there, and a full disk has room for it.
run() {
    trap : "${SIGNALS[@]}" # which is the default action in the process
    "$@"
    local status=$?
    trap '' "${SIGNALS[@]}"
    : > "$DALLE_STATUS/$RANK.$status"
    exit "$status"
}

set -m # a process group of its own
run "$@" < /dev/null &
inner=$!
for signal in "${SIGNALS[@]}"; do
    # shellcheck disable=SC2064 # now
    trap "kill -$signal -- -$inner 2> /dev/null" "$signal"
done
# Where this shell is killed alone, nobody would know of the process: it ends with it. A line says that all is well.
exec 3> >(exec > /dev/null 2>&1; trap '' "${SIGNALS[@]}"; read -r || kill -KILL -- "-$inner")
while kill -0 "$inner" 2> /dev/null; do
    wait "$inner" 2> /dev/null
done
trap '' PIPE
echo >&3
for noted in "$DALLE_STATUS/$RANK".*; do
    status=${noted##*.}
    [[ ! $status =~ ^[0-9]+$ ]] || exit "$status"
done
exit 1
