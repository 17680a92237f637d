#!/usr/bin/env bash
# Inside of an allocation: starts a launcher on every process of it by srun, waits, and lets requeue.sh decide what becomes of
# the job.
#
#   slurm/launch.sh launchers/train_dvae.py [options]
#
# A warning may come to this shell alone (sbatch --signal=B:USR1@600), at any time, as may a Ctrl-C in an interactive
# allocation. SIGTERM comes to the processes as well; a second one would tell them to drop everything.
told='' step=''
trap 'told=1; [[ -z $step ]] || kill -USR1 "$step" 2> /dev/null || true' USR1 INT
trap 'told=1' TERM
source "$(dirname "$0")/common.sh"

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

# shellcheck source=requeue.sh
source "$DALLE_ROOT/slurm/requeue.sh"
