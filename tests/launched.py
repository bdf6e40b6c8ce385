"""Runs a function in the processes of one launch, forked from this one: libraries are loaded already."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch._dynamo  # noqa: F401  # an optimizer's first step loads it, in each process
from accelerate.state import AcceleratorState


def two(work: Callable[[], object], log: Path, world: int = 2, **environment: str) -> list[int]:
    """Exit statuses of `work` by rank; what they say goes to `log`, by rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                sys.stdout = sys.stderr = log.with_name(f"{log.name}.{rank}").open("w")
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
                os.environ |= environment
                AcceleratorState._reset_state(reset_partial_state=True)
                work()
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
