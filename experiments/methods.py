# SPDX-License-Identifier: Apache-2.0
"""Every method of experiments/methods/ on the quickstart's world, on equal terms: table and figure.

    python experiments/methods.py --out=runs/methods [--seeds=3] [--only=sdft,grpo]

As `compare.py`, whose tables these are: three learning rates on seed 0, the best of which is run
with other seeds, 60 steps of 64 completions each. Methods that need another world or a teacher
that is another model are left out, and named. Finished runs are kept below --out.
"""

import argparse
import importlib.util
import re
import sys
from pathlib import Path

from compare import STUDIES, Method, Study, write_study

from opsd_jax.errors import UserError
from opsd_jax.run.config import load_experiment
from opsd_jax.run.testbed_base import TestbedBase

HERE = Path(__file__).parent
NUM_STEPS = 60
FIRST = "OPSD (quickstart)"


def title(path: Path) -> str:
    """What the header calls a method: its first line up to a bracket, comma or colon."""
    line = path.read_text(encoding="utf-8").splitlines()[0]
    return re.split(r"[(,:]", line.removeprefix("#").strip())[0].strip()


def methods(only: list[str]) -> tuple[dict[str, Method], list[str]]:
    """(title -> what runs on the quickstart's world, names of what does not)."""
    paths = sorted((HERE / "methods").glob("*.gin"))
    unknown = set(only) - {path.stem for path in paths}
    if unknown:
        raise UserError(f"--only: experiments/methods/ has no {', '.join(sorted(unknown))}")
    found, left_out = {FIRST: Method("quickstart.gin", NUM_STEPS, 4)}, []
    for path in paths:
        if only and path.stem not in only:
            continue
        experiment, _ = load_experiment([str(path)])
        if isinstance(experiment.train.model, TestbedBase) and experiment.teacher.model is None:
            found[title(path)] = Method(f"methods/{path.name}", NUM_STEPS, 4)
        else:
            left_out.append(path.stem)
    return found, left_out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3, help="besides seed 0, which tunes")
    parser.add_argument("--only", default="", help="names of gin files, with commas")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:  # Told before the hours of training.
        parser.exit(2, "the figure needs matplotlib: pip install '.[plot]'\n")
    found, left_out = methods([name for name in arguments.only.split(",") if name])
    if left_out:
        print(f"not on this world: {', '.join(left_out)}\n")
    study = Study(
        methods=found,
        rates=[3e-4, 1e-3, 3e-3],
        levels=[0.9],
        budgets=[10_000, 30_000, 60_000],
        seed_bindings=STUDIES["quickstart"].seed_bindings,
    )
    write_study(study, arguments.seeds, arguments.out.resolve())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
