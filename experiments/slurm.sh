#!/usr/bin/env bash
# A run over all GPUs of a Slurm allocation: Ray is started on every node, and joined.
#
#   sbatch --nodes 4 --gpus-per-node 8 experiments/slurm.sh --config run.yaml
#
# Takes the options of `twotower analyze`; write the run where all nodes can reach it. Submitted
# again after the time is up, it goes on where it stopped.
#SBATCH --job-name twotower
#SBATCH --ntasks-per-node 1
#SBATCH --exclusive
#SBATCH --signal B:INT@120

set -euo pipefail

nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
address=$(srun --nodes 1 --ntasks 1 --nodelist "${nodes[0]}" hostname --ip-address | cut -d' ' -f1)
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
export RAY_AUTH_MODE=token  # the token lies in the home folder, which the nodes share
port=$((20000 + SLURM_JOB_ID % 20000))  # jobs that share a node do not meet

srun --nodes 1 --ntasks 1 --nodelist "${nodes[0]}" --overlap \
    ray start --head --node-ip-address "$address" --port "$port" --disable-usage-stats --block &
until ray health-check --address "$address:$port" > /dev/null 2>&1; do sleep 2; done
if ((${#nodes[@]} > 1)); then
    others=$((${#nodes[@]} - 1))
    srun --nodes "$others" --ntasks "$others" --exclude "${nodes[0]}" --overlap \
        ray start --address "$address:$port" --disable-usage-stats --block &
fi
python - "$address:$port" "${#nodes[@]}" << 'END'
import sys, time
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    time.sleep(2)
END

# In the background, so that Slurm's signal reaches it: what is under way is finished, then it stops.
twotower analyze --engine ray --address "$address:$port" "$@" &
run=$!
trap 'kill -INT "$run"' INT TERM
code=0
wait "$run" || code=$?
while kill -0 "$run" 2> /dev/null; do wait "$run" || code=$?; done
exit "$code"
