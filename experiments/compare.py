# SPDX-License-Identifier: Apache-2.0
"""OPSD against its baselines on equal terms: tokens to an accuracy, with table and figure.

    python experiments/compare.py --out=runs/compare [--study=quickstart|smollm2] [--seeds=5]

Every method gets the same tuning: one run at each learning rate of the study on seed 0, of which
the largest mean accuracy over its tokens wins. The table is of other seeds than that one, each
with a warm start of its own where the study has one; --seeds=0 takes the tuning runs themselves.
Finished runs are kept below --out and not repeated; OUT/table.md and OUT/compare.svg are written
at the end, which needs `pip install '.[plot]'`. With --seeds=0 the study smollm2 takes two CPU
cores about two hours.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import command
import jax
import numpy as np

from opsd_jax.evaluation.report import spread
from opsd_jax.evaluation.runs import ACCURACY, TOKENS, Group, Reach, Run, band, reach, token_ratio
from opsd_jax.run.config import load_experiment
from opsd_jax.run.train import train_whole

HERE = Path(__file__).parent
TEACHER = "eval/teacher/accuracy"


class Method(NamedTuple):
    """A gin file of experiments/, how long it trains and how often it is evaluated."""

    gin_file: str
    num_steps: int
    eval_every_steps: int


class Study(NamedTuple):
    """What is compared, OPSD first.

    seed_bindings: seed -> bindings of the base that this seed starts from, and where it is kept.
    """

    methods: dict[str, Method]
    rates: list[float]
    levels: list[float]
    budgets: list[int]
    seed_bindings: Callable[[int, Path], list[str]]


STUDIES = {
    "quickstart": Study(
        methods={
            "OPSD": Method("quickstart.gin", 60, 2),
            "GRPO": Method("methods/grpo.gin", 240, 8),
            "off-policy distillation": Method("baselines/off_policy.gin", 60, 2),
            "SFT on references": Method("methods/sft.gin", 60, 2),
        },
        rates=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
        levels=[0.7, 0.8, 0.9],
        budgets=[10_000, 30_000, 60_000, 250_000],
        seed_bindings=lambda seed, out: [
            "TestbedBase.warm_start = @WarmStart()",
            f"WarmStart.seed = {seed}",
            f"TestbedBase.cache_dir = '{out / 'bases'}'",
        ],
    ),
    "smollm2": Study(
        methods={
            "OPSD": Method("smollm2_letters.gin", 30, 5),
            "GRPO": Method("smollm2_letters_grpo.gin", 40, 10),
            "off-policy distillation": Method("smollm2_letters_off_policy.gin", 20, 5),
            "SFT on results": Method("smollm2_letters_sft.gin", 20, 5),
        },
        rates=[5e-4, 2e-3],
        levels=[0.2, 0.4, 0.6],
        budgets=[2_000, 4_000, 8_000],
        seed_bindings=lambda seed, out: ["evaluate.roles = ('student',)"],
    ),
}


def run(study: Study, method: Method, rate: float, seed: int, out: Path) -> Run:
    """Trains (or reads) one run."""
    workdir = out / f"{Path(method.gin_file).stem}_lr{rate:g}_seed{seed}"
    bindings = [
        f"train.seed = {seed}",
        f"train.learning_rate = {rate}",
        f"train.num_steps = {method.num_steps}",
        f"train.eval_every_steps = {method.eval_every_steps}",
        *study.seed_bindings(seed, out),
    ]
    experiment, text = load_experiment([str(HERE / method.gin_file)], bindings)
    found = train_whole(experiment, text, workdir)
    jax.clear_caches()  # The programs of a hundred runs would stay in memory.
    return found


def mean_accuracy(run: Run) -> float:
    """Held-out accuracy averaged over the tokens of a run."""
    tokens, accuracy = run.series(ACCURACY, TOKENS).T
    return float(np.trapezoid(accuracy, tokens) / (tokens[-1] - tokens[0]))


def tune(study: Study, out: Path) -> dict[str, float]:
    """method -> its best learning rate on seed 0; prints all of them."""
    print("mean accuracy over the tokens of a run (last accuracy), seed 0\n")
    print("| learning rate | " + " | ".join(f"{rate:g}" for rate in study.rates) + " |")
    print("|---" * (len(study.rates) + 1) + "|")
    best = {}
    for name, method in study.methods.items():
        runs = [run(study, method, rate, 0, out) for rate in study.rates]
        means = [mean_accuracy(each) for each in runs]
        cells = [
            f"{m:.3f} ({r.series(ACCURACY)[-1, 1]:.3f})" for m, r in zip(means, runs, strict=True)
        ]
        best[name] = study.rates[int(np.argmax(means))]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return best


def accuracy_at(run: Run, tokens: int) -> float | None:
    """Held-out accuracy after so many tokens, linear in between; None if the run was shorter."""
    x, y = run.series(ACCURACY, TOKENS).T
    return float(np.interp(tokens, x, y)) if tokens <= x[-1] else None


def accuracy_table(groups: list[Group], rates: dict[str, float], budgets: list[int]) -> list[str]:
    """Accuracy before, after each budget of tokens, and at the end; there the teacher's, too."""
    names = ["before", *(f"{budget:,} tokens" for budget in budgets), "at the end", "of tokens"]
    teachers = any(each.series(TEACHER).size for group in groups for each in group.runs)
    names += ["teacher at the end"] * teachers
    lines = ["| method | learning rate | " + " | ".join(names) + " |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for group in groups:
        cells = []
        for budget in [0, *budgets]:
            found = [accuracy_at(each, budget) for each in group.runs]
            cells.append(
                "" if None in found else spread([f for f in found if f is not None], ".3f")
            )
        cells.append(spread([each.series(ACCURACY)[-1, 1] for each in group.runs], ".3f"))
        cells.append(f"{statistics.mean(each.num_tokens for each in group.runs):,.0f}")
        if teachers:  # One whose context is made of a step's answers has no accuracy.
            last = [each.series(TEACHER)[-1, 1] for each in group.runs if each.series(TEACHER).size]
            cells.append(spread(last, ".3f") if last else "")
        lines.append(f"| {group.label} | {rates[group.label]:g} | " + " | ".join(cells) + " |")
    return lines


def reach_cell(found: Reach) -> str:
    if not found.num_runs:
        return "not measured"
    if not found.num_reached:
        return f"not in {found.at_least:,.0f}"
    missing = found.num_runs - found.num_reached
    return found.spread + (f" ({missing} of {found.num_runs} never)" if missing else "")


def ratio_cell(first: Reach, other: Reach) -> str:
    ratio = token_ratio(first, other)
    return "" if ratio is None else ("≥ " if ratio[1] else "") + f"{ratio[0]:.1f}"


def reach_table(groups: list[Group], levels: list[float]) -> list[str]:
    """Tokens to each level, and their ratio to those of the first group."""
    names = [f"tokens to {level:.2g} | × {groups[0].label}" for level in levels]
    lines = ["| method | " + " | ".join(names) + " |", "|---" * (2 * len(levels) + 1) + "|"]
    for group in groups:
        cells = []
        for level in levels:
            first, found = reach(groups[0], level), reach(group, level)
            cells += [reach_cell(found), ratio_cell(first, found)]
        lines.append(f"| {group.label} | " + " | ".join(cells) + " |")
    return lines


def draw(groups: list[Group], path: Path) -> None:
    """Accuracy against tokens, mean and standard deviation over the runs of each group."""
    figure, axes = panels(figsize=(7.2, 4.2))
    for group in groups:
        draw_group(axes, group)
    axes.set(xlabel="tokens trained on", ylabel="held-out accuracy", ylim=(0, 1.02))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, metadata={"Date": None})


def panels(*shape: int, font_size: int = 11, **options: Any) -> Any:
    """(figure, axes) of matplotlib, such that the same runs give the same file."""
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("svg")
    # Names that do not depend on the moment.
    plt.rcParams.update({"svg.hashsalt": "opsd", "svg.fonttype": "none", "font.size": font_size})
    figure, axes = plt.subplots(*shape, layout="constrained", **options)
    figure.patch.set_facecolor("white")
    return figure, axes


def draw_group(axes: Any, group: Group, **line: Any) -> None:
    """A curve and its band; `line` is how matplotlib draws it."""
    curves = [each.series(ACCURACY, TOKENS) for each in group.runs]
    rows = band(curves)
    x, mean, sd = (curves[0][:, 0], curves[0][:, 1], None) if rows is None else rows.T
    (drawn,) = axes.plot(x, mean, **({"label": group.label} | line))
    if sd is not None:
        axes.fill_between(x, mean - sd, mean + sd, color=drawn.get_color(), alpha=0.2, lw=0)


def write_study(
    study: Study,
    num_seeds: int,
    out: Path,
    draw: Callable[[list[Group], Path], None] = draw,
) -> None:
    """Runs what is missing of a study; writes OUT/table.md and, by `draw`, OUT/compare.svg."""
    jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
    rates = tune(study, out)
    seeds = range(1, 1 + num_seeds) if num_seeds else [0]
    groups = [
        Group(name, [run(study, method, rates[name], seed, out) for seed in seeds])
        for name, method in study.methods.items()
    ]
    tables = [*accuracy_table(groups, rates, study.budgets), ""]
    tables += reach_table(groups, study.levels)
    print("", *tables, sep="\n")
    (out / "table.md").write_text("\n".join(tables) + "\n", encoding="utf-8")
    draw(groups, out / "compare.svg")


def main() -> None:
    parser = command.parser(5, tunes=True)
    parser.add_argument("--study", choices=list(STUDIES), default="quickstart")
    arguments = parser.parse_args()
    command.require_matplotlib()
    write_study(STUDIES[arguments.study], arguments.seeds, Path(arguments.out).resolve())


if __name__ == "__main__":
    command.call(main)
