"""The threads that compute: one set of workers for each thread, ended when it is done."""

from __future__ import annotations

import psutil
import pytest
import torch

from loadstone.quantization.kernels.openmp import end_workers, openmp_symbols


@pytest.mark.skipif(not openmp_symbols(), reason="torch brings no GNU OpenMP here")
def test_a_thread_that_is_done_keeps_no_workers() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        torch.ones(1 << 20).exp()
        working = psutil.Process().num_threads()
        end_workers()
        assert psutil.Process().num_threads() == working - 2
        assert torch.ones(1 << 20).exp().sum() > 0  # they come back when needed
    finally:
        torch.set_num_threads(before)
