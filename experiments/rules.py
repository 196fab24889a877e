# SPDX-License-Identifier: Apache-2.0
"""A rule that a prompt sets, learned by SmolLM2: five ways, what each costs and what it loses.

    python experiments/rules.py --out=runs/rules [--rules=sentence,json,greeting] [--seeds=3]
    python experiments/rules.py --out=runs/rules --then=greeting  what it leaves of the first rule
    python experiments/rules.py --out=runs/rules --rates  which rules the prompted model keeps

Every method is tuned alike: one run at each of three learning rates on seed 0 of the first rule, of
which the largest mean share of kept answers over its tokens wins. The table is of other seeds.
Finished runs are kept below --out and not repeated, and an interrupted one goes on. In the end
OUT/table.md, OUT/rules.svg (which needs `pip install '.[plot]'`) and OUT/runs.csv, a line for every
evaluation of every run. One cell: `opsd train` with a file of experiments/rules/.
"""

import argparse
import csv
import importlib.util
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from compare import Method, Study, accuracy_at, panels, run, tune

import opsd_jax
from opsd_jax.errors import UserError
from opsd_jax.evaluation.compare import Difference, paired_bootstrap, read_evaluation
from opsd_jax.evaluation.report import spread
from opsd_jax.evaluation.runs import TOKENS, Run
from opsd_jax.host.files import read_json, read_json_lines

HERE = Path(__file__).parent
FIRST = "OPSD"
# Rollouts of the prompted model are about half as long, so its methods get more steps.
METHODS = {
    FIRST: Method("rules/opsd.gin", 6, 2),
    "off-policy distillation": Method("rules/off_policy.gin", 9, 3),
    "SFT on the prompted model": Method("rules/sft.gin", 9, 3),
    "GRPO on the checker": Method("rules/grpo.gin", 6, 2),
}
RATES = [5e-4, 1e-3, 2e-3]
BUDGET = 1_000  # generated tokens at which the methods are compared
NUM_FINAL = 60  # questions of each split that are asked in the end
SHOWN = {  # metric of the last evaluation -> its column
    "eval/student/length_mean": ("tokens per answer", ".1f"),
    "probe/text_nats": ("nats per token of a text", ".3f"),
    "probe/facts": ("facts", ".3f"),
    "probe/kl_initial": ("KL(initial ‖ student)", ".3f"),
}
SPLITS = {  # of questions -> column of the table
    "heldout": "at the end",
    "requests": "requests",
    "puzzles": "puzzles",
}


def study(rule: str) -> Study:
    """All methods on one rule, in the form of compare.py; a seed changes no base."""
    return Study(
        methods=METHODS,
        rates=RATES,
        levels=[],
        budgets=[BUDGET],
        seed_bindings=lambda seed, out: [f"RuleQuestions.rule = {rule!r}"],
    )


def final(found: Run, split: str) -> Path:
    """Folder of an evaluation on a split, made if it is not there."""
    return evaluated(found.workdir, found.workdir / "final" / split, split, "student")


def evaluated(run_or_model: Path | str, folder: Path, split: str, role: str, *lines: str) -> Path:
    """Folder of an evaluation by experiments/rules/opsd.gin, or of a run's own settings."""
    if not (folder / "summary.json").exists():
        gin_file = None if isinstance(run_or_model, Path) else HERE / "rules" / "opsd.gin"
        bindings = [
            f"heldout/RuleQuestions.split = {split!r}",
            f"evaluate.roles = ({role!r},)",
            f"evaluate.num_problems = {NUM_FINAL}",
            *lines,
        ]
        opsd_jax.evaluate(run_or_model, gin_file, bindings, out=str(folder))
    return folder


def by_problem(folder: Path) -> dict[str, float]:
    """id -> share of answers that keep the rule, of the one role that was evaluated."""
    [rows] = read_evaluation(folder).values()
    return {id: row["accuracy"] for id, row in rows.items()}


def share(folder: Path) -> float:
    """Of the answers of an evaluation, how many keep the rule."""
    return float(np.mean([*by_problem(folder).values()]))


def mean_by_problem(runs: Sequence[Run], split: str) -> np.ndarray:
    """[N] shares over the runs of a method, in the order of the problems' names."""
    found = [by_problem(final(each, split)) for each in runs]
    return np.array([np.mean([f[id] for f in found]) for id in sorted(found[0])])


def differences(
    runs: dict[str, list[Run]], split: str = "heldout"
) -> Iterator[tuple[str, Difference]]:
    """The first method minus each other: paired over problems, each a mean over seeds."""
    first = mean_by_problem(runs[FIRST], split)
    for name in list(runs)[1:]:
        yield name, paired_bootstrap(mean_by_problem(runs[name], split), first)


def rule_table(rule: str, runs: dict[str, list[Run]], out: Path) -> list[str]:
    """A line per method, then the bare and the prompted model."""
    columns = [f"kept at {BUDGET:,} tokens", *SPLITS.values(), "of tokens"]
    columns += [column for column, _ in SHOWN.values()] + ["OPSD minus this, held out"]
    lines = [f"| {rule} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    minus = dict(differences(runs))
    for name, group in runs.items():
        at = [value for each in group if (value := accuracy_at(each, BUDGET)) is not None]
        cells = [spread(at, ".3f")]
        for split in SPLITS:
            cells.append(spread([share(final(each, split)) for each in group], ".3f"))
        cells += [f"{statistics.mean(r.num_tokens for r in group):,.0f}"]
        cells += [
            spread([r.series(m)[-1, 1] for r in group], form) for m, (_, form) in SHOWN.items()
        ]
        cells += [interval(minus[name]) if name in minus else ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    start = runs[FIRST][0]
    for name, role in (("not trained", "student"), ("prompted", "teacher")):
        cells = ["", *(f"{share(base(out, rule, split, role)):.3f}" for split in SPLITS), "0"]
        length = read_json(str(base(out, rule, "heldout", role) / "summary.json"))
        cells += [format(length[f"eval/{role}/length_mean"], ".1f")]
        cells += [format(start.series(m)[0, 1], form) for m, (_, form) in [*SHOWN.items()][1:]]
        lines.append(f"| {name} | " + " | ".join([*cells, ""]) + " |")
    return lines


def interval(found: Difference) -> str:
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def base(out: Path, rule: str, split: str, role: str) -> Path:
    """The evaluation of the model as it is, bare (role "student") or prompted ("teacher")."""
    folder = out / "base" / f"{rule}_{split}_{role}"
    return evaluated("smollm2", folder, split, role, f"RuleQuestions.rule = {rule!r}")


# How else the teacher may be told: name of the column -> settings.
TOLD = {
    "in the user's turn": ["contexts.teacher = '{question} {rule}'"],
    "in the system turn": ["contexts.teacher = 'question'", "contexts.teacher_system = '{rule}'"],
}


def rates(out: Path, names: Sequence[str]) -> list[str]:
    """How often the model keeps each rule, bare and by what it is told."""
    sys.path.append(str(HERE / "rules"))
    from keeping import RULES

    columns = ["rule", "words", "bare", *TOLD, "there with examples"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    bare = read_json_lines(base(out, names[0], "heldout", "student") / "generations.jsonl")
    for name in names:
        kept = [[RULES[name].check(line["completion"]) for line in bare]]
        for column, settings in TOLD.items():
            folder = out / "base" / f"{name}_{column.replace(' ', '_')}"
            rule = f"RuleQuestions.rule = {name!r}"
            told = evaluated("smollm2", folder, "heldout", "teacher", rule, *settings)
            kept.append([*by_problem(told).values()])
        kept.append([*by_problem(base(out, name, "heldout", "teacher")).values()])
        cells = [f"{np.mean(k):.3f} ± {np.std(k, ddof=1) / len(k) ** 0.5:.3f}" for k in kept]
        lines.append(f"| {name} | {RULES[name].words} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def after(first: Run, rule: str) -> Study:
    """All methods on a rule, starting from a student that has learned another."""
    lines = [
        f"RuleQuestions.rule = {rule!r}",
        "train.model = @FinishedRun()",
        f"FinishedRun.workdir = '{first.workdir}'",
    ]
    return study(rule)._replace(seed_bindings=lambda seed, out: lines)


def forgetting(
    rules: tuple[str, str], best: dict[str, float], seeds: Sequence[int], out: Path
) -> list[str]:
    """Two rules one after the other: a line per method, what is kept of each (arXiv 2601.19897).

    Args:
      rules: the first and the second.
      best: learning rate of each method.
      seeds: of the runs.
      out: where the runs are kept.
    """
    first, second = rules
    columns = [f"{first}, learned", f"{second}, then learned", f"{first}, then left"]
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * 4 + "|"]
    for name, method in METHODS.items():
        kept: list[list[float]] = [[], [], []]
        for seed in seeds:
            one = run(study(first), method, best[name], seed, out / first)
            two = run(after(one, second), method, best[name], seed, out / f"{first}_then_{second}")
            old = two.workdir / "final" / first
            folders = [
                final(one, "heldout"),
                final(two, "heldout"),
                evaluated(
                    two.workdir, old, "heldout", "student", f"RuleQuestions.rule = {first!r}"
                ),
            ]
            for values, folder in zip(kept, folders, strict=True):
                values.append(share(folder))
        lines.append(f"| {name} | " + " | ".join(spread(values, ".3f") for values in kept) + " |")
    return lines


def write_csv(runs: dict[tuple[str, str, int, float], Run], path: Path) -> None:
    """A line for every evaluation of every run; the last one has the final shares, where asked."""
    metrics = ["eval/student/accuracy", "eval/student/accuracy_se", *SHOWN, TOKENS]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        finals = [f"final/{split}" for split in SPLITS]
        writer.writerow(["rule", "method", "seed", "learning_rate", "step", *metrics, *finals])
        for key, found in runs.items():
            folders = [found.workdir / name for name in finals]
            shares = [share(f) if (f / "summary.json").exists() else None for f in folders]
            lines = [line for line in found.history if metrics[0] in line]
            for line in lines:
                values = [line.get(metric) for metric in metrics]
                values += shares if line is lines[-1] else [None] * len(shares)
                cells = (f"{value:.6g}" if value is not None else "" for value in values)
                writer.writerow([*key, line["step"], *cells])


def draw(tables: dict[str, dict[str, list[Run]]], path: Path) -> None:
    """A row per rule: kept against tokens, and what a text costs more against kept."""
    size = (8.4, 3.0 * len(tables))
    figure, axes = panels(len(tables), 2, font_size=9, figsize=size, squeeze=False)
    for (rule, runs), (left, right) in zip(tables.items(), axes, strict=True):
        for number, (name, group) in enumerate(runs.items()):
            for seed, each in enumerate(group):
                tokens, kept = each.series("eval/student/accuracy", TOKENS).T
                nats = each.series("probe/text_nats")[:, 1]
                label = name if seed == 0 else None
                left.plot(tokens, kept, color=f"C{number}", label=label, lw=1)
                right.plot(kept, nats - nats[0], "o-", color=f"C{number}", lw=0.7, ms=3)
        left.set(xlabel="generated tokens", ylabel=f"{rule}: rule kept", ylim=(-0.02, 1.02))
        right.set(xlabel="rule kept", ylabel="nats per token of a text, more", xlim=(-0.02, 1.02))
        left.grid(alpha=0.3)
        right.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def whole(rules: Sequence[str], best: dict[str, float], seeds: Sequence[int], out: Path) -> None:
    """Runs what is missing; writes OUT/table.md, OUT/rules.svg and OUT/runs.csv."""
    tables: dict[str, dict[str, list[Run]]] = {}
    raw: dict[tuple[str, str, int, float], Run] = {}
    for rule in rules:
        tables[rule] = {
            name: [run(study(rule), method, best[name], seed, out / rule) for seed in seeds]
            for name, method in METHODS.items()
        }
        for name, group in tables[rule].items():
            raw |= {(rule, name, s, best[name]): r for s, r in zip(seeds, group, strict=True)}
    for name, method in METHODS.items():
        for rate in RATES:
            raw[rules[0], name, 0, rate] = run(study(rules[0]), method, rate, 0, out / rules[0])
    lines = [line for rule, runs in tables.items() for line in [*rule_table(rule, runs, out), ""]]
    print("", *lines, sep="\n")
    (out / "table.md").write_text("\n".join(lines), encoding="utf-8")
    write_csv(raw, out / "runs.csv")
    draw(tables, out / "rules.svg")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rules", default="sentence,json,greeting", help="the first tunes")
    parser.add_argument("--then", default="", help="learn this rule after the first one, alone")
    parser.add_argument("--rates", action="store_true", help="train nothing")
    parser.add_argument("--seeds", type=int, default=3, help="besides seed 0, which tunes")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
    rules = arguments.rules.split(",")
    if arguments.rates:
        out.mkdir(parents=True, exist_ok=True)
        (out / "rates.md").write_text("\n".join(rates(out, rules)) + "\n", encoding="utf-8")
        return
    if importlib.util.find_spec("matplotlib") is None:  # Told before the hours of training.
        parser.exit(2, "the figure needs matplotlib: pip install '.[plot]'\n")
    seeds = range(1, 1 + arguments.seeds) if arguments.seeds else [0]
    best = tune(study(rules[0]), out / rules[0])
    if arguments.then:
        lines = forgetting((rules[0], arguments.then), best, seeds, out)
        print("", *lines, sep="\n")
        (out / "forgetting.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        whole(rules, best, seeds, out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
