"""Files that survive a kill: Gram matrices in HDF5, checkpoints of unfinished ones. The only h5py import.

A Gram file, readable with plain h5py, HDFView or MATLAB (HDF5 1.10 format, whose own structures have checksums):

/gram                 float64, (N, M), (N·C, M·C) or (C, N, M); chunks are tiles
/cross                eval × train in the same layout, when there is an eval set
/modules/<i>          per-module Grams, attribute `name`, with a checksum of that
/crosses/<i>          their eval × train counterparts, with /cross
/outputs /targets     (N, C) float64;   /eval_outputs /eval_targets  (M, C)
/example_id           N strings;        /eval_id  M strings
/tiles/crc32          checksum of each tile of /gram;   /tiles/done  its flag
/tiles/<dataset>/...  the same of /cross, /modules/<i> and /crosses/<i>
/extras/<name>        further arrays
/json/<name>          job (what defines the values), meta, plan; of a sharded file also shards
Root attributes: schema, contraction, transform, precision, noise; sketch, its features, when there is one. Datasets
without tiles, and the root, carry a checksum of their own in the attribute `crc32`.

Before a number is read, a file is found to hold nothing that a Gram file never has (`store.vetting`): no links, other
files, plug-ins, or shapes that are not stored; what is read whole is compared with its checksum, and
tiles by `verify_gram`.

A job over several ranks writes a sharded file: each has its rows in a file of its own, `<name>.rank-0000-of-0004.h5`
beside the whole, which has virtual datasets over them. A file appears under its name only when it is complete. Until
then `.<name>.parts/` holds what there is (`store.folder`): checkpoints, finished tiles, who is at work and how far.
"""

from __future__ import annotations

from ntkengine.store.checking import Damage, find_damage, verify_gram
from ntkengine.store.checkpoints import (
    Part,
    Saved,
    extra_name,
    load,
    load_newest,
    read_parts,
    save_parts,
    saved_states,
    slots,
)
from ntkengine.store.folder import Folder, followed, going_on, parts_of, read_progress, staged
from ntkengine.store.merging import merge_gram
from ntkengine.store.overlay import overlay
from ntkengine.store.placing import place, refuse_shards, tidy
from ntkengine.store.reading import first_difference, open_gram, read_extra, read_job
from ntkengine.store.repair import differences, fill_tiles, open_damaged, repair_gram
from ntkengine.store.schema import SCHEMA, is_cross
from ntkengine.store.shards import Shard, link_shards, shard_path, writing_shard
from ntkengine.store.tiles import TILE
from ntkengine.store.writing import write_gram

__all__ = [
    "SCHEMA",
    "TILE",
    "Damage",
    "Folder",
    "Part",
    "Saved",
    "Shard",
    "differences",
    "extra_name",
    "fill_tiles",
    "find_damage",
    "first_difference",
    "followed",
    "going_on",
    "link_shards",
    "is_cross",
    "load",
    "load_newest",
    "merge_gram",
    "open_damaged",
    "open_gram",
    "overlay",
    "parts_of",
    "place",
    "read_extra",
    "read_job",
    "read_parts",
    "read_progress",
    "refuse_shards",
    "repair_gram",
    "save_parts",
    "saved_states",
    "shard_path",
    "slots",
    "staged",
    "tidy",
    "verify_gram",
    "write_gram",
    "writing_shard",
]
