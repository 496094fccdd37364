#!/usr/bin/env bash
# One host with 8 GPUs, a rank on each: scripts/mpi/one_node.sh job.toml [flags of `ntkengine gram`]
# Ranks take the host's GPUs in order; without GPUs give each rank its share of the cores.
set -euo pipefail
ranks=${RANKS:-8}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / ranks > 0 ? $(nproc) / ranks : 1))}
exec mpirun -n "$ranks" python -m mpi4py -m ntkengine gram "$@"
