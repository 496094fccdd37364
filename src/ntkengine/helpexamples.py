"""The examples under each command's `--help`; a test runs every one through the parser."""

from __future__ import annotations

# command -> (what it does, the command line); lines of at most 76 characters, so that a help page does not fold them
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "plan": (
        ("what a job would take, before it runs", "ntkengine plan job.toml"),
        (
            "the same on 64 ranks of 8 to a host",
            "ntkengine plan job.toml --ranks 64 --gpus-per-node 8 --network 50GB/s",
        ),
    ),
    "gram": (
        ("from a job file, one value changed", "ntkengine gram job.toml --precision exact --out exact.h5"),
        ("from flags alone", "ntkengine gram --model MODEL_DIR --data train.tsv --readout margin -o k.h5"),
        (
            "a language model, whose answer to a prompt is a word",
            "ntkengine gram words.toml --task causal-lm --words ' terrible, great'",
        ),
        ("over processes", "mpirun -n 8 python -m mpi4py -m ntkengine gram job.toml"),
    ),
    "info": (
        ("what is in a file, or how far its job is", "ntkengine info k.h5"),
        ("the error of its eigenvalues, for a script", "ntkengine info k.h5 --json | jq .noise"),
    ),
    "verify": (
        ("checksums, and that every number is finite", "ntkengine verify k.h5"),
        ("mend it, or open damaged tiles for the next run", "ntkengine verify k.h5 --repair"),
    ),
    "merge": (("the parts of a job over ranks as one packed file", "ntkengine merge k.h5 --out one.h5 --compress"),),
    "compare": (("how far two files are apart, against their noise", "ntkengine compare lora.h5 full.h5"),),
    "finetune": (
        ("train, with the linearised model along", "ntkengine finetune job.toml --linear --history run.jsonl"),
        ("other training", "ntkengine finetune job.toml --learning-rate 1e-3 --epochs 4 --save adapter"),
    ),
    "select": (
        ("rank kinds of modules", "ntkengine select job.toml --learning-rate 1e-3 --save ranking.json"),
        ("grow a set, keep the best as a PEFT config", "ntkengine select job.toml --subsets greedy --emit peft.json"),
    ),
    "spectrum": (
        ("the 20 largest eigenvalues, with bounds", "ntkengine spectrum k.h5"),
        ("both ends, for a script", "ntkengine spectrum k.h5 --count 10 --which BE --json"),
    ),
    "ridge": (
        ("the ridge path, leave-one-out chooses", "ntkengine ridge k.h5"),
        ("one strength, in the unit of K/C", "ntkengine ridge k.h5 --ridge 0.5"),
    ),
    "forecast": (
        ("risk and curve from a file", "ntkengine forecast k.h5 --ridge gcv"),
        ("of a job, with its training simulated", "ntkengine forecast job.toml --json"),
    ),
    "report": (
        ("two Grams and a ranking on one page", "ntkengine report lora.h5 full.h5 ranking.json -o report.html"),
    ),
    "doctor": (
        ("what runs where on this machine", "ntkengine doctor"),
        ("how far a model depends on its batch", "ntkengine doctor --model MODEL_DIR"),
    ),
    "demo": (("the whole job on real text, smaller", "ntkengine demo --out runs/demo --train 64 --eval 64"),),
}


def epilog(command: str) -> str:
    """Return the examples as the end of a help page, each line a paragraph."""
    lines = [f"{what}:\n\n  {line}" for what, line in EXAMPLES[command]]
    return "\n\n".join(["Examples", *lines])
