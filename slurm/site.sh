# What differs from cluster to cluster. Edit this file, or a copy of it that you name: export DALLE_SITE=/path/to/copy.sh
# shellcheck shell=bash disable=SC2034

# --- what jobs ask for; empty takes the cluster's default. Options before the name of a .sbatch file win over these.
ACCOUNT=
PARTITION=
TIME_LIMIT=24:00:00
NODES=1                            # of the stages that train, and of evaluation
GPUS_PER_NODE=8                    # 0 trains on CPUs
PROCESSES_PER_NODE=$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1)) # one for each GPU
CPUS_PER_PROCESS=8                 # the process itself and its loader.workers
SBATCH_OPTIONS=()                  # anything else, such as (--mem=0 --exclusive --qos=long)

# --- how runs stop and go on
WARNING_SECONDS=600                # before the time limit, SIGUSR1: enough for an update, a validation or preview, and a checkpoint
REQUEUE_LIMIT=100                  # restarts of one job, by the time limit, by preemption, by lost machines
CRASH_LIMIT=5                      # restarts in a row that got nowhere: a process was killed within an hour (it may be out of
                                   # memory every time), or all stopped within 15 minutes
LAST_EXIT_SECONDS=120              # how long processes may go on when the first one has ended; then they are killed

# --- what every job does first, on its first machine; processes inherit its environment
prepare_environment() {
    # module load cuda/12.8
    if [[ -f $DALLE_ROOT/.venv/bin/activate ]]; then source "$DALLE_ROOT/.venv/bin/activate"; fi
    # export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # the interface that machines reach each other by
    # export NCCL_IB_HCA=mlx5
}
