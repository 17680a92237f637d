#!/usr/bin/env bash
# sbatch, with what site.sh says; prints the job's number.
#
#   slurm/submit.sh [options of sbatch] slurm/STAGE.sbatch [options of the stage's launcher]
#
# Logs go to the folder DALLE_LOGS, or logs/ where you are: STAGE-JOB.log, and STAGE-JOB/rank-N.log for each process.
source "$(dirname "$0")/common.sh"

options=()
while (($#)) && [[ $1 != *.sbatch ]]; do
    options+=("$1")
    shift
done
(($#)) || fail "no .sbatch file named: slurm/submit.sh [options of sbatch] slurm/STAGE.sbatch [options of the launcher]"

pattern=%x-%j
[[ " ${options[*]-}" != *" --array"* ]] || pattern=%x-%A_%a
request=(--requeue --open-mode=append --output="$DALLE_LOGS/$pattern.log")
[[ -z $TIME_LIMIT ]] || request+=(--time="$TIME_LIMIT")
[[ -z $CPUS_PER_PROCESS ]] || request+=(--cpus-per-task="$CPUS_PER_PROCESS")
[[ -z $ACCOUNT ]] || request+=(--account="$ACCOUNT")
[[ -z $PARTITION ]] || request+=(--partition="$PARTITION")
nodes=1 processes=1 gpus=0 stage=$(basename "$1" .sbatch)
case $stage in
    dvae | transformer | clip | prior | decoder | upsampler)
        nodes=$NODES processes=$PROCESSES_PER_NODE gpus=$GPUS_PER_NODE
        request+=(--signal="USR1@$WARNING_SECONDS")
        ;;
    doctor)
        nodes=$NODES processes=$PROCESSES_PER_NODE gpus=$GPUS_PER_NODE
        request+=(--no-requeue) # the last one counts
        ;;
    evaluate | embeddings) nodes=$NODES processes=$PROCESSES_PER_NODE gpus=$GPUS_PER_NODE ;;
    codes) gpus=$((GPUS_PER_NODE > 0)) ;;
esac
request+=(--nodes="$nodes" --ntasks-per-node="$processes")
((gpus == 0)) || request+=(--gpus-per-node="$gpus")

mkdir -p "$DALLE_LOGS"
job=$(sbatch --parsable --export=ALL "${request[@]}" \
    ${SBATCH_OPTIONS[@]+"${SBATCH_OPTIONS[@]}"} ${options[@]+"${options[@]}"} "$@") # bash 4.3 takes empty arrays for unset
job=${job%%;*} # the cluster's name may follow
echo "$job $stage" >> "$DALLE_LOGS/jobs"
echo "$job"
