#!/bin/bash
# Rounds on several nodes of a Slurm cluster: a Ray head, a worker per further node, then the run.
#     sbatch --nodes 4 deploy/slurm.sh sd15 --rounds 4 --campaign mine
# The folder from which you submit is the project; every node must see it and its .venv.
#SBATCH --job-name=d3po
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --signal=B:TERM@120
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
# shellcheck disable=SC1091
source .venv/bin/activate

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one node must not meet
gpus=${SLURM_GPUS_ON_NODE:-1}
trap 'kill "${jobs[@]}" 2>/dev/null || true' EXIT

# --block: srun's step lives as long as Ray does, and Slurm ends it with the job.
srun --nodes 1 --ntasks 1 --overlap --nodelist "$head" \
    ray start --head --block --port "$port" --num-gpus "$gpus" --include-dashboard false &
jobs=($!)
for node in "${nodes[@]:1}"; do
    srun --nodes 1 --ntasks 1 --overlap --nodelist "$node" \
        ray start --block --address "$head:$port" --num-gpus "$gpus" &
    jobs+=($!)
done

# The run starts when all nodes are there. This script runs on the first of them.
for attempt in $(seq 60); do
    here=$(ray status --address "$head:$port" 2>/dev/null | grep --count --extended-regexp '^ 1 node_' || true)
    [ "$here" -ge "${#nodes[@]}" ] && break
    [ "$attempt" = 60 ] && { echo "after 5 minutes Ray has $here of ${#nodes[@]} nodes" >&2; exit 1; }
    sleep 5
done
export RAY_ADDRESS="$head:$port"
d3po run "$@" --set compute.address=auto --set "compute.processes=$((${#nodes[@]} * gpus))"
