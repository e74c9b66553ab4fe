"""Facts that the processes of a run agree on once in a step, in the message that also adds up their losses."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bardlet.runtime.distributed import Dist
from bardlet.runtime.signals import StopRequest


class Together:
    """A signal, the clock's new number of steps, and weights that are not finite, known to all processes.

    A process alone knows them at once. Of several, each sends what it knows with the loss of a step, so all know it
    after that step.
    """

    def __init__(self, dist: Dist) -> None:
        self.dist = dist
        self.faulty: list[int] = []
        """The ranks whose weights were not finite before the last step."""
        self._own_fault, self._rows = False, torch.empty(0)
        self._signal = self._steps = self._asked = 0

    def stop(self, request: StopRequest) -> int:
        """Return the number of a signal that any process got; 0 if none did."""
        return request.number if self.dist.world == 1 else self._signal

    def heard(self, number: int = 0) -> None:
        """Note the number of a signal that all processes learned of during an evaluation."""
        self._signal = self._signal or number

    def steps(self, replan: Callable[[], int | None]) -> int:
        """Return the new number of planned steps by the clock of rank 0 (`replan`); 0: no change."""
        if self.dist.world == 1:
            return replan() or 0
        agreed, self._steps = self._steps, 0
        self._asked = 0 if agreed else replan() or self._asked
        return agreed

    def report_weights(self, finite: bool) -> None:
        """Tell whether this process's weights are finite after an update."""
        self._own_fault = not finite
        if self.dist.world == 1:
            self.faulty = [0] * self._own_fault

    def add_up(self, own: torch.Tensor, request: StopRequest) -> torch.Tensor:
        """Return the sums over all ranks of their vectors `own`, and send everything else, which `read` receives."""
        known = torch.tensor([request.number, self._asked, self._own_fault], dtype=own.dtype, device=own.device)
        self._rows = self.dist.gather(torch.cat((own, known)))
        return self._rows[:, : len(own)].sum(0)

    def read(self) -> None:
        """Take note of what the others sent in the last step."""
        if self.dist.world > 1:
            rows = self._rows[:, -3:].cpu()
            self._signal, self._steps = int(rows[:, 0].max()), int(rows[0, 1])
            self.faulty = rows[:, 2].nonzero().flatten().tolist()
