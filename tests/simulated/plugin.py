"""For pytest's `-p`: the whole run is on the simulated device. $SIMULATED_DEVICE names the library of `hooks.cpp`."""

import ctypes
import os

library = ctypes.CDLL(os.environ["SIMULATED_DEVICE"])
library.simulate_device.restype = ctypes.c_bool
if not library.simulate_device():
    raise RuntimeError("torch was loaded before its device")

from tests.simulated.device import simulated  # noqa: E402

_running = simulated()
_running.__enter__()
