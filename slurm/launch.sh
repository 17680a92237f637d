#!/usr/bin/env bash
# Inside of an allocation: starts a launcher on every process of it by srun, waits, and decides what becomes of the job.
#
#   slurm/launch.sh launchers/train_dvae.py [options]
#
# All processes 0: the job is done. Any of them 75 (dalle_ds.errors.EXIT_REQUEUE) or told to stop by a signal, and the others
# 75, 0 or killed: it is put back into the queue, REQUEUE_LIMIT times. Anything else: it has failed, and a line says why.
source "$(dirname "$0")/common.sh"

readonly EXIT_REQUEUE=75
: "${SLURM_JOB_ID:?slurm/launch.sh runs inside of an allocation: submit a job by slurm/submit.sh, or call salloc first}"
name=${SLURM_JOB_NAME:-job}-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
count=${SLURM_NTASKS:-$((SLURM_NNODES * ${SLURM_NTASKS_PER_NODE:-1}))}
restarts=${SLURM_RESTART_COUNT:-0}
logs=$DALLE_LOGS/$name
export DALLE_STATUS=$logs/status
rm -rf "$DALLE_STATUS"
mkdir -p "$DALLE_STATUS"

# The end of a job, for people and for status.sh.
conclude() {
    local status=$1 line
    shift
    line="$(date -u +%FT%TZ) $*"
    echo "$line" | tee -a "$logs/outcome"
    exit "$status"
}

# SLURM's controller may be away for a moment.
ask_controller() {
    local _
    for _ in {1..5}; do
        scontrol "$@" && return
        sleep 10
    done
    return 1
}

job_state() {
    ask_controller --oneliner show job "$SLURM_JOB_ID" | sed -E 's/.* JobState=([A-Z_]+).*/\1/'
}

# How often in a row the job has gone back into the queue because processes were killed.
crashes() {
    tac "$logs/outcome" 2> /dev/null | awk '!/ requeued: rank /{other = 1} !other{count++} END{print count + 0}'
}

# Some of many sentences.
listed() {
    printf '%s; ' "${@:1:4}"
    (($# <= 4)) || printf 'and so %s more; ' "$(($# - 4))"
}

# Where rank 0 is: by a name that resolves here, as it does on every node of a sane cluster, or by SLURM's address of it.
first_address() {
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    if getent hosts "$first" > /dev/null; then
        echo "$first"
    else
        scontrol --oneliner show node "$first" | sed -E 's/.* NodeAddr=([^ ]+).*/\1/'
    fi
}

# --- start

set +eu # modules and activate scripts do not stand these
prepare_environment
set -eu
MASTER_ADDR=$(first_address)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # below the ports that systems give out
OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} # else each process may take all cores of its machine
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS
echo "$(date -u +%FT%TZ) $name: $count processes on $SLURM_JOB_NODELIST, restart $restarts, logs in $logs: $*"

# Processes end by themselves and all together when one of them dies (dalle_ds/parallel/watch.py): srun must not kill them
# before. It is not told of --cpus-per-task by the job since SLURM 22.05.
srun --ntasks="$count" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --export=ALL --mpi=none \
    --kill-on-bad-exit=0 --wait="$LAST_EXIT_SECONDS" \
    --output="$logs/rank-%t.log" --open-mode=append \
    "$DALLE_ROOT/slurm/rank.sh" python "$@" < /dev/null &
step=$!
# A warning may come to this shell alone (sbatch --signal=B:USR1@600), as may a Ctrl-C in an interactive allocation.
# SIGTERM comes to the processes as well; a second one would tell them to drop everything.
trap 'kill -USR1 "$step" 2> /dev/null || true' USR1 INT
trap : TERM
srun_status=0
while kill -0 "$step" 2> /dev/null; do
    srun_status=0
    wait "$step" || srun_status=$?
done

# --- decide

for _ in {1..10}; do # files made on other nodes may take a moment to be seen
    (($(find "$DALLE_STATUS" -name '[0-9]*' ! -name '*.partial' | wc -l) < count && srun_status)) || break
    sleep 1
done
again=0 failed=() killed=()
for ((rank = 0; rank < count; rank++)); do
    status=$(cat "$DALLE_STATUS/$rank" 2> /dev/null || echo lost)
    case $status in
        0) ;;
        # 128 + SIGUSR1 or SIGTERM: told to stop before it had got so far as to heed signals.
        "$EXIT_REQUEUE" | 138 | 143) again=1 ;;
        lost) killed+=("rank $rank was lost with its machine or killed by srun") ;;
        129 | 1[3-9]?) killed+=("rank $rank was killed by signal $((status - 128))") ;;
        *) failed+=("rank $rank ended with status $status") ;;
    esac
done
if ((${#failed[@]} == 0 && ${#killed[@]} == 0 && !again)); then
    conclude 0 'done'
elif ((${#failed[@]})); then
    why=$(listed "${failed[@]}")
elif ((${#killed[@]})); then
    why=$(listed "${killed[@]}")
else
    why='it stopped before its end; '
fi
state=$(job_state)
if [[ $state != RUNNING ]]; then # cancelled, preempted, or out of time
    conclude "$EXIT_REQUEUE" "stopped: ${why}SLURM says $state, and decides on what follows"
elif ((${#failed[@]} || !again)); then
    conclude 1 "failed: ${why}see $logs"
elif [[ ${ENVIRONMENT:-} != BATCH ]]; then
    conclude "$EXIT_REQUEUE" "stopped: ${why}give the same command to go on"
elif ((restarts >= REQUEUE_LIMIT)); then
    conclude 1 "failed: ${why}restarted $restarts times already, and REQUEUE_LIMIT=$REQUEUE_LIMIT in $DALLE_SITE"
elif ((${#killed[@]} && $(crashes) >= CRASH_LIMIT)); then
    conclude 1 "failed: ${why}the same happened $CRASH_LIMIT times before, which is CRASH_LIMIT in $DALLE_SITE"
fi
echo "$(date -u +%FT%TZ) requeued: ${why}restart $((restarts + 1)) of at most $REQUEUE_LIMIT" | tee -a "$logs/outcome"
ask_controller requeue "$SLURM_JOB_ID" || conclude 1 "failed: ${why}and the job cannot be requeued"
