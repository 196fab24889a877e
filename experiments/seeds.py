# SPDX-License-Identifier: Apache-2.0
"""The quickstart over several warm starts and seeds; prints the table of the README.

    python experiments/seeds.py --out=runs/seeds

Finished runs are kept below --out and not repeated.
"""

import statistics
from pathlib import Path

import command
import jax

from opsd_jax.evaluation.report import spread
from opsd_jax.evaluation.runs import ACCURACY, Line
from opsd_jax.run import flags
from opsd_jax.run.config import load_experiment
from opsd_jax.run.train import train_whole

HERE = Path(__file__).parent
COLUMNS = {
    "before": "eval/student/accuracy",
    "after": "eval/student/accuracy",
    "greedy": "eval/student/greedy_accuracy",
    "teacher": "eval/teacher/accuracy",
    "ok student": "probe/student/ok",
    "ok teacher": "probe/teacher/ok",
    "leak teacher": "probe/teacher/leak",
}


def run(gin_file: str, out: Path, warm_seed: int, seed: int) -> tuple[Line, Line]:
    """First and last evaluation of one run."""
    workdir = out / f"{Path(gin_file).stem}_warm{warm_seed}_seed{seed}"
    bindings = [
        f"train.seed = {seed}",
        "TestbedBase.warm_start = @WarmStart()",
        f"WarmStart.seed = {warm_seed}",
        f"TestbedBase.cache_dir = '{out / 'bases'}'",
        "train.eval_every_steps = 60",
    ]
    experiment, text = load_experiment([gin_file], bindings)
    found = [line for line in train_whole(experiment, text, workdir).history if ACCURACY in line]
    return found[0], found[-1]


def row(label: str, first: Line, last: Line) -> dict:
    """One line of the table; "before" and the probes are the base's, the rest is the result's."""
    source = {"before": first, "after": last, "greedy": last}
    cells = {name: source.get(name, first)[key] for name, key in COLUMNS.items()}
    return {"run": label} | cells | {"tokens": last["rollout/tokens_total"]}


def print_table(rows: list[dict]) -> None:
    names = [*COLUMNS, "tokens"]
    print("| run | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for each in rows:
        cells = [f"{each[n]:,}" if n == "tokens" else f"{each[n]:.3f}" for n in names]
        print(f"| {each['run']} | " + " | ".join(cells) + " |")
    cells = [spread([each[n] for each in rows], ".3f") for n in COLUMNS]
    cells.append(f"{statistics.mean(each['tokens'] for each in rows):,.0f}")
    print("| mean ± sd | " + " | ".join(cells) + " |")


def main() -> None:
    parser = command.parser(5)
    parser.add_argument("--gin_file", default=str(HERE / "quickstart.gin"))
    parser.add_argument("--warm_seeds", type=flags.count, default=3)
    arguments = parser.parse_args()
    out = Path(arguments.out).resolve()
    # Every run compiles the same programs.
    jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
    rows = [
        row(f"warm {w}, seed {s}", *run(arguments.gin_file, out, w, s))
        for w in range(arguments.warm_seeds)
        for s in range(arguments.seeds)
    ]
    print_table(rows)


if __name__ == "__main__":
    command.call(main)
