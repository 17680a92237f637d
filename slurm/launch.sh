#!/usr/bin/env bash
# Inside of an allocation: starts a launcher on every process of it by srun, waits, and decides what becomes of the job.
#
#   slurm/launch.sh launchers/train_dvae.py [options]
#
# All processes 0: the job is done. Any of them 75 (dalle_ds.errors.EXIT_REQUEUE) or told to stop by a signal, and the others
# 75, 0 or killed: it is put back into the queue, REQUEUE_LIMIT times, and CRASH_LIMIT times in a row if that leads nowhere;
# once, if one is lost and the others 0. Anything else: it has failed, and a line says why. DALLE_ONCE=1 never puts it back.
#
# A warning may come to this shell alone (sbatch --signal=B:USR1@600), at any time, as may a Ctrl-C in an interactive
# allocation. SIGTERM comes to the processes as well; a second one would tell them to drop everything.
told='' step=''
trap 'told=1; [[ -z $step ]] || kill -USR1 "$step" 2> /dev/null || true' USR1 INT
trap 'told=1' TERM
source "$(dirname "$0")/common.sh"

readonly EXIT_REQUEUE=75
readonly HASTY=900 LASTING=3600 # seconds: a start that ends within the first has got nowhere, one of the second has
: "${SLURM_JOB_ID:?slurm/launch.sh runs inside of an allocation: submit a job by slurm/submit.sh, or call salloc first}"
job=$SLURM_JOB_ID
# A task of an array by this name: the number alone, of one of them, means the array.
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
name=${SLURM_JOB_NAME:-job}-$job
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
    echo "$line" | tee -a "$logs/outcome" || true # where the disk is full
    exit "$status"
}

# SLURM's controller may be away for a minute or two.
ask_controller() {
    local end=$((SECONDS + 120))
    until scontrol "$@"; do
        ((SECONDS < end)) || return 1
        sleep 2
    done
}

job_state() {
    ask_controller --oneliner show job "$job" | sed -nE 's/.* JobState=([A-Z_]+).*/\1/p'
}

# How often in a row, before this start, the job has gone back into the queue with nothing done: lines are as written below,
# "TIME requeued after SECONDS s: WHY".
fruitless() {
    tac "$logs/outcome" 2> /dev/null | awk -v hasty="$HASTY" -v lasting="$LASTING" '
        $2 != "requeued" || $4 > lasting {exit}
        !/ s: rank / && !(/ s: it stopped / && $4 < hasty) {exit}
        {count++}
        END {print count + 0}' || true
}

# Some of many sentences.
listed() {
    printf '%s; ' "${@:1:4}"
    (($# <= 4)) || printf 'and so %s more; ' "$(($# - 4))"
}

# Where rank 0 is: by a name that resolves here, as it does on every node of a sane cluster, or by SLURM's address of it.
first_address() {
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) || return
    if getent hosts "$first" > /dev/null; then
        echo "$first"
    else
        ask_controller --oneliner show node "$first" | sed -nE 's/.* NodeAddr=([^ ]+).*/\1/p' | grep .
    fi
}

# --- start

set +eu # modules and activate scripts do not stand these
prepare_environment
set -eu
MASTER_ADDR=$(first_address) || conclude 1 "failed: the first machine of $SLURM_JOB_NODELIST has no address"
# Below the ports that systems give out; not the one that the start before may have left busy.
MASTER_PORT=$((10000 + (SLURM_JOB_ID + 997 * restarts) % 20000))
OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} # else each process may take all cores of its machine
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS
echo "$(date -u +%FT%TZ) $name: $count processes on $SLURM_JOB_NODELIST, restart $restarts, logs in $logs: $*"

# Processes end by themselves and all together when one of them dies (dalle_ds/resilience/watch.py): srun must not kill them
# before. It is not told of --cpus-per-task by the job since SLURM 22.05.
srun_status=0
if [[ -z $told ]]; then
    srun --ntasks="$count" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --export=ALL --mpi=none \
        --kill-on-bad-exit=0 --wait="$LAST_EXIT_SECONDS" \
        --output="$logs/rank-%t.log" --open-mode=append \
        "$DALLE_ROOT/slurm/rank.sh" python "$@" < /dev/null &
    step=$!
    [[ -z $told ]] || kill -USR1 "$step" 2> /dev/null || true # told between the question and srun
    while kill -0 "$step" 2> /dev/null; do
        srun_status=0
        wait "$step" || srun_status=$?
    done
fi

# --- decide

seconds=$SECONDS
for _ in {1..10}; do # files made on other nodes may take a moment to be seen
    (($(find "$DALLE_STATUS" -name '[0-9]*.[0-9]*' | wc -l) < count && srun_status)) || break
    sleep 1
done
again=0 early=0 well=0 lost=0 limit=$CRASH_LIMIT failed=() killed=()
for ((rank = 0; rank < count; rank++)); do
    status=lost
    for noted in "$DALLE_STATUS/$rank".*; do # named RANK.STATUS by rank.sh
        [[ ! -e $noted ]] || status=${noted##*.}
    done
    case $status in
        0) well=$((well + 1)) ;;
        "$EXIT_REQUEUE") again=1 ;;
        # 128 + SIGUSR1 or SIGTERM: told to stop before it had got so far as to heed signals.
        138 | 143) again=1 early=1 ;;
        lost) lost=$((lost + 1)) killed+=("rank $rank was lost with its machine or killed by srun") ;;
        129 | 1[3-9]?) killed+=("rank $rank was killed by signal $((status - 128))") ;;
        *) failed+=("rank $rank ended with status $status") ;;
    esac
done
if [[ -n $told ]] && ((lost == count)); then # before there were processes
    again=1 early=1 killed=()
elif ((lost == 1 && well > 0 && well == count - 1)); then # its work may be done or not: once more, but not for ever
    again=1 limit=1
fi
if ((${#failed[@]} == 0 && ${#killed[@]} == 0 && !again)); then
    conclude 0 'done'
elif ((${#failed[@]})); then
    why=$(listed "${failed[@]}")
elif ((${#killed[@]})); then
    why=$(listed "${killed[@]}")
elif ((early)); then
    why='told to stop as it began; '
else
    why='it stopped before its end; '
fi
idle=0 # this start has got nowhere, and another one may not, either
if ((${#killed[@]} ? seconds <= LASTING : !early && well == 0 && seconds < HASTY)); then
    idle=1
fi
state=$(job_state) || state=RUNNING
if [[ ${state:-RUNNING} != RUNNING ]]; then # cancelled, preempted, or out of time
    conclude "$EXIT_REQUEUE" "stopped: ${why}SLURM says $state, and decides on what follows"
elif ((${#failed[@]} || !again)); then
    conclude 1 "failed: ${why}see $logs"
elif [[ ${ENVIRONMENT:-} != BATCH ]]; then
    conclude "$EXIT_REQUEUE" "stopped: ${why}give the same command to go on"
elif [[ -n ${DALLE_ONCE:-} ]]; then
    conclude 1 "failed: ${why}it is not started again by itself"
elif ((restarts >= REQUEUE_LIMIT)); then
    conclude 1 "failed: ${why}restarted $restarts times already, and REQUEUE_LIMIT=$REQUEUE_LIMIT in $DALLE_SITE"
elif ((idle && $(fruitless) >= limit)); then
    conclude 1 "failed: ${why}start $(($(fruitless) + 1)) in a row that got nowhere, and CRASH_LIMIT=$CRASH_LIMIT in $DALLE_SITE"
fi
line="$(date -u +%FT%TZ) requeued after $seconds s: ${why}restart $((restarts + 1)) of at most $REQUEUE_LIMIT"
echo "$line" | tee -a "$logs/outcome" || true
ask_controller requeue "$job" || conclude 1 "failed: ${why}and the job cannot be requeued"
