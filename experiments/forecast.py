# SPDX-License-Identifier: Apache-2.0
"""Does `opsd probe` foretell how a run ends? Cases that differ in the teacher, probed and trained.

    python experiments/forecast.py --out=runs/forecast [--seeds=3] [--only=quickstart,leaky]

Every case is trained by the quickstart's recipe, so that what differs is the teacher: what it is
shown, or the base that both roles are. The last four differ in what the probe does not look at,
which is asked 64 problems before the first step. Then the studies of a pretrained model, probed
alone: how they ended is known (experiments/README.md). Writes OUT/table.md and OUT/forecast.csv;
what is finished is kept below --out, a folder per case, and jobs go side by side, --processes at a
time. A probe or a run takes about 25 s of CPU time, and each of the nine bases 2 to 5 minutes more.
"""

import csv
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import command
import jax
import numpy as np
from compare import Method, Study, run
from forecast_cases import CASES, Row, ends, lines
from processes import in_processes, keep_programs
from scipy.stats import rankdata

from opsd_jax.evaluation import forecast
from opsd_jax.evaluation.report import spread
from opsd_jax.evaluation.runs import ACCURACY, Run
from opsd_jax.host.files import read_json
from opsd_jax.run import flags
from opsd_jax.run.config import load_experiment
from opsd_jax.run.probe import probe_command

HERE = Path(__file__).parent
NUM_STEPS, EVERY, RATE = 60, 6, 1e-3
NUM_PROBED, NUM_DRAWS = 64, 2_000
# number of the probe -> its column; the first three are the teacher's minus the student's
NUMBERS = {
    "accuracy": "accuracy",
    "from_wrong": "from half a wrong answer",
    "right_answer": "right answer behind wrong text",
    "gap": "divergence",
    "gap_right": "of right answers",
    "gap_wrong": "of wrong ones",
    "gap_wrong_more": "of wrong − of right",
    "first_8": "in the first 8 tokens",
}
OUTCOMES = ("learned", "unchanged", "harmed")


def probed(name: str, out: Path) -> dict[str, float]:
    """What `opsd probe` finds, asked once and kept in the case's folder."""
    name = CASES[name].same_as or name
    path = out / name / "probe.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        gin_file = str(HERE / CASES[name].gin_file)
        probe_command([gin_file], lines(CASES[name], out), NUM_PROBED, 0, str(path))
        jax.clear_caches()
    return {k: math.nan if v is None else v for k, v in read_json(str(path)).items()}


def numbers(found: Mapping[str, float]) -> dict[str, float]:
    """What of a probe may foretell an outcome, a number for each of `NUMBERS`; NaN is not known."""
    told = {what: forecast.difference(found, what)[0] for what in forecast.MEASURED}
    right, wrong = found["gap/right"], found["gap/wrong"]
    gaps = {"gap": found["gap/all"], "gap_right": right, "gap_wrong": wrong}
    return told | gaps | {"gap_wrong_more": wrong - right, "first_8": found["first/8"]}


def trained(name: str, seed: int, out: Path) -> Run:
    """One seed of a case, trained if it is not there."""
    study = Study({}, [RATE], [], [], lambda seed, _: lines(CASES[name], out))
    method = Method(CASES[name].gin_file, NUM_STEPS, EVERY)
    return run(study, method, RATE, seed, out / name)


def trained_ends(name: str, seeds: Iterable[int], out: Path) -> Row:
    """What came of the seeds of a case."""
    runs = [trained(name, seed, out) for seed in seeds]
    curves = [each.series(ACCURACY)[:, 1] for each in runs]
    return ends(curves, [each.series(f"{ACCURACY}_se")[[0, -1], 1] for each in runs])


def of_each_base(names: Iterable[str], out: Path) -> list[str]:
    """The first case of each model that the cases start from."""
    found: dict[Any, str] = {}
    for name in names:
        case = CASES[name]
        experiment, _ = load_experiment([str(HERE / case.gin_file)], lines(case, out))
        found.setdefault(experiment.train.model, name)
    return list(found.values())


def finish(names: Sequence[str], seeds: Sequence[int], out: Path, num: int) -> None:
    """Probes and trains what is not there yet, `num` jobs at a time."""
    log = out / "processes.log"
    names_probed = list(dict.fromkeys(CASES[name].same_as or name for name in names))
    firsts = of_each_base(names_probed, out)  # two would train one base at the same time
    in_processes([(probed, (name, out)) for name in firsts], num, log)
    jobs = [(probed, (name, out)) for name in names_probed if name not in firsts]
    mine = [name for name in names if CASES[name].ended is None]
    jobs += [(trained, (name, seed, out)) for seed in seeds for name in mine]
    in_processes(jobs, num, log)


# ---- tables, of rows alone


def gains(row: Row) -> np.ndarray:
    return np.subtract(row["last"], row["before"])


def outcome(row: Row) -> str:
    """Of the mean gain: whether it is told apart from none by two errors of one seed."""
    gain = gains(row).mean()
    if abs(gain) <= 2 * row["error"]:
        return "unchanged"
    return "learned" if gain > 0 else "harmed"


def case_table(rows: Sequence[Row]) -> list[str]:
    """A line per case, the largest gain first."""
    names = ["case", *NUMBERS.values(), "advice", "before", "gain", "end − best"]
    table = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in sorted(rows, key=lambda row: -gains(row).mean()):
        cells = ["–" if math.isnan(row[name]) else _fixed(row[name]) for name in NUMBERS]
        fall = np.subtract(row["last"], row["best"])
        cells += [row["advice"], f"{np.mean(row['before']):.3f}", signed(gains(row))]
        cells.append(f"{fall.mean():+.3f}")
        table.append(f"| {row['about']} | " + " | ".join(cells) + " |")
    return table


def _fixed(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # no minus before a zero


def signed(values: np.ndarray) -> str:
    text = spread(values.tolist(), ".3f")
    return text if values.mean() < 0 else f"+{text}"


def rank_correlation(x_N: np.ndarray, y_N: np.ndarray) -> tuple[float, float, float]:
    """Spearman's, with its 95 % bootstrap interval over cases (draws with more than one)."""
    draws = np.random.default_rng(0).integers(len(x_N), size=(NUM_DRAWS, len(x_N)))
    all_of_them = np.arange(len(x_N))[None]
    (value,), drawn = (_spearman(x_N[d], y_N[d]) for d in (all_of_them, draws))
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(value), float(low), float(high)


def _spearman(x_DN: np.ndarray, y_DN: np.ndarray) -> np.ndarray:
    """Pearson's correlation of the ranks of each row; NaN where one side is all tied."""
    ranks = [rankdata(values, axis=1) for values in (x_DN, y_DN)]
    x, y = (rank - rank.mean(1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore"):
        return (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))


def rank_table(rows: Sequence[Row]) -> list[str]:
    """A line per number, over the cases that have it and are not another one to the probe."""
    table = ["| number | cases | rank correlation with the gain |", "|---" * 3 + "|"]
    for name, words in NUMBERS.items():
        known = [row for row in rows if not row["same_as"] and not math.isnan(row[name])]
        x = np.array([row[name] for row in known])
        y = np.array([gains(row).mean() for row in known])
        cell = "–"
        if len(set(x)) > 1:
            value, low, high = rank_correlation(x, y)
            cell = f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
        table.append(f"| {words} | {len(known)} | {cell} |")
    return table


def confusion(rows: Sequence[Row]) -> list[str]:
    """What the advice said against what came of it, in numbers of cases."""
    counts = Counter((row["advice"], outcome(row)) for row in rows)
    table = ["| advice | " + " | ".join(OUTCOMES) + " |", "|---" * 4 + "|"]
    for advice in sorted({row["advice"] for row in rows}):
        cells = [str(counts[advice, found]) for found in OUTCOMES]
        table.append(f"| {advice} | " + " | ".join(cells) + " |")
    return table


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """A line per case; the accuracies of its seeds have a space between."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _as_text(value) for name, value in row.items()} for row in rows)


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_as_text, value))
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def read_csv(path: Path) -> list[Row]:
    """The rows of `write_csv`."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            line
            | {name: float(line[name]) for name in (*NUMBERS, "error")}
            | {name: [float(x) for x in line[name].split()] for name in ("before", "best", "last")}
            for line in csv.DictReader(file)
        ]


def main() -> None:
    parser = command.parser(3)
    parser.add_argument("--only", default="", help="names of cases, with commas")
    parser.add_argument("--processes", type=flags.count, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    out = Path(arguments.out).resolve()
    chosen = [name for name in arguments.only.split(",") if name] or list(CASES)
    command.check_names("--only", chosen, CASES)
    keep_programs(out)
    seeds = range(1, 1 + arguments.seeds)
    finish(chosen, seeds, out, arguments.processes)
    rows: list[Row] = []
    for name in chosen:
        case, found = CASES[name], probed(name, out)
        special = {"case": name, "about": case.about, "same_as": case.same_as}
        special["advice"] = forecast.kind(found)
        end = case.ended() if case.ended else trained_ends(name, seeds, out)
        rows.append(special | numbers(found) | end)
    tables = [*case_table(rows), "", *rank_table(rows), "", *confusion(rows)]
    print("", *tables, sep="\n")
    (out / "table.md").write_text("\n".join(tables) + "\n", encoding="utf-8")
    write_csv(rows, out / "forecast.csv")


if __name__ == "__main__":
    command.call(main)
