"""Sound inputs of every kind, small enough that a random byte is likely to matter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from ntkengine import store
from ntkengine.gram.result import Gram
from tests.tiny import compute_small, save_tiny, tiny_sentences

JOB = """out = "k.h5"
[model]
path = "model"
num_labels = 2
dtype = "float32"
seed = 3
stream = false
[model.peft]
peft_type = "LORA"
r = 2
target_modules = ["query", "value"]
[data]
train = "x.tsv"
eval = "x.csv"
text = "text"
label = "label"
label_names = ["bad", "good"]
limit = 10
[head]
fit = true
ridge = 0.5
folds = 3
[gram]
readout = "margin"
params = ["*.layer.*", "!*.bias"]
per_module = true
memory_gib = 8
[forecast]
ridge = "gcv"
[finetune]
learning_rate = 0.001
epochs = 2
betas = [0.9, 0.99]
"""


def make_seeds(folder: Path) -> Path:
    """Write all of them and return the folder."""
    folder.mkdir(parents=True)
    _write_gram(folder / "k.h5")
    (folder / "sharded").mkdir()
    _write_sharded(folder / "sharded" / "k.h5")
    (folder / "packed").mkdir()
    store.merge_gram(folder / "k.h5", folder / "packed" / "k.h5", compress=True)
    save_tiny(folder / "model")
    shutil.copy(folder / "model" / "model.safetensors", folder)
    (folder / "job.toml").write_text(JOB)
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(tiny_sentences(8))]
    lines = [(row["text"], str(row["label"])) for row in rows]
    (folder / "x.tsv").write_text("".join("\t".join(line) + "\n" for line in [("text", "label"), *lines]))
    (folder / "x.csv").write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in lines))
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "x.json").write_text(json.dumps(rows))
    (folder / "peft.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query", "value"], "bias": "none"})
    )
    (folder / "ranking.json").write_text(json.dumps(_ranking()))
    rng = np.random.default_rng(0)
    parts = [store.Part(name, (0, 5), (0, 5), rng.normal(size=(1, 5, 5)), symmetric=True) for name in ("", "a")]
    state = {"job": {"seed": 0}, "tile": 5, "generation": 1, "rank": 0, "ranks": 1}
    store.save_parts(folder / "rank-0000-of-0001.a", state, parts, {"traces": np.ones(3)})
    told = {"done": 3.0, "total": 9.0, "stage": "gram", "started": 1.7e9, "pid": 1, "host": "elsewhere", "at": 1.7e9}
    (folder / "progress.json").write_text(json.dumps(told))
    return folder


def _write_gram(path: Path) -> None:
    """Write a computed Gram with two of its modules: more only make a random byte less likely to matter."""
    full = path.with_name("full.h5")
    compute_small(full)
    gram = store.open_gram(full)
    gram.modules, gram.cross_modules = (
        {name: parts[name][...] for name in list(parts)[:2]} for parts in (gram.modules, gram.cross_modules)
    )
    gram.values, gram.cross, job = gram.values[...], gram.cross[...], gram.meta.pop("job")
    if gram.plan is not None:
        gram.plan.parameters = gram.plan.parameters[:3]
    gram.meta["module_trace"] = {name: gram.meta["module_trace"][name] for name in gram.modules}
    gram.extras = {
        "fold": np.arange(7) % 2,
        "fold_grams": np.stack([gram.values] * 2),
        "fold_outputs": np.stack([gram.outputs] * 2),
    }
    store.write_gram(path, gram, job, {"example_id": [f"x.tsv:{i}" for i in range(7)], "eval_id": ["a", "b", "é"]})
    full.unlink()


def _write_sharded(path: Path) -> None:
    rng, job = np.random.default_rng(0), {"two_inputs": False, "seed": 0}
    K = rng.normal(size=(7, 7))
    gram = Gram(K @ K.T, rng.normal(size=(7, 2)), "trace", "sgd", 0.25)
    gram.modules, gram.targets = {"a": gram.values / 2, "b": gram.values / 2}, rng.normal(size=(7, 2))
    gram.meta = {"precision": "high", "seconds": 1.0}
    for rank, (a, b) in enumerate(((0, 4), (4, 7))):
        names = {"gram": gram.values, "modules/0": gram.modules["a"], "modules/1": gram.modules["b"]}
        tiled = dict.fromkeys(names, (a, (b - a, 7), K.dtype))
        with store.writing_shard(path, rank, 2, tiled, job) as shard:
            for name, values in names.items():
                shard.put(name, 0, values[a:b])
    store.link_shards(path, 2, gram, job, {"example_id": [f"row {i}" for i in range(7)]})
    with store.Folder(path) as held:
        store.place(path)
        held.remove()


def _ranking() -> dict[str, object]:
    outcome = {"eval_loss": [0.3, 0.2, 0.4], "eval_accuracy": [0.8, 0.7, 0.9], "train_loss": 0.1}
    kernel = {"condition": "1.0e3", "trace": 2.0, "alignment": 0.1, "weyl_lambda_min": 0.0, "weyl_lambda_max": 1.0}
    named = {"query": kernel, "value": kernel, "dense": None}
    choices = [
        {"name": name, "modules": [f"layer.{name}"], "parameters": 512, **outcome, "kernel": found}
        for name, found in named.items()
    ]
    recipe = {"learning_rate": 0.001, "epochs": 1, "batch_size": 32, "optimizer": "adam", "loss": "squared"}
    peft = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["layer.query"]}
    return {"choices": choices, "peft": peft, "recipe": recipe, "assumptions": ["Small steps."]}
