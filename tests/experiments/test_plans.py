# SPDX-License-Identifier: Apache-2.0
"""experiments/plans.py: its cases load, and its page shows what its command wrote."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from opsd_jax.run.assembly import check_batch
from opsd_jax.run.config import load_experiment

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
CHIPS = {"h100:1": 1, "h100:4": 4, "h100:8": 8, "v5e:4x4": 16, "v5p:2x2x2": 8, "v6e:4x4": 16}


def plans():
    """The script, found as a user's command finds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        return importlib.import_module("plans")


@pytest.fixture
def script():
    return plans()


def test_every_case_is_an_experiment_whose_rows_divide(script):
    cases = script.cases()
    assert len(cases) == 36 and {target for *_, target in cases.values()} == set(CHIPS)
    for model, tuned, target in cases.values():
        file = EXPERIMENTS / "paper" / f"qwen3_{model}.gin"
        experiment, _ = load_experiment([str(file)], list(script.bindings(tuned, target)))
        assert (experiment.train.lora is None) == (tuned == "all")
        train, mesh = experiment.train, SimpleNamespace(shape={"data": CHIPS[target], "model": 1})
        check_batch(train.batch_size, train.num_micro_batches, mesh)


def test_the_page_shows_what_the_command_wrote(script):
    rows = script.read_csv(EXPERIMENTS / "paper" / "plans.csv")
    said = {(row["model"], row["trained"], row["target"]) for row in rows}
    assert said == {
        (script.NAMES[m], tuned, target) for m, tuned, target in script.cases().values()
    }
    page = (EXPERIMENTS / "paper" / "README.md").read_text()
    assert "\n".join(script.table(rows)) in page
    for row in rows:
        assert row["bindings"] == "; ".join(script.bindings(row["trained"], row["target"]))


def test_what_the_compiler_refuses_is_a_row(script):
    row = dict.fromkeys(script.read_csv(EXPERIMENTS / "paper" / "plans.csv")[0], "")
    row |= {"model": "8B", "trained": "all", "target": "v5e:4x4", "refused": "20.1G of 15.7G"}
    assert script.table([row])[-1].startswith("| 8B | all | v5e:4x4 | 20.1G of 15.7G | no |")
