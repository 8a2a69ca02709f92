"""Tests by bench/faults.py that one of two processes may die or hang: each waits for torchrun."""

from __future__ import annotations

import pytest

from bench import faults
from helpers import nothing_lost


@pytest.fixture(scope="module")
def site(corpus, tmp_path_factory):
    """Where the runs lie; the undisturbed run is made once."""
    return faults.Site(tmp_path_factory.mktemp("ranks"), corpus, forks=True)


@pytest.mark.parametrize("mode", ["killed", "stopped", "restarted"])
def test_a_rank_that_dies_or_hangs_ends_the_others_or_is_started_again(site, mode):
    """Dead, silent beyond TIMEOUT_SECONDS, and dead under torchrun's --max-restarts."""
    nothing_lost(faults.ranks(site, 1, seed=1, modes=[mode]), 1)
