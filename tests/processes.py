"""Several processes: scripts started as launchers do, and what DDP exchanges between them."""

import os
import subprocess
import sys

import torch


def start(pytestconfig, *arguments, processes=2, timeout=300, monitor_interval=0.1):
    """Run a script on several processes. (On CPUs `accelerate launch` starts several through MPI alone.)

    Every `monitor_interval` seconds the launcher looks whether one has ended, and if it failed ends the others.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launch += ["--monitor-interval", str(monitor_interval)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(pytestconfig.rootpath),
    }
    return subprocess.run([sys.executable, *launch, *map(str, arguments)], cwd=pytestconfig.rootpath, timeout=timeout,
                          capture_output=True, text=True, env=environment)  # fmt: skip


def exchanged(wrapped):
    """Return a list that gets the size of each bucket of gradients which a DDP model exchanges."""
    sizes = []

    def hook(state, bucket):
        sizes.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, hook)
    return sizes
