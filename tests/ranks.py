"""What the tests run under an MPI launcher: python -m mpi4py -m tests.ranks FOLDER GROUP. Results go to FOLDER."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

import ntkengine as ntk
from ntkengine.cluster.shards import deal
from ntkengine.errors import Stopped
from ntkengine.gram.spread import Spread
from ntkengine.gram.teamwork import SpreadKeeper
from ntkengine.gram.transforms import Preconditioner
from ntkengine.inputs.batches import Samples
from ntkengine.tangents.factors import Dense
from ntkengine.tangents.sweep import Sweep
from tests.brute import tiny_inputs, tiny_model, with_lora

LENGTHS = [3, 12, 5, 2, 9, 7, 2, 13, 4, 6, 8]  # 11 samples: uneven for 2, 3 and 5 ranks
OTHERS = [8, 2, 5, 4, 9, 3, 2]


def made():
    """Return the tiny model, its inputs and more of them."""
    model = tiny_model("bert")
    return model, tiny_inputs(model, LENGTHS, 13), tiny_inputs(model, OTHERS, 9, seed=1)


def cases(group):
    """Return (name, model, inputs, arguments) of a group of cases."""
    model, inputs, more = made()
    llama = with_lora(tiny_model("llama"), ["q_proj", "v_proj"], away_from_start=True)
    adapted = tiny_inputs(llama, LENGTHS, 13), tiny_inputs(llama, [3], 9, seed=1)  # an eval set that most ranks miss
    torch.manual_seed(1)
    scale = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    exact = {"params": "all", "precision": "exact", "check": False}
    found = [
        ("trace", model, inputs, exact),
        ("high, checked", model, inputs, {"params": "all", "eval_inputs": more}),
        ("full, per module", model, inputs, exact | {"contraction": "full", "per_module": True, "eval_inputs": more}),
        ("lora", llama, adapted[0], {"precision": "exact", "eval_inputs": adapted[1], "check": False}),
        ("asymmetric", model, inputs, exact | {"transform": "asymmetric-sign", "eval_inputs": more}),
        ("two inputs", model, inputs, exact | {"inputs2": more, "contraction": "per-output"}),
    ]
    if group == "few":
        return found[:2]
    return [
        *found,
        ("sign", model, inputs, exact | {"transform": "sign"}),
        ("asymmetric, two inputs", model, inputs, exact | {"transform": "asymmetric-sign", "inputs2": more}),
        ("sum of outputs", model, inputs, exact | {"contraction": "sum-of-outputs"}),
        ("preconditioned", model, inputs, exact | {"transform": Preconditioner(scale)}),
        ("sketch", model, inputs, {"params": "all", "sketch": 16, "precision": "exact"}),
        ("bounded", model, inputs, exact | {"memory_gib": 0.25}),
        ("fast", model, inputs, {"params": "all", "precision": "fast", "check": False}),
    ]


def computed(group, comm=None):
    """Return arrays by name of every case; on other ranks than 0 none."""
    found = {}
    for name, model, inputs, options in cases(group):
        gram = ntk.compute_gram(model, inputs, comm=comm, **options)
        if comm is not None and comm.rank:
            assert gram.values.shape
            found[f"{name}: outputs"] = gram.outputs
            continue
        found[f"{name}: values"] = np.asarray(gram)
        found[f"{name}: outputs"] = gram.outputs
        found[f"{name}: noise"] = np.array(gram.noise)
        if gram.cross is not None:
            found[f"{name}: cross"] = np.asarray(gram.cross)
            found[f"{name}: eval outputs"] = gram.eval_outputs
        for module, values in gram.modules.items():
            found[f"{name}: {module}"] = np.asarray(values)
        for parameter, trace in gram.meta["module_trace"].items():
            found[f"{name}: trace of {parameter}"] = np.array(trace)
        if comm is not None and comm.size > 1:
            found[f"{name}: sent"] = np.array(gram.meta["ranks"]["sent_bytes"])
    return found


WRITTEN = ("high, checked", "full, per module", "lora", "asymmetric", "two inputs")


def few_rows(inputs):
    """Return arguments of a job with fewer rows than ranks."""
    return {k: v[:3] for k, v in inputs.items()}, {"eval_inputs": inputs, "per_module": True}


def written(comm, folder):
    """Compute cases into files, one for each rank, and never gather."""
    whole = Spread.whole
    Spread.whole = None
    found = [(name, *case) for name, *case in cases("all") if name in WRITTEN]
    model, inputs, _ = made()
    rows, options = few_rows(inputs)
    found.append(("few rows", model, rows, {"params": "all", "precision": "exact", "check": False} | options))
    for name, given, batch, arguments in found:
        gram = ntk.compute_gram(given, batch, comm=comm, out=folder / f"{name}.h5", **arguments)
        assert (gram.path, gram.shape) == (folder / f"{name}.h5", gram.values.shape)
    Spread.whole = whole


def refused(comm):
    """Return what each rank is told of jobs that fail: (kind, message) by case."""
    model, inputs, _ = made()

    def infinite(output, batch):
        return output.logits * torch.where(batch["input_ids"][:, :1] == int(inputs["input_ids"][1, 0]), torch.inf, 1.0)

    def broken(output, _batch):
        if comm.rank == comm.size - 1:
            message = "out of luck"
            raise OSError(message)
        return output.logits

    def extras():
        ntk.compute_gram(model, inputs, comm=comm, check=False)
        if comm.rank == 0:
            raise OSError(disk)
        return dict(ntk.compute_gram(model, inputs, comm=comm, check=False).extras)

    disk = "no space left"
    own = tiny_model("bert", seed=comm.rank)
    few = {k: v[: comm.size - 1] for k, v in inputs.items()}
    bad = {**inputs, "input_ids": inputs["input_ids"][:3]}
    jobs = {
        "same bad argument": (model, inputs, {"contraction": "nothing"}),
        "bad inputs on the last rank": (model, bad if comm.rank == comm.size - 1 else inputs, {}),
        "another model on each rank": (own, inputs, {}),
        "fewer samples than ranks": (model, few, {}),
        "one rank raises": (model, inputs, {"readout": broken}),
        "not finite": (model, inputs, {"readout": infinite, "check": False}),
        "rank 0 raises between sweeps": (model, inputs, {"extras": extras, "check": False}),
        "extras on one rank": (model, inputs, {"extras": dict if comm.rank == 1 else None}),
        "too little memory": (model, inputs, {"memory_gib": 1e-6}),
    }
    found = {}
    for name, (given, batch, options) in jobs.items():
        try:
            ntk.compute_gram(given, batch, comm=comm, params="all", **options)
            found[name] = ["", ""]
        except Exception as error:  # noqa: BLE001
            found[name] = [type(error).__name__, str(error)]
    return found


def spoiled(comm):
    """Return what each rank is told when one rank's sweep finds a gradient that is not finite, and whose it was."""
    model, inputs, _ = made()
    whole = Sweep.segments

    def segments(self):
        for name, found in whole(self):
            for factors in found:
                for use in factors.chunks[0]:
                    (use.g if isinstance(use, Dense) else use.d)[0] = torch.inf
            yield name, found

    samples = Samples([inputs])
    first = int(deal(samples, comm.size)[1].positions(0)[0])
    if comm.rank == 1:
        Sweep.segments = segments
    try:
        ntk.compute_gram(model, inputs, comm=comm, params="all", check=False)
    except Exception as error:  # noqa: BLE001
        return {"spoiled": [type(error).__name__, str(error), int(samples.order[0][first])]}
    return {"spoiled": ["", "", -1]}


def kept(group, path, comm=None):
    """Go on with a job that keeps checkpoints: to its end, or until a few blocks more are in.

    Args:
        group: "ends": it is left to end; "dies": rank 1 is killed; "stops": the last rank is asked to stop.
        path: of its file.
        comm: the ranks.

    Returns:
        What became of it.
    """
    model, inputs, more = made()
    options = {"params": "all", "precision": "exact", "check": False, "contraction": "full", "eval_inputs": more}
    steps = []
    step = SpreadKeeper.step

    def counted(self, spreading):
        steps.append(0)
        if len(steps) == 3 and group == "dies" and comm.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(steps) == 2 and group == "stops" and comm.rank == comm.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, spreading)

    SpreadKeeper.step = counted
    try:
        gram = ntk.compute_gram(
            model, inputs, comm=comm, out=path, checkpoint_s=0.0, per_module=path.stem == "parts", **options
        )
    except Stopped as error:
        return str(error)
    finally:
        SpreadKeeper.step = step
    return f"{gram.meta['resumed']} were summed"


def main():
    """Run a group."""
    from mpi4py import MPI

    torch.set_num_threads(1)
    comm, folder, group = MPI.COMM_WORLD, Path(sys.argv[1]), sys.argv[2]
    if group in ("ends", "dies", "stops"):
        said = comm.gather(kept(group, folder, comm))
        if not comm.rank:
            assert len(set(said)) == 1, said
            print(said[0])
    elif group == "killed":
        model, inputs, _ = made()

        def deadly(output, _batch):
            if comm.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return output.logits

        ntk.compute_gram(model, inputs, comm=comm, readout=deadly)
    else:
        save(group, comm, folder)
        written(comm, folder)
        part = comm.Split(min(comm.rank // 2, 1), comm.rank)  # two ranks, and the others at the same time
        if part.size > 1:
            save(group, part, folder)
        if comm.rank == 0:
            save("few", MPI.COMM_SELF, folder)
        told = comm.gather(refused(comm) | spoiled(comm))
        if comm.rank == 0:
            (folder / "told.json").write_text(json.dumps(told))


def save(group, comm, folder):
    """Compute a group of cases on the ranks of a communicator and save what they found."""
    found = computed(group, comm)
    everywhere = comm.gather({k: v for k, v in found.items() if k.endswith(": outputs")})
    if comm.rank == 0:
        assert all(np.array_equal(e[k], found[k]) for e in everywhere for k in e)
        np.savez(folder / f"{comm.size}.npz", **found)


if __name__ == "__main__":
    main()
