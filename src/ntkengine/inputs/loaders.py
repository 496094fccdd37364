"""Whether a DataLoader gives every example of its data set, once and in its order."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ntkengine.errors import InputError

_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
# accelerate's, which a Trainer makes: in one process they hand on what torch's own gives, unless told to skip.
_HANDED_ON = ("DataLoaderShard", "DataLoaderDispatcher")


def check_order(loader: DataLoader) -> None:
    """Refuse a loader whose rows could not be told whose they are.

    What is known to keep the order is accepted: torch's sequential sampler, in torch's batches; and a data set that is
    an iterator, which has only the order that it gives.

    Raises:
        InputError: it shuffles, drops or skips examples, or it has a sampler or a loop of its own, which might.
    """
    _check_loop(loader)
    batches, sampler = loader.batch_sampler, loader.sampler
    if isinstance(loader.dataset, IterableDataset):
        if loader.drop_last and loader.batch_size != 1:
            raise InputError("inputs: this DataLoader drops the last examples of an iterator; drop_last=False")
        return
    if type(batches) is BatchSampler:  # of a loader with batch_sampler=, .sampler is not what is drawn from
        sampler = batches.sampler
    elif batches is not None:
        raise _own(loader, batches)
    if isinstance(sampler, _RANDOM):
        raise InputError(
            "inputs: this DataLoader draws examples at random: no row could be told whose it is; shuffle=False"
        )
    if type(sampler) is not SequentialSampler:
        raise _own(loader, sampler)
    examples = len(sampler)
    if isinstance(loader.dataset, Sized) and examples != len(loader.dataset):
        raise InputError(f"inputs: this DataLoader draws {examples} of the {len(loader.dataset)} examples it has")
    dropped = examples % batches.batch_size if type(batches) is BatchSampler and batches.drop_last else 0
    if dropped:
        raise InputError(f"inputs: this DataLoader drops the last {dropped} examples; drop_last=False")


def _check_loop(loader: Any) -> None:
    kind = type(loader)
    if kind.__module__.partition(".")[0] == "accelerate" and kind.__name__ in _HANDED_ON:
        processes = getattr(getattr(loader, "state", None), "num_processes", 1)
        if processes > 1 or type(loader.dataset).__name__ == "IterableDatasetShard":
            raise InputError("inputs: this DataLoader gives each process a part; make one without accelerate")
        if loader.skip_batches:
            raise InputError(f"inputs: this DataLoader skips its first {loader.skip_batches} batches")
    elif kind.__iter__ is not DataLoader.__iter__:
        raise _own(loader, loader)
    if loader.num_workers > 1 and not getattr(loader, "in_order", True):
        raise InputError("inputs: this DataLoader gives batches as its workers finish them; in_order=True")


def _own(loader: DataLoader, what: Any) -> InputError:
    got = type(what).__name__
    return InputError(
        f"inputs: expected a DataLoader that goes through its examples in order (shuffle=False), got "
        f"{got if what is loader else f'one with {got}'}; if its order is the one you mean, pass list(loader)"
    )
