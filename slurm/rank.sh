#!/usr/bin/env bash
# One process of a run: says its rank by the names that torch.distributed knows, and notes how it ended.
#
# Signals reach this shell and the process; here they must do nothing, so that the note is written.
trap : TERM USR1 USR2 INT HUP
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
echo "--- $(date -u +%FT%TZ) rank $RANK of $WORLD_SIZE on $(hostname), restart ${SLURM_RESTART_COUNT:-0}"
"$@"
status=$?
echo "$status" > "$DALLE_STATUS/$RANK.partial" && mv "$DALLE_STATUS/$RANK.partial" "$DALLE_STATUS/$RANK"
exit "$status"
