"""torchrun, with forks of itself as its workers.

It runs in a fork of the server of tests/forking.py, so nobody has to import torch again, and it
waits 5 seconds instead of 30 for a worker that SIGTERM does not end. Everything else is torchrun's
own: arguments, rendezvous, restarts, signals, exit code.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import forking
from torch.distributed import run
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.multiprocessing.spawn import ProcessContext


def work(*words: str) -> None:
    """Run the script in a worker; `words` are what torchrun would give to a new interpreter."""
    sys.argv = [word for word in words if word != "-u"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    leave_at_once, os._exit = os._exit, sys.exit  # torchrun waits for what this function returns
    code = forking.run_script()
    os._exit = leave_at_once
    if code:
        sys.exit(code)


def launch(config: LaunchConfig, entrypoint: str) -> elastic_launch:
    config.start_method = "fork"
    return elastic_launch(config, work)


join = ProcessContext._join_procs_with_timeout
ProcessContext._join_procs_with_timeout = lambda self, timeout: join(self, min(timeout, 5))
run.elastic_launch = launch
run.main()
