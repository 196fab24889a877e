# SPDX-License-Identifier: Apache-2.0
"""A run of two processes that is killed again and again, against one that nothing disturbs.

    python experiments/benchmarks/soak.py --minutes=60 [--seconds=60] [--seed=0] [--workdir=DIR]
        [--gin_file=F] [--gin_bindings=B ...]

Both processes are on this machine, one CPU device each. Up to --seconds after they have joined and
restored, compiling or anywhere within a step, one of them or both get SIGTERM or kill -9, by a
generator that --seed starts; the same command then starts them again. When the minutes are over,
the run goes on in peace to a step a little further, and another one does all steps without a
signal. Their metrics (but for seconds), samples, and the checksums of all arrays and of the data
position in the last checkpoint must be equal; exit status 1 if they are not, or if a process ends
in another way than it should or not within --patience seconds.

By default a random model of 1 layer in the quickstart's world, which does several steps a second.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from opsd_jax.host.checkpoint_record import read_record
from opsd_jax.host.files import read_metrics
from opsd_jax.host.watchdog import AGAIN

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "train.model = @RandomModel()",
    "RandomModel.config = @ModelConfig()",
    "ModelConfig.vocab_size = 37",
    "ModelConfig.num_layers = 1",
    "ModelConfig.embed_dim = 32",
    "ModelConfig.num_heads = 2",
    "ModelConfig.num_kv_heads = 1",
    "ModelConfig.head_dim = 16",
    "ModelConfig.mlp_dim = 64",
    "train.batch_size = 16",
    "train.eval_every_steps = 50",
    "train.probes = ()",
    "evaluate.num_problems = 64",
    "teacher.weights = 'ema'",
)
TIMED = ("wall_s", "time/", "chip/", "goodput/")
# 134: JAX itself ended a process because another one was lost.
MAY_END = {AGAIN, -signal.SIGABRT, -signal.SIGKILL}
FURTHER = 10  # steps in peace at the end


class Blow(NamedTuple):
    """signal: its name; to: which processes; statuses: how they ended; stop_s: until the last had;
    lost: steps that were logged and are done again."""

    signal: str
    to: str
    statuses: tuple[int, ...]
    stop_s: float
    lost: int


class Pair:
    """Two processes of one run, started; their standard error goes to files."""

    def __init__(self, flags: Sequence[str], workdir: Path, num_steps: int):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{listener.getsockname()[1]}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        }
        command = [sys.executable, "-m", "opsd_jax", "train", *flags, f"--workdir={workdir}"]
        command += [f"--gin_bindings=train.num_steps = {num_steps}", f"--stopped_status={AGAIN}"]
        command += [f"--coordinator={address}", "--num_processes=2"]
        logs = [workdir.with_suffix(f".{index}.log") for index in (0, 1)]
        self.log = logs[0]
        self.children = []
        for index, log in enumerate(logs):
            with log.open("w") as file:
                child = subprocess.Popen(
                    [*command, f"--process_id={index}"],
                    env=environment,
                    cwd=ROOT,
                    stdout=subprocess.DEVNULL,
                    stderr=file,
                )
            self.children.append(child)

    def wait_until_started(self) -> None:
        """Returns once process 0 has said from which step it goes on, or one has ended."""
        while ", from step " not in self.log.read_text():
            if any(child.poll() is not None for child in self.children):
                return
            time.sleep(0.1)

    def ended(self, patience: float | None = None) -> tuple[int, ...]:
        """The exit status of both, once they have; both are gone then, however this returns."""
        deadline = None if patience is None else time.monotonic() + patience
        try:
            for child in self.children:
                child.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
            return tuple(child.returncode for child in self.children)
        except subprocess.TimeoutExpired:
            sys.exit(f"a process goes on {patience:g} s after the other got a signal: {self.log}")
        finally:
            for child in self.children:
                child.kill()


def last_step(workdir: Path) -> int:
    return max((line["step"] for line in read_metrics(workdir / "metrics.jsonl")), default=0)


def saved_step(workdir: Path) -> int:
    steps = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    return max(steps, default=0)


def disturb(flags: Sequence[str], workdir: Path, args: argparse.Namespace) -> list[Blow]:
    """Starts the run and stops it by a signal until the minutes are over."""
    draw, blows = random.Random(args.seed), []
    end = time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        pair = Pair(flags, workdir, num_steps=10**9)
        pair.wait_until_started()
        time.sleep(draw.uniform(0, args.seconds))
        if any(child.poll() is not None for child in pair.children):
            sys.exit(f"ended without a signal, with {pair.ended(args.patience)}: {pair.log}")
        number = draw.choice([signal.SIGTERM, signal.SIGKILL])
        targets = draw.choice([(0,), (1,), (0, 1)])
        start = time.monotonic()
        to = "both" if len(targets) == 2 else f"process {targets[0]}"
        print(f"{number.name} to {to} after step {last_step(workdir)}: ", end="", flush=True)
        for index in targets:
            pair.children[index].send_signal(number)
        statuses = pair.ended(args.patience)
        lost = last_step(workdir) - saved_step(workdir)
        blow = Blow(number.name, to, statuses, time.monotonic() - start, max(0, lost))
        print(f"{statuses} after {blow.stop_s:.1f} s, {blow.lost} steps lost", flush=True)
        if not set(statuses) <= MAY_END or (number == signal.SIGTERM and lost > 0):
            sys.exit(f"should have saved and ended with {AGAIN}: {pair.log}")
        blows.append(blow)
    return blows


def finish(flags: Sequence[str], workdir: Path, num_steps: int) -> float:
    """Seconds of the run to its end, in peace."""
    start = time.monotonic()
    pair = Pair(flags, workdir, num_steps)
    if (statuses := pair.ended()) != (0, 0):
        sys.exit(f"ended with {statuses} in place of 0: {pair.log}")
    return time.monotonic() - start


def differences(one: Path, other: Path, step: int) -> list[str]:
    """What is not equal in two runs."""

    def numbers(workdir: Path) -> list[dict]:
        lines = read_metrics(workdir / "metrics.jsonl")
        return [{k: v for k, v in x.items() if not k.startswith(TIMED)} for x in lines]

    def samples(workdir: Path) -> dict[str, str]:
        return {path.name: path.read_text() for path in (workdir / "samples").iterdir()}

    def record(workdir: Path) -> dict:
        return read_record(workdir / "checkpoints" / str(step))

    found = [
        f"{read.__name__} of the run" for read in (numbers, samples) if read(one) != read(other)
    ]
    records = record(one), record(other)
    return found + [
        f"{part} of the last step"
        for part in ("leaves", "data")
        if records[0][part] != records[1][part]
    ]


def table(blows: Sequence[Blow]) -> list[str]:
    lines = ["| signal | to | times | exit statuses | until both had ended | steps done again |"]
    lines.append("|---|---|---|---|---|---|")
    for key in sorted({blow[:2] for blow in blows}):
        these = [blow for blow in blows if blow[:2] == key]
        statuses = sorted({" and ".join(map(str, blow.statuses)) for blow in these})
        slowest = max(blow.stop_s for blow in these)
        lost = sum(blow.lost for blow in these)
        cells = (*key, len(these), "; ".join(statuses), f"at most {slowest:.1f} s", lost)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seconds", type=float, default=60, help="until a signal, at most")
    parser.add_argument("--patience", type=float, default=300, help="seconds from it to the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", help="kept; default a temporary one")
    parser.add_argument("--gin_file", default=str(ROOT / "experiments" / "quickstart.gin"))
    parser.add_argument("--gin_bindings", action="append", help="in place of the small model's")
    args = parser.parse_args()
    flags = [f"--gin_file={args.gin_file}"]
    flags += [f"--gin_bindings={binding}" for binding in args.gin_bindings or SMALL]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.workdir or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        soaked, whole = folder / "soaked", folder / "whole"
        blows = disturb(flags, soaked, args)
        num_steps = last_step(soaked) + FURTHER
        finish(flags, soaked, num_steps)
        seconds = finish(flags, whole, num_steps)
        print("\n".join(table(blows)))
        wrong = differences(soaked, whole, num_steps)
        print(
            f"{num_steps:,} steps in {args.minutes:g} minutes with {len(blows)} signals;", end=" "
        )
        print(
            f"without one in {seconds:.0f} s: "
            + ("; ".join(wrong) + " differ" if wrong else "equal")
        )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
