# SPDX-License-Identifier: Apache-2.0
import dataclasses
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

from opsd_jax import token_weights
from opsd_jax.config import AREAS, FUNCTIONS, load_experiment
from opsd_jax.divergence_rows import TokenDivergence
from opsd_jax.errors import UserError
from opsd_jax.model_config import LoraConfig
from opsd_jax.operative_config import FREE_TO_CHANGE, first_difference

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
QUICKSTART = str(EXPERIMENTS / "quickstart.gin")
RUNNABLE = [
    path
    for path in sorted(EXPERIMENTS.rglob("*.gin"))
    if path.name not in ("base.gin", "recipe.gin")
    and path.parent.name != "eval"  # read after a run's own config: tests/test_benchmarks.py
]


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_every_experiment_parses_and_its_operative_config_is_the_same_experiment(path, tmp_path):
    experiment, text = load_experiment([str(path)])
    copy = tmp_path / "config.gin"
    copy.write_text(text)
    again, text_again = load_experiment([str(copy)])
    assert again == experiment and first_difference(text, text_again) is None


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_every_experiment_carries_its_command(path):
    header = path.read_text()
    name = path.relative_to(EXPERIMENTS.parent)
    assert f"opsd train --gin_file={name}" in header


def test_ablations_are_at_most_ten_bindings():
    for path in (EXPERIMENTS / "ablations").glob("*.gin"):
        lines = [line for line in path.read_text().splitlines() if " = " in line.split("#")[0]]
        assert len(lines) <= 10, path


def test_base_gin_lists_every_default():
    """Every field of every area stands in base.gin, with the default of the code."""
    bare = ["train.model = @TestbedBase()", "train.problems = @ChainArithmetic()"]
    with_base, _ = load_experiment([str(EXPERIMENTS / "base.gin")], bare)
    required = [
        f"train.{n}" for n in ("num_steps = 100", "batch_size = 32", "learning_rate = 5e-6")
    ]
    without, _ = load_experiment([], bare + [*required, "rollout.max_new_tokens = 1024"])
    assert with_base == without
    text = (EXPERIMENTS / "base.gin").read_text()
    fields = {f"{area}.{f.name}" for area, of in AREAS.items() for f in dataclasses.fields(of)}
    fields |= {f"lora.{field.name}" for field in dataclasses.fields(LoraConfig)}
    for name, function in FUNCTIONS.items():
        parameters = inspect.signature(function).parameters.values()
        fields |= {f"{name}.{p.name} = {p.default}" for p in parameters if p.default is not p.empty}
    missing = {field for field in fields if not re.search(rf"^(# )?{field}( |$)", text, re.M)}
    assert missing == {"rollout.pad_id"}  # the tokenizer's


def test_weights_of_tokens_are_named_and_bound_in_a_gin_file():
    weights = "divergence.weights = (@skip_first, @positive_gap)"
    experiment, text = load_experiment([QUICKSTART], [weights, "skip_first.num_tokens = 2"])
    mask = np.ones((1, 3), bool)
    tokens = TokenDivergence(
        *[np.zeros((1, 3), np.float32)] * len(dataclasses.fields(TokenDivergence))
    )
    skip, gap = experiment.divergence.weights
    assert skip(tokens, mask).tolist() == [[0, 0, 1]] and not gap(tokens, mask).any()
    assert "skip_first.num_tokens = 2" in text
    own = {n for n, f in vars(token_weights).items() if inspect.isfunction(f) and n[0] != "_"}
    assert own - set(FUNCTIONS) == {"importance_weight"}  # no weight of DivergenceConfig


@pytest.mark.parametrize(
    "bindings, words",
    [
        (["train.num_stepz = 3"], "num_stepz"),
        (["trane.num_steps = 3"], "trane"),
        (["train.num_steps = 'many'"], "train.num_steps"),
        (["train.num_steps = 0"], "train.num_steps"),
        (["train.problems = @JsonlProblems"], "train.problems"),
        (["train.heldout = 'my.jsonl'"], "train.heldout"),
        (["teacher.model = @PretrainedModel"], "teacher.model"),
        (["train.seed = %seed"], "seed"),
        (["divergence.clip = 'hard'"], "divergence.clip"),
        (["train.model = None"], "train.model"),
        (["train.num_steps ="], "Unable to parse"),
    ],
)
def test_a_bad_binding_is_told_in_one_line(bindings, words):
    with pytest.raises(UserError, match=words) as caught:
        load_experiment([QUICKSTART], bindings)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match="nowhere.gin"):
        load_experiment(["nowhere.gin"])


def test_what_is_required_is_named():
    with pytest.raises(UserError, match="model.*problems"):
        load_experiment([str(EXPERIMENTS / "base.gin")])


def test_first_difference_names_the_binding_and_ignores_what_is_free():
    _, one = load_experiment([QUICKSTART])
    _, other = load_experiment([QUICKSTART], ["train.seed = 5"])
    assert "train.seed was 0 and is now 5" in first_difference(one, other)
    _, longer = load_experiment([QUICKSTART], ["train.num_steps = 600", "mesh.model = 2"])
    assert first_difference(one, longer) is None
    assert "train.num_steps" in FREE_TO_CHANGE
