#!/usr/bin/env bash
# Prepares a corpus in SHARES parts, by a job array, and a job that puts them together. Prints the numbers of both.
#
#   slurm/prepare.sh SHARES --corpus C --source S --out DIR [options of launchers/prepare_data.py]
source "$(dirname "$0")/common.sh"
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || fail "slurm/prepare.sh SHARES --corpus C --source S --out DIR [options]"
shares=$1
shift
submit() { "$DALLE_ROOT/slurm/submit.sh" "$@"; }

# shellcheck disable=SC2086 # options, several in a word
parts=$(submit ${SBATCH_ARGS:-} --array="0-$((shares - 1))" "$DALLE_ROOT/slurm/prepare_data.sbatch" "$@")
# shellcheck disable=SC2086
merge=$(submit ${SBATCH_ARGS:-} --dependency="afterok:$parts" --kill-on-invalid-dep=yes "$DALLE_ROOT/slurm/prepare_data.sbatch" "$@" \
    --merge True --parts "$shares") || { scancel "$parts"; exit 1; }
printf '%s\n' "$parts" "$merge"
