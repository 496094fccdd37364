"""A sharded file from among its parts to its name: shards first, the whole last, so that it is complete or absent.

The whole and its shards are put together in `.<name>.parts/sharded/` (`store.shards`). Once the whole is there nothing
is computed any more: whoever comes next moves what has not been moved yet.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from ntkengine.errors import InputError
from ntkengine.store.checking import find_damage
from ntkengine.store.checkpoints import saved_states
from ntkengine.store.disk import give_name, sync_folder
from ntkengine.store.folder import Folder, parts_of, staged
from ntkengine.store.opening import opened
from ntkengine.store.reading import first_difference, read_job
from ntkengine.store.shards import shard_path, shards_of


def place(path: Path) -> None:
    """Give a sharded file that is complete among its parts, and its shards, their names; without one do nothing.

    The caller holds the folder of the parts.

    Raises:
        InputError: a shard's name is taken.
        OSError: the disk refused, or a name was taken meanwhile; the next call goes on.
    """
    whole = staged(path)
    if not whole.is_file():
        return
    with opened(whole) as file:
        shards = [shard for shard, _ in shards_of(file, whole)]
    for shard in shards:
        placed = path.with_name(shard.name)
        if shard.is_file() and not (placed.exists() and placed.samefile(shard)):
            refuse_taken(path, placed)
    for shard in shards:
        if shard.is_file():
            give_name(shard, path.with_name(shard.name))
    sync_folder(path.parent)
    give_name(whole, path)
    sync_folder(path.parent)


def refuse_shards(path: Path, ranks: int) -> None:
    """Refuse to start a job whose shards could not be given their names.

    Args:
        path: of the whole, which does not exist.
        ranks: how many shards there will be.

    Raises:
        InputError: a name is taken, or one that HDF5 cannot have in a virtual dataset.
    """
    if "%" in path.name or not path.name.isprintable():
        msg = f"out: expected a printable name without % for a file of several ranks, got {path.name!r}"
        raise InputError(msg)
    for rank in range(ranks):
        refuse_taken(path, shard_path(path, rank, ranks))


def refuse_taken(path: Path, shard: Path) -> None:
    """Refuse to write a shard over a file.

    Raises:
        InputError: its name is taken.
    """
    if shard.exists():
        msg = f"out: {shard} exists but {path.name} does not, so it belongs to another file; move or remove it"
        raise InputError(msg)


def tidy(path: Path) -> None:
    """Go on where a process was killed between two names: place what is complete, remove the parts of what is placed.

    Another process that is at work is left alone, and so are the parts of another job than the file's.

    Raises:
        InputError, OSError: as `place`.
    """
    if not parts_of(path).is_dir() or not (path.exists() or staged(path).is_file()):
        return
    with ExitStack() as held:
        try:
            folder = held.enter_context(Folder(path))
        except (InputError, OSError):
            return
        place(path)
        if not _same_job(path, folder.damaged):
            return
        if folder.damaged.is_file() and find_damage(path):  # killed between the two halves of a repair
            _drop(path)
        else:
            folder.remove()


def _drop(path: Path) -> None:
    """Remove a Gram file and its shards."""
    with opened(path) as file:
        shards = [shard for shard, _ in shards_of(file, path)]
    path.unlink()
    for shard in shards:
        shard.unlink(missing_ok=True)


def _same_job(path: Path, damaged: Path) -> bool:
    """Say whether the parts beside a file, as far as they tell what they are of, are of the same job."""
    try:
        whole = read_job(path)
        jobs = [state["job"] for state in saved_states(path)] + ([read_job(damaged)] if damaged.is_file() else [])
    except InputError:
        return False
    return all(first_difference(job, whole) is None for job in jobs)
