# SPDX-License-Identifier: Apache-2.0
"""experiments/paper/README.md: its commands parse, bindings load, its check tells runs apart."""

import json
import re
import shlex
from pathlib import Path

import pytest

from opsd_jax.main import parser
from opsd_jax.run.config import load_experiment

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "experiments" / "paper" / "README.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c.split()[1:3]))
def test_every_command_is_one(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = parser().parse_args(shlex.split(command)[1:])
    if arguments.command in ("train", "plan", "data", "probe"):
        experiment, _ = load_experiment(arguments.gin_file, arguments.gin_bindings)
        plain = "plain" in command
        assert experiment.divergence.clip_threshold == (1e-7 if plain else 0.05)
        assert experiment.contexts.teacher_thinking is not plain
    for path in getattr(arguments, "gin_file", []):
        assert Path(path).is_file()


@pytest.mark.parametrize("shift, verdict", [(0.0, "passes"), (0.0025, None), (0.0035, "FAILS")])
def test_the_check_reads_a_run(shift, verdict, tmp_path, monkeypatch, capsys):
    """On a curve made from the table: pairs of steps around the published means."""
    published = {2: 0.0096, 12: 0.0028, 22: -0.0010, 32: -0.0034}
    lines = [{"step": 0, "eval/student/accuracy": 0.5}]  # a line without a loss
    for step in range(1, 33):
        near = min(published, key=lambda s: abs(s - 0.5 - step))
        lines.append({"step": step, "loss/objective": published[near] + shift + (-1) ** step * 0.1})
    folder = tmp_path / "runs" / "parity"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(code, {})
    said = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    # Shifted by .0025, all are near enough, and step 22 has the wrong sign.
    assert said == (["passes", "passes", "FAILS", "passes"] if verdict is None else [verdict] * 4)
