#!/bin/bash
# A run under Slurm: sbatch cluster/slurm.sh jobs/pretrain.py scaling=fsdp_multi
#   scaling.data_labels.role=data output_dir=s3://...
# A small first component holds the head, which takes no work, the second the GPU machines, the third
# those that prepare and read data. The queue is to requeue what it pre-empts: the same command
# continues from the newest checkpoint. Replace bitray-data; machines have rclone 1.55 or newer.
#SBATCH --job-name=bitray
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#SBATCH --time=24:00:00
#SBATCH --comment=project:bitray
#SBATCH --exclusive --mem=0 --ntasks-per-node=1
#SBATCH --partition=cpu --nodes=1 --cpus-per-task=4 --tmp=100G
#SBATCH hetjob
#SBATCH --exclusive --mem=0 --ntasks-per-node=1
#SBATCH --partition=gpu --nodes=2 --cpus-per-task=48 --gres=gpu:4 --tmp=150G
#SBATCH hetjob
#SBATCH --exclusive --mem=0 --ntasks-per-node=1
#SBATCH --partition=cpu --nodes=1 --cpus-per-task=16 --tmp=100G
set -euo pipefail

# The home of all nodes holds the token; only you may read it.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
export RAY_TRAIN_ENABLE_STATE_TRACKING=1
python=${PYTHON:-.venv/bin/python}  # of an environment made by `pip install -c constraints.txt .`
ray=$(dirname "$python")/ray
"$ray" get-auth-token --generate > /dev/null

port=${RAY_PORT:-6379}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_0" | head -n 1)

# Data in object storage, by URI, with the keys in the environment or in ~/.aws. The mount goes with
# the step that made it; what a killed one left behind is taken away first.
mount='
    fusermount3 -uzq /tmp/bitray-data || true
    mkdir -p /tmp/bitray-data
    rclone mount :s3,provider=AWS,env_auth:bitray-data /tmp/bitray-data --read-only --daemon
    exec "$@"'

on() {  # each machine of component $1, beside the data: the command that follows
    local count=SLURM_JOB_NUM_NODES_HET_GROUP_$1
    srun --het-group="$1" --ntasks="${!count}" bash -euc "$mount" bash "${@:2}"
}

on 0 "$ray" start --head --port="$port" --node-ip-address="$head" --dashboard-host=127.0.0.1 \
    --num-cpus=0 --labels=role=head --block &
for _ in {1..90}; do "$ray" status --address="$head:$port" > /dev/null 2>&1 && break; sleep 2; done
on 1 "$ray" start --address="$head:$port" --labels=role=train --block &
on 2 "$ray" start --address="$head:$port" --labels=role=data --block &

# The driver stops at a checkpoint when Slurm tells this script to end.
RAY_ADDRESS=$head:$port "$python" "$@" &
driver=$!
trap 'kill -TERM "$driver"' TERM INT
code=0
while kill -0 "$driver" 2> /dev/null; do wait "$driver" && code=0 || code=$?; done
exit "$code"
