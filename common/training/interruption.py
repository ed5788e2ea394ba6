"""Ctrl-C and SIGTERM while a run goes: finish the step, save, say how to go on."""

import os
import signal
import sys
import threading

from common.errors import Interrupted
from common.runtime import Runtime


class Interruption:
    """Notes the first SIGINT or SIGTERM instead of ending the process; used as a context.

    A second one ends it at once, but not with several processes: they leave together, after a step
    or a batch, for one that left alone would keep the others waiting. torchrun gives them 30
    seconds.
    """

    def __init__(self, runtime: Runtime, way_on: str):
        self.runtime, self.way_on = runtime, way_on
        self.received: int | None = None

    def __enter__(self):
        # Python lets no other thread handle signals
        if threading.current_thread() is threading.main_thread():
            self.before = {
                number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_):
        for number, handler in getattr(self, "before", {}).items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame):
        repeated, self.received = self.received is not None, self.received or number
        if self.runtime.world_size > 1:
            return
        if repeated:
            raise KeyboardInterrupt
        # print is not reentrant
        os.write(
            sys.stderr.fileno(),
            f"\n{signal.Signals(number).name}: saving after this step; once more ends at once\n".encode(),
        )

    def requested(self) -> bool:
        """Tell whether any process was asked to stop; every process must ask at the same place."""
        self.received = self.runtime.all_reduce_max(self.received or 0) or None
        return self.received is not None

    def end(self):
        """Raise Interrupted, with the way to go on and the exit code of the signal."""
        raise Interrupted(
            f"stopped by {signal.Signals(self.received).name}; {self.way_on}", 128 + self.received
        )

    def check(self):
        """End if any process was asked to stop: between the batches of an evaluation, which
        changes nothing that a checkpoint holds.
        """
        if self.requested():
            self.end()
