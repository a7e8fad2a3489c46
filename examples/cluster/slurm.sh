#!/usr/bin/env bash
# For Slurm: `sbatch examples/cluster/slurm.sh`. Ray's head on the first node, a Ray node on each of the others, and the
# driver beside the head. A job that runs out of time is stopped cleanly and queued again: it goes on where it was.
# docs/cluster.md says what to change: nodes, GPUs, time, and what is between the two lines below.
#SBATCH --job-name=longrope
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# ---------------------------------------------------------------- yours
STUDY=my-study
ENVIRONMENT=$HOME/longrope # a virtual environment that every node sees
STORAGE=${LONGROPE_STORAGE:-postgresql+psycopg://user@db/longrope} # the password belongs in ~/.pgpass
LAUNCH=(--model /shared/my-model --data /shared/books --target 128k --out "$PWD" --gpus-per-worker 1)
PORT=$((20000 + SLURM_JOB_ID % 10000))
# ----------------------------------------------------------------

export PATH="$ENVIRONMENT/bin:$PATH"
export RAY_USAGE_STATS_ENABLED=0 LONGROPE_STORAGE="$STORAGE"
# Other users of these machines reach Ray's ports: only who has the token is answered. It travels in the environment of
# this job's steps, and in no file.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address | awk '{print $1}')
GPUS=${SLURM_GPUS_ON_NODE:-0}

srun --nodes=1 --ntasks=1 --overlap --nodelist="${nodes[0]}" \
    ray start --head --block --node-ip-address="$head" --port="$PORT" --num-gpus="$GPUS" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --include-dashboard=false &
for node in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 --overlap --nodelist="$node" \
        ray start --block --address="$head:$PORT" --num-gpus="$GPUS" --num-cpus="$SLURM_CPUS_PER_TASK" &
done

# Until every node is there: the number of workers follows from what the driver finds. Others may still join later.
for _ in $(seq 60); do
    alive=$(python - "$head:$PORT" <<'PYTHON' || true
import sys

import ray

ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
print(sum(node["Alive"] for node in ray.nodes()))
PYTHON
    )
    [ "${alive:-0}" = "${#nodes[@]}" ] && break
    sleep 5
done

if longrope studies show "$STUDY" >/dev/null 2>&1; then
    longrope resume "$STUDY" --ray-address "$head:$PORT" &
else
    longrope launch --study "$STUDY" --ray-address "$head:$PORT" "${LAUNCH[@]}" &
fi
driver=$!

again() {
    kill -TERM "$driver" 2>/dev/null || true
    wait "$driver" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap again TERM
wait "$driver"
