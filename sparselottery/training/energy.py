"""What a training cost: seconds, and joules where a meter of the machine can be read.

On an NVIDIA GPU that is NVML's total energy counter (Volta and later; through nvidia-ml-py): of this GPU alone, without the
CPU and memory beside it. On a CPU it is RAPL (/sys/class/powercap, where it may be read): all CPU packages of the machine,
whatever runs on them. Elsewhere there is no energy, and `Meter.why_not` says why; nothing is estimated from nominal powers.
"""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")
SAMPLE = 30.0  # seconds between looks at counters that wrap (at full power after minutes)


class Meter:
    """Measures from when it is entered on: `with Meter(device) as meter: ...; meter.read()`.

    Args:
        device: where the work is done.
        energy: False measures time alone, with `why_not` as the reason.

    Attributes:
        source: which meter, None without one. why_not: why there is none, else None.
    """

    def __init__(self, device: torch.device | str = "cpu", energy: bool = True, why_not: str = "not asked for"):
        device = torch.device(device)
        self.source, self.why_not, self._joules = None, why_not, None
        if energy:
            found = _nvml(device) if device.type == "cuda" else _rapl() if device.type == "cpu" else None
            found = found or f"no energy meter is known for {device.type}"
            if isinstance(found, str):
                self.why_not = found
            else:
                (self.source, self._joules), self.why_not = found, None
        self._device = device

    def __enter__(self) -> "Meter":
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._used = 0.0
        self._wait_for_device()
        self._begin = time.perf_counter()
        if self._joules is not None:
            self._joules()
            threading.Thread(target=self._sample, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._stop.set()

    def read(self) -> dict:
        """{"seconds": since it was entered, "joules": likewise, None without a meter}."""
        self._wait_for_device()
        seconds = time.perf_counter() - self._begin
        return {"seconds": seconds, "joules": None if self._joules is None else self._take()}

    def _take(self) -> float:
        with self._lock:
            self._used += self._joules()
            return self._used

    def _sample(self):
        while not self._stop.wait(SAMPLE):
            self._take()

    def _wait_for_device(self):
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _nvml(device) -> tuple[str, Callable[[], float]] | str:
    """(name, joules since the last call) of a GPU's energy counter, or why there is none."""
    try:
        import pynvml
    except ImportError:
        return "reading a GPU's energy needs nvidia-ml-py: pip install 'sparselottery[energy]'"
    try:
        pynvml.nvmlInit()
        properties = torch.cuda.get_device_properties(device)
        uuid = str(getattr(properties, "uuid", ""))  # CUDA_VISIBLE_DEVICES may have renumbered them
        index = torch.cuda.current_device() if device.index is None else device.index
        handle = (
            pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
            if uuid
            else pynvml.nvmlDeviceGetHandleByIndex(index)
        )
        read = _difference(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, None)
    except (pynvml.NVMLError, RuntimeError) as error:
        return f"NVML cannot read this GPU's energy ({error})"
    return f"NVML, {properties.name}", read


def _rapl() -> tuple[str, Callable[[], float]] | str:
    """Likewise for the CPU packages."""
    packages = sorted(p for p in RAPL.glob("intel-rapl:*") if re.fullmatch(r"intel-rapl:\d+", p.name))
    if not packages:
        return f"this machine shows no energy counters of its CPU (no intel-rapl in {RAPL})"
    readers = []
    for package in packages:
        try:
            wrap = int((package / "max_energy_range_uj").read_text()) / 1e6
            readers.append(_difference(lambda p=package: int((p / "energy_uj").read_text()) / 1e6, wrap))
        except (OSError, ValueError) as error:
            return f"the energy counter of the CPU cannot be read ({error})"
    return "RAPL, CPU packages", lambda: sum(read() for read in readers)


def _difference(counter: Callable[[], float], wrap: float | None) -> Callable[[], float]:
    """How much a counter that begins anew at `wrap` has grown since the last call; it is tried at once."""
    last = [counter()]

    def read() -> float:
        now = counter()
        grown = now - last[0]
        last[0] = now
        return grown if grown >= 0 or wrap is None else grown + wrap

    return read
