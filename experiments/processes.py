# SPDX-License-Identifier: Apache-2.0
"""The runs of a study, each in a process of its own, several at a time.

A process has its share of the cores and ends with its run, so that programs and memory of a
hundred runs do not add up.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from opsd_jax.errors import UserError

Job = tuple[Callable[..., Any], tuple[Any, ...]]  # a function of a module, and what it is given


def shares(num: int) -> list[set[int]]:
    """The cores of this process in `num` sets; empty ones where a system does not tell them."""
    if not hasattr(os, "sched_getaffinity"):
        return [set()] * num
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[i::num]) or set(cores) for i in range(num)]


def keep_programs(out: Path) -> None:
    """Compiled programs are kept in OUT/compiled, by this process and by those that it starts."""
    jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(out / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def in_processes(jobs: Sequence[Job], num: int, log: Path) -> None:
    """Calls each job, `num` at a time, in the order given; tells how many are done.

    Args:
      jobs: what is called for its files alone.
      num: processes at a time.
      log: where all that they print is added.

    Raises:
      UserError: a job failed, which no other is started after.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    waiting, running, failed = deque(enumerate(jobs)), set(), []
    context, lock, start = multiprocessing.get_context("spawn"), threading.Lock(), time.monotonic()

    def work(cores: set[int]) -> None:
        while True:
            with lock:
                if failed or not waiting:
                    return
                number, (function, given) = waiting.popleft()
                child = context.Process(target=_alone, args=(cores, log, function, given))
                child.start()
                running.add(child)
            child.join()
            running.discard(child)
            name = " ".join(str(value) for value in given if not isinstance(value, Path))
            if child.exitcode:
                failed.append(f"{name} ended with status {child.exitcode}")
            minutes = (time.monotonic() - start) / 60
            print(f"{number + 1} of {len(jobs)}: {name} ({minutes:.0f} min)", flush=True)

    def end(*_: Any) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        with ThreadPoolExecutor(num) as threads:
            found = threads.map(work, shares(num))
            try:
                list(found)
            except BaseException:
                with lock:
                    waiting.clear()
                for child in running.copy():
                    child.terminate()  # A run saves, as it does whenever it is told to end.
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if failed:
        raise UserError(f"{'; '.join(failed)}: see {log}; the same command goes on from there")


def _alone(cores: set[int], log: Path, function: Callable[..., Any], given: tuple) -> None:
    os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which ends its processes one by one.
    if cores:
        os.sched_setaffinity(0, cores)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        function(*given)
    except UserError as error:
        sys.exit(str(error))
