#!/bin/bash
# A run under Slurm: sbatch cluster/slurm.sh jobs/pretrain.py scaling=fsdp_multi output_dir=s3://...
# A small first component holds the head, which takes no work; the second holds the GPU machines.
# The queue is to requeue what it pre-empts: the same command continues from the newest checkpoint.
#SBATCH --job-name=bitray
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#SBATCH --time=24:00:00
#SBATCH --comment=project:bitray
#SBATCH --partition=cpu --nodes=1 --ntasks-per-node=1 --cpus-per-task=4 --mem=16G --tmp=100G
#SBATCH hetjob
#SBATCH --partition=gpu --nodes=2 --ntasks-per-node=1 --cpus-per-task=48 --gres=gpu:4 --mem=0 --tmp=150G
set -euo pipefail

# The home of all nodes holds the token; only you may read it.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
export RAY_TRAIN_ENABLE_STATE_TRACKING=1
python=${PYTHON:-.venv/bin/python}  # of an environment made by `pip install -c constraints.txt .`
ray=$(dirname "$python")/ray
"$ray" get-auth-token --generate > /dev/null

port=${RAY_PORT:-6379}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_0" | head -n 1)
workers=${SLURM_JOB_NUM_NODES_HET_GROUP_1:-2}

srun --het-group=0 --ntasks=1 \
    "$ray" start --head --port="$port" --node-ip-address="$head" --dashboard-host=127.0.0.1 \
    --num-cpus=0 --labels=role=head --block &
for _ in {1..90}; do "$ray" status --address="$head:$port" > /dev/null 2>&1 && break; sleep 2; done
srun --het-group=1 --ntasks="$workers" \
    "$ray" start --address="$head:$port" --labels=role=train --block &

# The driver stops at a checkpoint when Slurm tells this script to end.
RAY_ADDRESS=$head:$port "$python" "$@" &
driver=$!
trap 'kill -TERM "$driver"' TERM INT
code=0
while kill -0 "$driver" 2> /dev/null; do wait "$driver" && code=0 || code=$?; done
exit "$code"
