#!/bin/bash
# A run over several nodes that goes on after it was preempted, or stopped at its time limit:
#
#     sbatch docs/slurm.sh config/train_gpt2.py --out_dir=/shared/out-gpt2
#
# Send it from the repository's folder, which all nodes see, as they see out_dir. Arguments are train.py's.

#SBATCH --job-name=gpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1          # a torchrun on each node, which starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue                    # preempted, the job waits in the queue again
#SBATCH --open-mode=append           # and goes on with the same file of output
#SBATCH --signal=B:USR1@120          # two minutes before the time limit this script gets a SIGUSR1: on a
                                     # SIGTERM, scancel's, it would put a cancelled job in the queue again

# Time is up: all processes stop at the next iteration and save, for which torchrun gives them 30 s.
stop() {
    trap '' USR1
    scancel --signal=TERM "$SLURM_JOB_ID.0"    # the job's first step, which is torchrun on all nodes
    wait "$step" && exit 0                     # the run was done by then
    scontrol requeue "$SLURM_JOB_ID"
}
trap stop USR1

HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1    # restarts on several nodes (runtime.py, own_store)

srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" --max-restarts=3 \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$HOST:29400" \
    --log-dir="logs/$SLURM_JOB_ID" --redirects=3 --tee=3 \
    train.py "$@" --init_from=auto &
step=$!
wait "$step"
