#!/bin/bash
# A run over several nodes, which resumes after it was preempted or reached its time limit:
#
#     sbatch scripts/slurm.sh config/train_gpt2.py --out_dir=/shared/out-gpt2
#
# Submit it from the repository's folder. All nodes must see that folder and out_dir. The arguments go to
# train.py.

#SBATCH --job-name=gpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1          # a torchrun on each node, which starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue                    # a preempted job returns to the queue
#SBATCH --open-mode=append           # and continues its output file
#SBATCH --signal=B:USR1@120          # SIGUSR1 to this script two minutes before the time limit; not SIGTERM,
                                     # which scancel sends too: a cancelled job would be requeued

# At the time limit all processes save after their current iteration; torchrun gives them 30 s.
stop() {
    trap '' USR1
    scancel --signal=TERM "$SLURM_JOB_ID.0"    # the job's first step: torchrun on all nodes
    wait "$step" && exit 0                     # the run had finished
    scontrol requeue "$SLURM_JOB_ID"
}
trap stop USR1

HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1    # for restarts: restart_store in support/machine/runtime.py

srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" --max-restarts=3 \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$HOST:29400" \
    --log-dir="logs/$SLURM_JOB_ID" --redirects=3 --tee=3 \
    train.py "$@" --init_from=auto &
step=$!
wait "$step"
