#!/usr/bin/env bash
# Several hosts with 8 GPUs each, without a scheduler: HOSTS=node1,node2 scripts/mpi/nodes.sh job.toml
# The job file, the model, the data and the folder of the Gram are under the same paths on all of them.
set -euo pipefail
: "${HOSTS:?HOSTS=node1,node2,...}"
each=${GPUS_PER_NODE:-8}
IFS=, read -ra hosts <<<"$HOSTS"
ranks=$((${#hosts[@]} * each))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
if mpirun --version | grep -q 'Open MPI\|prte'; then
  exec mpirun -n "$ranks" --host "$(printf "%s:$each," "${hosts[@]}" | sed 's/,$//')" -x OMP_NUM_THREADS \
    python -m mpi4py -m ntkengine gram "$@"
fi
exec mpirun -n "$ranks" -ppn "$each" -hosts "$HOSTS" python -m mpi4py -m ntkengine gram "$@"
