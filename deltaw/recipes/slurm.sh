#!/bin/bash
# A run on Slurm, on any number of nodes: sbatch --nodes=2 recipes/slurm.sh run.yaml runs/first
# The second argument is the run file's `output`, in a folder that all nodes share. Five minutes before the time limit
# (and where the job is preempted by SIGTERM) the run saves its step and the job queues itself again; it then resumes.
#SBATCH --job-name=deltaw
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=deltaw-%j.log
set -u
run_file=${1:?usage: sbatch recipes/slurm.sh RUN.yaml RUNFOLDER} folder=${2:?the output folder of the run file}

if [ -f "$folder/result.json" ]; then
    echo "$folder is finished"
    exit 0
fi
# Decided once, here, for all nodes: the first start, or a resumption.
what=$run_file
[ -f "$folder/config.yaml" ] && what=$folder

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 # seconds in which a step is finished and saved; torchrun gives 30 by itself
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun doesn't ask sbatch for it
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:29500" --rdzv-id="$SLURM_JOB_ID" \
    -m deltaw train "$what" &
step=$!

asked=no
save() {  # to the step's processes, not to this script
    asked=yes
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap save USR1 TERM

wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do  # a signal ends `wait`, not the step
    wait "$step"
    code=$?
done

if [ "$asked" = yes ] && [ ! -f "$folder/result.json" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
