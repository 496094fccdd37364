"""The Trainer's callback: what it records in a real run, and that training does not notice it."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import ntkengine as ntk
from tests.brute import gradients, tiny_inputs, tiny_model, with_lora

LENGTHS = [5, 9, 3, 7, 4, 6, 8, 2, 9, 3, 5, 7]


def trainer(tmp_path, callbacks, rate=1e-2, lora=True, seed=0, metric=None, **settings):
    model = tiny_model("bert", 2)
    if lora:
        model = with_lora(model, ["query", "value"], away_from_start=False)
    inputs = tiny_inputs(model, LENGTHS, 9)
    rows = [{k: v[i] for k, v in inputs.items()} | {"labels": i % 2} for i in range(len(LENGTHS))]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        learning_rate=rate,
        seed=seed,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        **{"save_strategy": "no", "max_steps": 7, **settings},
    )
    held = {} if metric is None else {"eval_dataset": rows, "compute_metrics": metric}
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks, **held)


def probes(model):
    return tiny_inputs(model, [4, 8, 6], 9, seed=5)


@pytest.mark.parametrize("lora", [True, False])
def test_records_the_exact_linearisation(tmp_path, lora):
    callback = ntk.LinearityCallback(probes(tiny_model("bert", 2)), every=3)
    run = trainer(tmp_path, [callback], lora=lora)
    model = run.model
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    inputs = probes(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    J = gradients(model, inputs, names)
    f0 = model.eval()(**inputs).logits.detach()
    run.train()
    delta = torch.cat([(p - start[n]).detach().reshape(-1) for n, p in model.named_parameters() if n in names])
    f = model.eval()(**inputs).logits.detach()
    assert [m.step for m in callback.history] == [1, 3, 6, 7]
    last = callback.history[-1]
    assert last.displacement == pytest.approx(float(delta.norm()), rel=1e-5)
    assert last.moved == pytest.approx(float((f - f0).norm()), rel=1e-4)
    g = f0.double().numpy() + J @ delta.double().numpy()
    gap = np.linalg.norm(f.double().numpy() - g)
    assert last.gap == pytest.approx(gap, rel=1e-3)
    assert last.relative_gap == pytest.approx(gap / float((f - f0).norm()), rel=1e-3)
    p, q = (torch.log_softmax(x, 1) for x in (f.double(), torch.from_numpy(g)))
    assert last.divergence == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-2)
    assert len(callback.table()) == 5


def test_probes_are_what_training_takes(tmp_path):
    run = trainer(tmp_path, [])
    rows = run.train_dataset[:4]
    given = ntk.LinearityCallback(rows), ntk.LinearityCallback({k: v[:4] for k, v in run.data_collator(rows).items()})
    for callback in given:
        run.add_callback(callback)
    run.train()
    assert given[0].history == given[1].history
    assert given[0].history[-1].gap > 0


def test_training_does_not_notice(tmp_path):
    found = []
    for callbacks in ([], [ntk.LinearityCallback(probes(tiny_model("bert", 2)), every=1)]):
        run = trainer(tmp_path, callbacks)
        losses = run.train().training_loss
        assert all(m.training for m in run.model.modules())
        assert {n for n, p in run.model.named_parameters() if p.requires_grad} == {
            n for n, _ in run.model.named_parameters() if "lora" in n
        }
        found.append((losses, torch.cat([p.detach().reshape(-1) for p in run.model.parameters()])))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_says_when_training_leaves_the_linear_regime(tmp_path, caplog):
    callback = ntk.LinearityCallback(probes(tiny_model("bert", 2)), every=2)
    with caplog.at_level(logging.WARNING, logger="ntkengine"):
        trainer(tmp_path, [callback], rate=1.0).train()
    first = next(m for m in callback.history if m.relative_gap > 0.5)
    assert callback.left_at == first.step
    said = [r.getMessage() for r in caplog.records if "left the linear regime" in r.getMessage()]
    assert len(said) == 1
    assert f"by step {first.step}:" in said[0]


def test_is_silent_while_training_is_linear(tmp_path, caplog):
    callback = ntk.LinearityCallback(probes(tiny_model("bert", 2)), every=1)
    run = trainer(tmp_path, [callback], rate=1e-4)
    run.train()
    assert callback.left_at is None
    assert max(m.relative_gap for m in callback.history) < 0.1
    assert not [r for r in caplog.records if "linear regime" in r.getMessage()]
    run.train()  # a second run starts from where the first ended, and from an empty history
    assert [m.step for m in callback.history] == list(range(1, 8))


def test_a_trainers_autocast_is_not_measured(tmp_path, caplog):
    callback = ntk.LinearityCallback(probes(tiny_model("bert", 2)), every=1)
    run = trainer(tmp_path, [callback], rate=1e-5, lora=False, bf16=True)
    names = [n for n, _ in run.model.named_parameters()]
    start = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    inputs = probes(run.model)
    J, f0 = gradients(run.model, inputs, names), run.model.eval()(**inputs).logits.detach()
    run.train()
    assert callback.left_at is None
    assert not [r for r in caplog.records if "linear regime" in r.getMessage()]
    model = copy.deepcopy(run.model).double().eval()
    vars(model).pop("forward")  # the Trainer's
    delta = torch.cat([(p - start[n]).reshape(-1) for n, p in model.named_parameters()]).detach()
    with torch.no_grad():
        moved = model(**inputs).logits - f0.double()
    gap = np.linalg.norm(moved.numpy() - J @ delta.numpy())
    last = callback.history[-1]
    assert last.moved == pytest.approx(float(moved.norm()), rel=1e-2)
    assert last.gap < gap + 1e-2 * last.moved
    assert vars(run.model)["forward"] is not run.model._original_forward  # left as it was


class Displacements(TrainerCallback):
    """The true ‖θ_t − θ_0‖ after every step."""

    def __init__(self):
        self.found = {0: 0.0}

    def on_train_begin(self, _args, _state, _control, **given):
        self.start = [p.detach().clone() for p in given["model"].parameters()]

    def on_step_end(self, _args, state, _control, **given):
        moved = zip(given["model"].parameters(), self.start, strict=True)
        self.found[state.global_step] = float(sum((p.detach() - s).square().sum() for p, s in moved)) ** 0.5


@pytest.mark.parametrize("stops", [False, True])
def test_every_row_is_of_its_step_when_another_checkpoint_is_loaded_at_the_end(tmp_path, stops):
    callback, truth, scores = ntk.LinearityCallback(probes(tiny_model("bert", 2)), every=100), Displacements(), []

    def worse_and_worse(_):
        scores.append(-len(scores))
        return {"score": scores[-1]}

    run = trainer(
        tmp_path, [callback, truth, *([EarlyStoppingCallback(2)] if stops else [])], metric=worse_and_worse,
        max_steps=-1, num_train_epochs=4, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    run.train()
    last = 9 if stops else 12
    assert run.state.best_model_checkpoint.endswith("checkpoint-3")
    assert [m.step for m in callback.history] == [1, last]
    for m in callback.history:
        assert m.displacement == pytest.approx(truth.found[m.step], rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant):
    found = []
    for settings in ({}, {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}):
        callback = ntk.LinearityCallback(probes(tiny_model("bert", 2)), every=3)
        run = trainer(tmp_path, [callback], lora=False, gradient_checkpointing=bool(settings), **settings)
        run.train()
        found.append(callback.history)
    assert found[0] == found[1]
    hooks = run.model.get_input_embeddings()._forward_hooks.values()
    assert [hook.__name__ for hook in hooks] == ["make_inputs_require_grads"]


def test_accumulated_gradients_count_as_one_step(tmp_path):
    callback = ntk.LinearityCallback(probes(tiny_model("bert", 2)), every=4)
    trainer(tmp_path, [callback], gradient_accumulation_steps=2).train()
    assert [m.step for m in callback.history] == [1, 4, 7]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"every": 0}, "every: expected"),
        ({"threshold": -1.0}, "threshold: expected"),
        ({"threshold": float("nan")}, "threshold: expected"),
        ({"readout": "nothing"}, "readout: expected one of"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ntk.InputError, match=message):
        ntk.LinearityCallback(probes(tiny_model("bert", 2)), **given)


def test_training_outside_the_expansion_is_refused(tmp_path):
    callback = ntk.LinearityCallback(probes(tiny_model("bert", 2)), params="*query*")
    with pytest.raises(ntk.InputError, match="has changed since"):
        trainer(tmp_path, [callback], lora=False).train()


def test_a_model_in_pieces_is_refused(tmp_path):
    callback = ntk.LinearityCallback(probes(tiny_model("bert", 2)))
    run = trainer(tmp_path, [callback])
    run.args.deepspeed = "somewhere.json"
    with pytest.raises(ntk.InputError, match="split over processes"):
        callback.on_train_begin(run.args, run.state, run.control, model=run.model)
