#!/usr/bin/env bash
# How jobs are doing, and why they failed: what SLURM says, how they ended, and the last words of a process that went wrong.
#
#   slurm/status.sh [FOLDER] [JOB …]
#
# FOLDER is what slurm/chain.sh called OUT, or a folder of logs (DALLE_LOGS); without jobs, all that were submitted there.
# Status 1 where a job has failed or was cancelled.
source "$(dirname "$0")/common.sh"

wanted=()
for argument; do
    if [[ -d $argument/logs ]]; then
        DALLE_LOGS=$argument/logs
    elif [[ -d $argument ]]; then
        DALLE_LOGS=$argument
    elif [[ $argument =~ ^[0-9]+$ ]]; then
        wanted+=("$argument")
    else
        fail "$argument is neither a folder nor the number of a job"
    fi
done
[[ -f $DALLE_LOGS/jobs ]] || fail "no jobs were submitted with logs in $DALLE_LOGS: name the folder, as DALLE_LOGS or after status.sh"

# SLURM forgets jobs after some minutes, unless it keeps accounts.
state() {
    local said
    said=$(scontrol --oneliner show job "$1" 2> /dev/null | sed -E 's/.* JobState=([A-Z_]+) Reason=([^ ]+).*/\1 (\2)/; s/ \(None\)//' || true)
    [[ -n $said ]] || said=$(sacct --noheader --allocations --format=State --jobs="$1" 2> /dev/null | sed 's/ *$//' || true)
    sort -u <<< "${said:-forgotten}" | paste -sd, | sed 's/,/, /g'
}

# The last lines of the first process that ended neither well nor to be started again.
last_words() {
    local file rank
    for file in "$1"/status/*; do # RANK.STATUS
        rank=$(basename "${file%.*}")
        if [[ -f $file && ! ${file##*.} =~ ^(0|75)$ ]]; then
            echo "    $1/rank-$rank.log:"
            tail -n 6 "$1/rank-$rank.log" | sed 's/^/    | /' || true
            return
        fi
    done
}

failures=0
while read -r job name; do
    ((${#wanted[@]} == 0)) || [[ " ${wanted[*]} " == *" $job "* ]] || continue
    said=$(state "$job")
    printf '%-12s job %-8s %s\n' "$name" "$job" "$said"
    [[ ! $said =~ FAIL|TIMEOUT|MEMORY|CANCELLED ]] || failures=1
    for folder in "$DALLE_LOGS"/*-"$job" "$DALLE_LOGS"/*-"$job"_*; do
        [[ -d $folder ]] || continue
        outcome=$(tail -n 1 "$folder/outcome" 2> /dev/null || true)
        [[ -z $outcome ]] || echo "    $outcome"
        [[ $said != *RUNNING* ]] || echo "    now: $(tail -n 1 "$folder/rank-0.log" 2> /dev/null || true)"
        if [[ $outcome == *" failed: "* ]]; then
            failures=1
            last_words "$folder"
        fi
    done
done < "$DALLE_LOGS/jobs"
exit "$failures"
