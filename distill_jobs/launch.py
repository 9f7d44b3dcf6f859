"""Starts the processes of one trainer on this machine: `python -m distill_jobs.launch JOB_FOLDER --processes=N …`.

What `torchrun` does, with the exit codes of one trainer, and with its options for several machines: there one launcher
runs on each, and they meet at the first (`--nodes --node-rank --master`). It starts nothing again: the keeper does,
which counts whether a trainer gets further. Everything dies with the service, for its processes die with it and it
with the service, or where it runs in a pod, with the pod.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distill_jobs.exit_codes import FAILURE, FINISHED, PAUSED, REFUSED
from engines.lifetime import die_with

_LOOPBACK = "127.0.0.1"
_MEET_WITHIN_S = 1800  # nodes may have to be made, and images to be pulled


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1, help="of all processes together; each has one at least")
    parser.add_argument("--parent", type=int, default=0)
    parser.add_argument("--nodes", type=int, default=1, help="machines, each of which has `processes`")
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--master", default="", help="host:port of the first machine, where several meet")
    args, rest = parser.parse_known_args(argv)
    die_with(args.parent)
    refusal, began_s = args.folder / FAILURE, time.time()
    own = [str(args.folder), f"--threads={max(1, args.threads // args.processes)}", f"--parent={os.getpid()}"]
    try:
        elastic_launch(_config(args), sys.executable)("-m", "distill_jobs.train", *rest, *own)
    except SignalException:
        return PAUSED
    except ChildFailedError as error:
        if refusal.exists() and refusal.stat().st_mtime >= began_s:
            return REFUSED  # the leader wrote it and left; who lost it in the middle of a sum may have ended first
        return _code([failure.exitcode for failure in error.failures.values()])
    return FINISHED


def _config(args: argparse.Namespace) -> LaunchConfig:
    alone = args.nodes == 1
    if alone:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return LaunchConfig(
        min_nodes=args.nodes,
        max_nodes=args.nodes,
        nproc_per_node=args.processes,
        run_id="train",
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint=f"{_LOOPBACK}:0" if alone else args.master,
        rdzv_configs={} if alone else {"rank": args.node_rank, "timeout": _MEET_WITHIN_S},
        local_addr=_LOOPBACK if alone else None,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )


def _code(codes: list[int]) -> int:
    """One code of several that ended: who refuses has said why. A signal is 128 + its number, as shells have it."""
    code = REFUSED if REFUSED in codes else codes[0]
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
