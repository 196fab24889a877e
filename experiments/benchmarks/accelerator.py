# SPDX-License-Identifier: Apache-2.0
"""All that one wants to know of a card, in one command of at most eight minutes.

    OUT=results python experiments/benchmarks/accelerator.py [--seconds=480] [--only=decode_32,step]

Writes JSON lines to $OUT/accelerator.jsonl (and to the terminal) as they come: a killed run keeps
what it has. Every section runs in a process of its own, in the order of importance, so that a
crash, a full memory or a long compilation costs that section alone, and `peak_gib` is its own.
Needs jax, flax, optax and numpy; the model is the shape of Qwen3-1.7B in bfloat16 with random
weights, the batch that of experiments/paper/recipe.gin. `--tiny` is a dry run of small shapes.

share_of_floor: least time to read weights and cache once a token, at the copy bandwidth measured
here, over the time taken. mfu: floating-point operations that the mathematics needs (`needed`,
recomputation not counted) per second, over the rate of the largest matrix product measured here.
The random model never stops: every completion has all its tokens, longer than a real run's.
"""

import argparse
import functools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from on_card.measuring import TINY, Lines, Sizes  # noqa: E402
from on_card.reading import card, decode, kernels, loss  # noqa: E402
from on_card.training import step, update_of  # noqa: E402

SECTIONS = {  # in the order of importance
    "card": card,
    "kernels": kernels,
    "decode_32": functools.partial(decode, 32),
    "update_lora": functools.partial(update_of, False),
    "step": step,
    "decode_256": functools.partial(decode, 256),
    "update_full": functools.partial(update_of, True),
    "loss": loss,
}


def run_all(args, folder):
    """Every section in its own process, until the time is up; a failed one becomes a line."""
    deadline = time.monotonic() + args.seconds
    # Full fine-tuning needs more than the three quarters that JAX takes of a GPU's memory.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} | os.environ | {"OUT": str(folder)}
    for name in args.only.split(",") if args.only else SECTIONS:
        lines, left = Lines(folder / "accelerator.jsonl", name), deadline - time.monotonic()
        if left < 10:
            lines(error="no time left")
            continue
        command = [sys.executable, __file__, f"--section={name}"] + ["--tiny"] * args.tiny
        start = time.monotonic()
        try:
            status = subprocess.run(command, env=environment, timeout=left).returncode
        except subprocess.TimeoutExpired:
            status = "cut off: the time is up"
        if status:
            lines(error=f"the section's process ended with {status}")
        lines(section_s=math.ceil(time.monotonic() - start))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=480, help="for everything")
    parser.add_argument("--only", default="", help="sections, comma between")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a dry run")
    parser.add_argument("--section", choices=list(SECTIONS), help="one, in this process")
    args = parser.parse_args()
    folder = Path(os.environ.get("OUT", "."))
    folder.mkdir(parents=True, exist_ok=True)
    if unknown := set(filter(None, args.only.split(","))) - set(SECTIONS):
        raise SystemExit(f"--only={args.only}: no section {unknown}; {', '.join(SECTIONS)}")
    if not args.section:
        return run_all(args, folder)
    lines = Lines(folder / "accelerator.jsonl", args.section)
    lines.guarded("all", SECTIONS[args.section], TINY if args.tiny else Sizes(), lines)


if __name__ == "__main__":
    main()
