# SPDX-License-Identifier: Apache-2.0
"""A process in which code or data of others is at work, under limits on time, memory and effects.

It has no device, little memory and no way to write files or start programs by ordinary means, and
it is killed when time is up. Used for graders (`grader_pool`) and chat templates.
"""

import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, Pipe

_START_LIMIT_S = 120.0  # for imports; a busy host can take long over them
_BOOT = "from opsd_jax.data import worker; worker.serve({fd}, {limit_s!r}, {memory_bytes})"
_REFUSED_EVENTS = frozenset(
    "os.system os.exec os.posix_spawn os.spawn os.fork os.forkpty os.kill os.killpg os.remove "
    "os.rename os.rmdir os.mkdir os.link os.symlink os.truncate os.chmod os.chown os.putenv "
    "pty.spawn subprocess.Popen socket.connect socket.bind socket.sendto shutil.rmtree "
    "shutil.move ctypes.dlsym ctypes.call_function".split()
)


class Worker:
    """One child process and the pipe to it.

    Args:
      time_limit_s: for one answer; told to the child, which ends itself should the parent be gone.
      memory_bytes: address space of the child; past it there is a MemoryError.
      max_reply_bytes: a longer reply ends the child.
    """

    def __init__(self, time_limit_s: float, memory_bytes: int, max_reply_bytes: int):
        self.timed_out = False
        self._max_reply_bytes = max_reply_bytes
        self._pipe, child_end = Pipe()
        boot = _BOOT.format(fd=child_end.fileno(), limit_s=time_limit_s, memory_bytes=memory_bytes)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", boot],
            pass_fds=[child_end.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends its workers
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "JAX_PLATFORMS": "cpu",  # the accelerator belongs to the parent
            },
        )
        child_end.close()

    def load(self, pickled: bytes) -> None:
        """Sends what answers: a function (message) -> reply, both bytes, maybe with `warm_up()`."""
        ready = self.ask(pickled, _START_LIMIT_S)
        if ready != b"ready":
            self.kill()
            reason = ready.decode(errors="replace") if ready else "the process ended"
            raise RuntimeError(f"A worker process could not start: {reason}")

    def ask(self, message: bytes, limit_s: float) -> bytes | None:
        """The reply, or None once the worker is dead, which the limit makes sure of.

        The limit covers sending too: a worker may be too busy to read.
        """
        timer = threading.Timer(limit_s, self._time_out)
        timer.start()
        try:
            self._pipe.send_bytes(message)
            reply = self._pipe.recv_bytes(self._max_reply_bytes)
        except (OSError, EOFError):
            reply = None
        timer.cancel()
        timer.join()  # or it might still kill the worker under the next question
        if reply is None or self.timed_out:
            self.kill()
            return None
        return reply

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _time_out(self) -> None:
        self.timed_out = True
        self._process.kill()


def serve(fd: int, time_limit_s: float, memory_bytes: int) -> None:
    """The child's life: read what answers, then answer one message after the other to the end."""
    pipe = Connection(fd)
    try:
        answer = pickle.loads(pipe.recv_bytes())
        getattr(answer, "warm_up", lambda: None)()
    except EOFError:
        return
    except Exception as error:
        pipe.send_bytes(describe(error).encode())
        return
    logging.disable()  # what a scorer thinks of hostile text is no news to the user
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_refuse)
    pipe.send_bytes(b"ready")
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        # The parent keeps the limit; should it be gone, the kernel ends a runaway orphan.
        signal.setitimer(signal.ITIMER_REAL, 2 * time_limit_s)
        pipe.send_bytes(answer(message))
        signal.setitimer(signal.ITIMER_REAL, 0)


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _refuse(event: str, args: tuple) -> None:
    """Audit hook: no files written, no programs started, no connections. A fence, not a jail."""
    if event in _REFUSED_EVENTS or (event == "open" and _writes(args)):
        raise PermissionError(f"a worker may not use {event}")


def _writes(open_args: tuple) -> bool:
    _, mode, flags = open_args
    if isinstance(mode, str) and set(mode) & set("wax+"):
        return True
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
