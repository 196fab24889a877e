# SPDX-License-Identifier: Apache-2.0
"""A rule that a prompt sets, learned by SmolLM2: five ways, what each costs and what it loses.

    python experiments/rules.py --out=runs/rules [--rules=sentence,json,greeting] [--seeds=3]
    python experiments/rules.py --out=runs/rules --then=greeting  what it leaves of the first rule
    python experiments/rules.py --out=runs/rules --rates  which rules the prompted model keeps

Every method is tuned alike: one run at each of three learning rates on seed 0 of the first rule, of
which the largest mean share of kept answers over its tokens wins. The table is of other seeds.
Runs go side by side, --processes at a time. Finished ones are kept below --out and not repeated,
and an interrupted one goes on. In the end OUT/table.md, OUT/rules.svg (which needs
`pip install '.[plot]'`) and OUT/runs.csv, a line for every evaluation of every run, of which table
and figure are made; of --then OUT/forgetting.md and OUT/then.csv. One cell: `opsd train` with a
file of experiments/rules/.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import command
import numpy as np
from compare import Method, Study, run, tune
from processes import Job, in_processes, keep_programs

import opsd_jax
from opsd_jax.evaluation.compare import read_evaluation
from opsd_jax.evaluation.runs import Run
from opsd_jax.host.files import read_json, read_json_lines
from opsd_jax.run import flags

HERE = Path(__file__).parent
sys.path.append(str(HERE / "rules"))
import results  # noqa: E402  (of experiments/rules/, as the gin files find their modules)
from results import BARE, BEFORE, BUDGET, METRICS, PROMPTED, SHOWN, SPLITS, Result  # noqa: E402

# Rollouts of the prompted model are about half as long, so its methods get more steps.
METHODS = {
    "OPSD": Method("rules/opsd.gin", 6, 2),
    "off-policy distillation": Method("rules/off_policy.gin", 9, 3),
    "SFT on the prompted model": Method("rules/sft.gin", 9, 3),
    "GRPO on the checker": Method("rules/grpo.gin", 6, 2),
}
RATES = [5e-4, 1e-3, 2e-3]
NUM_FINAL = 60  # questions of each split that are asked in the end


def study(rule: str, first: Run | None = None) -> Study:
    """All methods on one rule, in the form of compare.py; a seed changes no base.

    Args:
      rule: of keeping.py.
      first: where a student starts that has learned another rule; the model as it is if None.
    """
    lines = [f"RuleQuestions.rule = {rule!r}"]
    if first is not None:
        lines += ["train.model = @FinishedRun()", f"FinishedRun.workdir = '{first.workdir}'"]
    return Study(
        methods=METHODS,
        rates=RATES,
        levels=[],
        budgets=[BUDGET],
        seed_bindings=lambda seed, out: lines,
    )


def learned(out: Path, rule: str, name: str, rate: float, seed: int, first: str = "") -> Run:
    """One run, trained if it is not there; by a student that has learned `first` before."""
    before = learned(out, first, name, rate, seed) if first else None
    folder = out / (f"{first}_then_{rule}" if first else rule)
    return run(study(rule, before), METHODS[name], rate, seed, folder)


def asked(out: Path, rule: str, name: str, rate: float, seed: int, first: str = "") -> Result:
    """One run with the questions that its student is asked in the end, of both rules if two."""
    found = learned(out, rule, name, rate, seed, first)
    folders = {}
    for split in ["heldout"] if first else SPLITS:
        folder = found.workdir / "final" / split
        folders[split] = evaluated(found.workdir, folder, split, "student")
    if first:
        line = f"heldout/RuleQuestions.rule = {first!r}"  # a run's config names the scopes
        folder = found.workdir / "final" / first
        folders[BEFORE] = evaluated(found.workdir, folder, "heldout", "student", line)
    shares = {split: [*by_problem(folder).values()] for split, folder in folders.items()}
    return Result(rule, name, seed, rate, evaluations(found), shares, first)


def evaluations(found: Run) -> list[dict[str, float]]:
    lines = [line for line in found.history if results.KEPT in line]
    return [{m: line[m] for m in METRICS if line.get(m) is not None} for line in lines]


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
    return {id: rows[id]["accuracy"] for id in sorted(rows)}


def base(out: Path, rule: str, split: str, role: str) -> Path:
    """The evaluation of the model as it is, bare (role "student") or prompted ("teacher")."""
    folder = out / "base" / f"{rule}_{split}_{role}"
    return evaluated("smollm2", folder, split, role, f"RuleQuestions.rule = {rule!r}")


def bases(out: Path, rule: str) -> list[Result]:
    """The model as it is on a rule; what it has not lost, `whole` fills in."""
    found = []
    for name, role in ((BARE, "student"), (PROMPTED, "teacher")):
        folders = {split: base(out, rule, split, role) for split in SPLITS}
        shares = {split: [*by_problem(folder).values()] for split, folder in folders.items()}
        length = read_json(str(folders["heldout"] / "summary.json"))[f"eval/{role}/length_mean"]
        line = {"step": 0, results.KEPT: np.mean(shares["heldout"]), results.TOKENS: 0}
        line |= {next(iter(SHOWN)): length}
        found.append(Result(rule, name, 0, 0.0, [line], shares))
    return found


# How else the teacher may be told: name of the column -> settings.
TOLD = {
    "in the user's turn": ["contexts.teacher = '{question} {rule}'"],
    "in the system turn": ["contexts.teacher = 'question'", "contexts.teacher_system = '{rule}'"],
}


def rates(out: Path, names: Sequence[str]) -> list[str]:
    """How often the model keeps each rule, bare and by what it is told."""
    from keeping import RULES

    columns = ["rule", "words", "bare", *TOLD, "there with examples"]
    lines = results.heading(columns)
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


def jobs(
    out: Path, rules: Sequence[str], best: dict[str, float], seeds: Sequence[int], then: str
) -> list[Job]:
    """What a table needs besides tuning; a seed of all methods before the next."""
    if then:
        first = rules[0]
        return [(asked, (out, then, n, best[n], s, first)) for s in seeds for n in METHODS]
    found: list[Job] = [(bases, (out, rule)) for rule in rules]
    return found + [
        (asked, (out, rule, n, best[n], s)) for s in seeds for n in METHODS for rule in rules
    ]


def whole(out: Path, rules: Sequence[str], best: dict[str, float], seeds: Sequence[int]) -> None:
    """Writes OUT/table.md, OUT/rules.svg and OUT/runs.csv."""
    found = [asked(out, r, n, best[n], s) for r in rules for n in METHODS for s in seeds]
    for name in METHODS:
        for rate in RATES if seeds[0] else [r for r in RATES if r != best[name]]:
            lines = evaluations(learned(out, rules[0], name, rate, 0))
            found.append(Result(rules[0], name, 0, rate, lines, {}))
    lost = {metric: found[0].evaluations[0][metric] for metric in [*SHOWN][1:]}
    for each in [result for rule in rules for result in bases(out, rule)]:
        found.append(each._replace(evaluations=[each.evaluations[0] | lost]))
    found = kept(found, out / "runs.csv")
    show([results.rule_table(found, rule) for rule in rules], out / "table.md")
    results.draw(found, out / "rules.svg")


def forgetting(
    out: Path, rules: tuple[str, str], best: dict[str, float], seeds: Sequence[int]
) -> None:
    """Two rules one after the other (arXiv 2601.19897): OUT/forgetting.md and OUT/then.csv."""
    first, second = rules
    found = [asked(out, first, n, best[n], s) for n in METHODS for s in seeds]
    found += [asked(out, second, n, best[n], s, first) for n in METHODS for s in seeds]
    found = kept(found, out / "then.csv")
    show([results.forgetting_table(found, *rules)], out / "forgetting.md")


def kept(found: list[Result], path: Path) -> list[Result]:
    """The results as their file has them, so that tables are those of the file, digit by digit."""
    results.write(found, path)
    return results.read(path)


def show(tables: Sequence[list[str]], path: Path) -> None:
    text = "\n".join(line for table in tables for line in [*table, ""])
    print("", text, sep="\n")
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = command.parser(3, tunes=True)
    parser.add_argument("--rules", default="sentence,json,greeting", help="the first tunes")
    parser.add_argument("--then", default="", help="learn this rule after the first one, alone")
    parser.add_argument("--rates", action="store_true", help="train nothing")
    parser.add_argument("--processes", type=flags.count, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    out = Path(arguments.out).resolve()
    rules = arguments.rules.split(",")
    from keeping import RULES  # late, as it tells gin what it has

    command.check_names("--rules", rules, RULES)
    command.check_names("--then", [arguments.then] if arguments.then else [], RULES)
    if not arguments.rates:
        command.require_matplotlib()
    keep_programs(out)
    if arguments.rates:
        out.mkdir(parents=True, exist_ok=True)
        (out / "rates.md").write_text("\n".join(rates(out, rules)) + "\n", encoding="utf-8")
        return
    seeds = range(1, 1 + arguments.seeds) if arguments.seeds else [0]
    tuning = [(learned, (out, rules[0], n, rate, 0)) for n in METHODS for rate in RATES]
    in_processes(tuning, arguments.processes, out / "processes.log")
    best = tune(study(rules[0]), out / rules[0])
    todo = jobs(out, rules, best, seeds, arguments.then)
    in_processes(todo, arguments.processes, out / "processes.log")
    if arguments.then:
        forgetting(out, (rules[0], arguments.then), best, seeds)
    else:
        whole(out, rules, best, seeds)


if __name__ == "__main__":
    command.call(main)
