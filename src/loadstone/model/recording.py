"""Functions on a CUDA device, recorded as graphs and replayed: one call from Python instead of hundreds.

Knows nothing of decoding. What a recorded function reads and writes outside itself must stay where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from loadstone.telemetry import emit


class Recording:
    """A recorded function and its result, which each replay writes anew."""

    def __init__(self, graph: torch.cuda.CUDAGraph, result: torch.Tensor) -> None:
        self._graph, self._result = graph, result

    def __call__(self) -> torch.Tensor:
        self._graph.replay()
        return self._result


class Recorder:
    """Records functions for one device; all that it recorded share a pool of memory, so one is to run at a time."""

    def __init__(self, device: torch.device) -> None:
        self.can_record = device.type == "cuda"
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def record(self, run: Callable[[], torch.Tensor]) -> Recording | None:
        """Run a function once as it is, then record it; None, and a warning the first time, where that cannot be."""
        if not self.can_record:
            return None
        self._warm_up(run)
        try:
            return self._recorded(run)
        except RuntimeError as error:  # a function that waits for the device, or a driver that knows no graphs
            first = error.__context__ or error  # the end of a recording that has failed fails too
        self.can_record = False
        emit("graphs.warning", reason=_first_line(first), instead="the calls of each step, one by one")
        return None

    def _warm_up(self, run: Callable[[], torch.Tensor]) -> None:
        """Let libraries make what they make on first use, which cannot be recorded."""
        here = torch.cuda.current_stream(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):  # and the device that it is on
            run()
        here.wait_stream(self._stream)

    def _recorded(self, run: Callable[[], torch.Tensor]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Other threads may load a model meanwhile: what they ask of the device is not to spoil this.
        recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        # The outer one goes back to this stream also when a recording fails, which leaves its own in force.
        with torch.cuda.stream(torch.cuda.current_stream(self._device)), recording:
            result = run()
        return Recording(graph, result)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
