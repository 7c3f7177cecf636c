"""What a run takes, for its log: samples a second, share of the device's rate (MFU), waiting for data, memory.

    meters = Meters(device, sample_flops, peak_flops=989e12)
    meters.add(rows=16, tokens=210, waited=0.01)
    meters.read(processes=8)

Nothing here waits for a device: rows, tokens and seconds are known to the host, and torch counts memory there too.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

import psutil
import torch

# Rates of one device by its maker, in TFLOP/s, without sparsity: matrix products in half precision, and in fp32.
# The first name that fits counts. What is not in the list says --peak_tflops.
PEAK_TFLOPS = (
    (r"B200", 2250, 75),
    (r"GH200|H200|H100 80GB HBM3|H800", 989, 67),
    (r"H100 NVL", 835, 60),
    (r"H100 PCIe", 756, 51),
    (r"H20\b", 148, 44),
    (r"A100|A800", 312, 19.5),
    (r"A40\b", 150, 37.4),
    (r"A30\b", 165, 10.3),
    (r"A10\b", 125, 31.2),
    (r"L40S", 362, 91.6),
    (r"L40\b", 181, 90.5),
    (r"L4\b", 121, 30.3),
    (r"RTX 4090\b", 165, 82.6),
    (r"RTX 3090\b", 71, 35.6),
    (r"RTX A6000", 155, 38.7),
    (r"V100.*PCIE", 112, 14),
    (r"V100", 125, 15.7),
    (r"T4\b", 65, 8.1),
)
WITHOUT_BF16 = re.compile(r"V100|T4\b")


def known_peak_tflops(name: str, precision: str) -> float | None:
    """The rate of a GPU in TFLOP/s, where it is in the list.

    Args:
        name: as `torch.cuda.get_device_name` says it.
        precision: "no" (fp32), "bf16" or "fp16".
    """
    if precision == "bf16" and WITHOUT_BF16.search(name):
        return None
    for pattern, half, single in PEAK_TFLOPS:
        if re.search(pattern, name):
            return single if precision == "no" else half
    return None


def peak_tflops_of(device: torch.device, precision: str, given: float | None) -> float | None:
    """The rate that a run is measured by: the given one, or that of a GPU in the list; None: not known."""
    if given is not None or device.type != "cuda":
        return given
    return known_peak_tflops(torch.cuda.get_device_name(device), precision)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that this process has held at a time so far, in GB: of a GPU what tensors took there, otherwise
    of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Linux: what `resource` says begins at what the process had that started this one.
    with suppress(OSError, StopIteration), open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e9
    try:
        import resource
    except ImportError:  # Windows, where psutil knows it
        return psutil.Process().memory_info().peak_wset / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Meters:
    """Counts of this process since the last reading.

    Args:
        device: of the process.
        sample_flops: operations that a sample takes in a step, by the mean length of its title in tokens; None: the
            share of the device's rate is not told.
        peak_tflops: the device's rate; None: likewise.
    """

    def __init__(
        self,
        device: torch.device,
        sample_flops: Callable[[float], int] | None = None,
        peak_tflops: float | None = None,
    ):
        self.device = device
        self.sample_flops = None if sample_flops is None else cache(sample_flops)
        self.peak_tflops = peak_tflops
        self.restart()

    def restart(self) -> None:
        self.samples = self.tokens = 0
        self.waited = 0.0
        self.since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What takes place inside is no training, and does not count in its speed."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def add(self, rows: int, tokens: int, waited: float) -> None:
        """A batch: its rows, the tokens of its titles, and the seconds that it was waited for."""
        self.samples += rows
        self.tokens += tokens
        self.waited += waited

    def read(self, processes: int) -> dict[str, float | None]:
        """samples_per_second, of all processes; data_wait, the share of the time that this one waited for data; mfu,
        the operations that its samples need, as a share of what its device could do: None where that is not known."""
        seconds = time.perf_counter() - self.since
        mfu = None
        if self.sample_flops is not None and self.peak_tflops is not None and self.samples:
            flops = self.samples * self.sample_flops(round(self.tokens / self.samples))
            mfu = flops / (seconds * self.peak_tflops * 1e12)
        return {
            "samples_per_second": self.samples * processes / seconds,
            "data_wait": self.waited / seconds,
            "mfu": mfu,
        }


__all__ = ["Meters", "known_peak_tflops", "peak_memory_gb", "peak_tflops_of"]
