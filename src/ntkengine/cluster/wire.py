"""Buffers that MPI can read and write: the device's own where it knows the device, else pinned memory of the host."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ntkengine.cluster.comm import Team
from ntkengine.cluster.library import says_device

log = logging.getLogger(__name__)


class Wire:
    """Where parcels are while they travel.

    Args:
        team: the ranks.
        device: where they are made and used.
    """

    def __init__(self, team: Team, device: torch.device) -> None:
        self.device = device
        self.direct = device.type == "cpu" or _knows_device(team, device)
        if device.type != "cpu" and team.root:
            log.info("parcels travel %s", "from GPU to GPU" if self.direct else "through pinned memory of the host")

    def empty(self, size: int) -> Tensor:
        """Return a flat uint8 buffer to receive into."""
        if self.direct:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # the memory may be what a kernel still reads
            return torch.empty(size, dtype=torch.uint8, device=self.device)
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def leaving(self, parcel: Tensor) -> Tensor:
        """Return what is sent of a parcel of the device, complete."""
        if self.device.type == "cpu":
            return parcel
        if self.direct:
            torch.cuda.synchronize(self.device)
            return parcel
        host = self.empty(parcel.numel())
        host.copy_(parcel)
        return host

    def arrived(self, wire: Tensor) -> Tensor:
        """Return a received parcel on the device."""
        return wire if self.direct else wire.to(self.device)


def _knows_device(team: Team, device: torch.device) -> bool:
    """Return whether MPI reads and writes this device's memory: it says so on all ranks, and a parcel came round whole.

    An MPI that does not would end the process, so it is not tried unless it says so.
    """
    if not all(team.exchange(says_device())):
        return False
    right, left = (team.rank + 1) % team.size, (team.rank - 1) % team.size
    sent = torch.full((4096,), team.rank % 251, dtype=torch.uint8, device=device)
    got = torch.full_like(sent, 255)
    torch.cuda.synchronize(device)
    try:
        for request in [team.receive(got, right, 1), team.send(sent, left, 1)]:
            team.wait(lambda r=request: team.done(r))  # type: ignore[misc]
        good = bool((got == right % 251).all())
    except Exception as error:  # noqa: BLE001  (whatever it says, the host's memory still works)
        log.info("MPI says that it takes device memory, but: %s", error)
        good = False
    return all(team.exchange(good))
