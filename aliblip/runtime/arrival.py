"""Numbers on their way from a device to the host: begun early, waited for late.

norm = Arrival(norm)
...what else there is for the device to do...
(value,) = norm.read()
"""

from __future__ import annotations

import torch


class Arrival:
    """A copy of a tensor that has begun; `read` waits for it alone, and for nothing that the device was given since.

    Args:
        values: (N,) on any device.
    """

    def __init__(self, values: torch.Tensor):
        self._values = values.detach().to("cpu", non_blocking=True)  # into pinned memory
        self._event = None
        if values.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list:
        """N numbers."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


__all__ = ["Arrival"]
