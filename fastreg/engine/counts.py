"""How often each parameter has been stepped, and whether the latest step was."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Counts:
    """`state["step"]` of many parameters: views of one tensor per place, which is counted up at once.

    Args:
        counts: Of each parameter.
        places: The device that counts for each (`capturable`); `None` where the host does.
    """

    def __init__(self, counts: list[float], places: list[torch.device | None]) -> None:
        own = [c for c, place in zip(counts, places, strict=True) if place is None]
        self._host = torch.tensor(own, dtype=torch.float32, device="cpu")
        self._devices: dict[torch.device, Tensor] = {}
        taken: dict[torch.device | None, Iterator[Tensor]] = {None: iter(self._host.unbind())}
        for place in dict.fromkeys(place for place in places if place is not None):
            own = [c for c, other in zip(counts, places, strict=True) if other == place]
            self._devices[place] = torch.tensor(own, dtype=torch.float32, device=place)
            taken[place] = iter(self._devices[place].unbind())
        self.views = [next(taken[place]) for place in places]
        self._places = places

    def on_host(self) -> list[float]:
        """The counts that the host keeps, whole numbers; 0 where it does not."""
        if not self._devices:
            return self._host.tolist()
        counts = iter(self._host.tolist())
        return [next(counts) if place is None else 0.0 for place in self._places]

    def add(self, flags: dict[torch.device, Tensor]) -> None:
        """Count a step: on a device unless it is skipped there, on the host in any case."""
        self._host.add_(1)
        for device, counts in self._devices.items():
            counts.add_(1 - flags[device].float() if device in flags else 1)

    def take_back(self) -> None:
        """The host's latest count was of a step that did not take place."""
        self._host.sub_(1)


class Verdict:
    """Whether a step was skipped: the device says so later, and nobody waits for it until the next step.

    Args:
        flag: `[1]`; not 0: skipped.
        counts: What has counted the step.
        report: Whether a skipped step is an error.
    """

    def __init__(self, flag: Tensor, counts: Counts, report: bool) -> None:
        self._counts, self.report = counts, report
        self._skipped: bool | None = None
        self._flag, self._event = flag, None
        if flag.device.type == "cpu":
            self.skipped()
        elif flag.device.type == "cuda":
            self._flag = torch.empty(flag.shape, dtype=flag.dtype, device="cpu", pin_memory=True)
            self._flag.copy_(flag, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(flag.device))

    def skipped(self) -> bool:
        """Waits for the device, and corrects the host's count the first time it is asked."""
        if self._skipped is None:
            if self._event is not None:
                self._event.synchronize()
            self._skipped = bool(self._flag.item())
            if self._skipped:
                self._counts.take_back()
        return self._skipped
