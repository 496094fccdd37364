"""A shortened fault campaign (the long one: `bench run faults`): nothing lost, nothing wrong, nothing hangs."""

from __future__ import annotations

import pytest

from ntkengine import store
from tests.campaign import Campaign


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    tile = store.tiles.TILE
    yield Campaign(tmp_path_factory.mktemp("faults"))
    store.tiles.TILE = tile


@pytest.fixture
def campaign(job):
    job.lost.clear()
    return job


def test_sigkill_at_any_time(campaign):
    for share in (0.35, 0.6, 0.8, 0.95):
        campaign.killed(share)
    assert campaign.lost == []


def test_sigkill_late_with_checkpoints_every_second(campaign):
    campaign.killed(0.9, checkpoint_s=1.0, pause_s=0.1)
    assert campaign.lost == []


def test_sigkill_at_disk_operations(campaign):
    total = campaign.operations()
    for number in (1, 4, total // 2, total - 8, total - 5, total - 3, total - 1):
        campaign.killed_at_operation(number)
    assert campaign.lost == []


def test_sigterm(campaign):
    campaign.stopped(0.5)
    assert campaign.lost == []


def test_full_disk(campaign):
    for share in (0.0, 0.5):
        campaign.full_disk(share)
    assert campaign.lost == []


def test_damaged_checkpoints(campaign):
    campaign.damaged_checkpoint()
    campaign.damaged_checkpoint(both=True, truncated=True)
    assert campaign.lost == []


def test_flipped_bits_in_twenty_tiles(campaign):
    campaign.flipped_tiles(20)
    assert campaign.lost == []


def test_sigkill_while_repairing(campaign):
    campaign.killed_in_repair(12, later=False)
    campaign.killed_in_repair(12, later=True)
    assert campaign.lost == []


def test_refusals(campaign):
    campaign.second_process()
    campaign.another_job()
    assert campaign.lost == []
