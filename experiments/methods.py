# SPDX-License-Identifier: Apache-2.0
"""Every method of experiments/methods/ on the quickstart's world, on equal terms: table and figure.

    python experiments/methods.py --out=runs/methods [--seeds=3] [--only=sdft,grpo]

As `compare.py`, whose tables these are: three learning rates on seed 0, the best of which is run
with other seeds, 60 steps of 64 completions each. The base of all is also taught to read an answer
in its own notation and, where a method's file asks for it, feedback. Methods that need another
world or a teacher that is another model are left out, and named. Finished runs are kept below
--out.
"""

import re
from pathlib import Path

import command
from compare import STUDIES, Method, Study, draw_group, panels, write_study

from opsd_jax.evaluation.runs import Group
from opsd_jax.run.config import load_experiment
from opsd_jax.run.testbed_base import TestbedBase

HERE = Path(__file__).parent
NUM_STEPS, EVERY = 60, 6
FIRST = "OPSD (quickstart)"


def title(path: Path) -> str:
    """What the header calls a method: its first line up to a bracket, comma or colon."""
    line = path.read_text(encoding="utf-8").splitlines()[0]
    return re.split(r"[(,:]", line.removeprefix("#").strip())[0].strip()


def methods(only: list[str]) -> tuple[dict[str, Method], list[str]]:
    """(title -> what runs on the quickstart's world, names of what does not)."""
    paths = sorted((HERE / "methods").glob("*.gin"))
    command.check_names("--only", only, [path.stem for path in paths])
    found, left_out = {FIRST: Method("quickstart.gin", NUM_STEPS, EVERY)}, []
    for path in paths:
        if only and path.stem not in only:
            continue
        experiment, _ = load_experiment([str(path)])
        if isinstance(experiment.train.model, TestbedBase) and experiment.teacher.model is None:
            found[title(path)] = Method(f"methods/{path.name}", NUM_STEPS, EVERY)
        else:
            left_out.append(path.stem)
    return found, left_out


def bindings(seed: int, out: Path) -> list[str]:
    """The base of a seed, which reads siblings; what tuning does not need is off."""
    return [
        *STUDIES["quickstart"].seed_bindings(seed, out),
        "WarmStart.answer_rows = 24",
        "train/ChainArithmetic.num_problems = 4096",  # 60 steps ask at most 3,840
        "train.probes = ()",
        *(["evaluate.roles = ('student',)"] if seed == 0 else []),
    ]


def draw(groups: list[Group], path: Path) -> None:
    """A panel for each method, and OPSD in grey in all of them."""
    first, *others = groups
    columns = 5
    num_rows = -(-len(others) // columns)
    figure, grid = panels(
        *(num_rows, columns),
        font_size=9,
        figsize=(2.1 * columns, 1.6 * num_rows + 0.5),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axes, group in zip(grid.flat, others, strict=False):
        draw_group(axes, first, color="0.6", lw=1)
        draw_group(axes, group)
        axes.set_title(group.label, fontsize=9)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k")
        axes.set_ylim(0, 1.02)
    for axes in grid.flat[len(others) :]:
        axes.set_visible(False)
    figure.supxlabel(f"tokens trained on (grey: {first.label})")
    figure.supylabel("held-out accuracy")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = command.parser(3, tunes=True)
    parser.add_argument("--only", default="", help="names of gin files, with commas")
    arguments = parser.parse_args()
    command.require_matplotlib()
    found, left_out = methods([name for name in arguments.only.split(",") if name])
    if left_out:
        print(f"not on this world: {', '.join(left_out)}\n")
    study = Study(
        methods=found,
        rates=[3e-4, 1e-3, 3e-3],
        levels=[0.9],
        budgets=[10_000, 30_000, 60_000],
        seed_bindings=bindings,
    )
    write_study(study, arguments.seeds, Path(arguments.out).resolve(), draw)


if __name__ == "__main__":
    command.call(main)
