# SPDX-License-Identifier: Apache-2.0
import ast
import dataclasses
import inspect
import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest

from opsd_jax.divergence import token_weights
from opsd_jax.divergence.rows import TokenDivergence
from opsd_jax.errors import UserError
from opsd_jax.host.config_text import FREE_TO_CHANGE, first_difference
from opsd_jax.method.completions import References
from opsd_jax.run.config import load_experiment, load_run
from opsd_jax.run.gin_errors import nearest_field
from opsd_jax.run.registry import AREAS, FUNCTIONS, SOURCES, resolve

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
QUICKSTART = str(EXPERIMENTS / "quickstart.gin")
RUNNABLE = [
    path
    for path in sorted(EXPERIMENTS.rglob("*.gin"))
    if path.name not in ("base.gin", "recipe.gin")
    and path.parent.name != "eval"  # read after a run's own config: tests/data/test_benchmarks.py
]


SAMPLED_TOKEN = ["divergence.name = 'sampled_token'", "divergence.clip = 'none'"]


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


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.rglob("*.gin")), ids=lambda path: path.stem)
def test_every_file_that_a_gin_file_names_exists(path):
    named = re.findall(r"[\w./-]+\.(?:py|gin|md|svg|ipynb)\b", path.read_text())
    for name in set(named) - {"experiments/X.gin"}:
        beside = [folder / name for folder in (EXPERIMENTS.parent, EXPERIMENTS, path.parent)]
        code = (EXPERIMENTS.parent / "opsd_jax").rglob(name)  # base.gin names some without folder
        assert any(found.exists() for found in (*beside, *code)), f"{path} names {name}"


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
    sources = set(SOURCES) - {"ModelConfig", "ParquetProblems"}  # the latter as JsonlProblems
    fields = set()
    for name in (*AREAS, *sources):
        for parameter in inspect.signature(resolve(name)).parameters.values():
            default, field = parameter.default, f"{name}.{parameter.name}"
            literal = isinstance(default, bool | int | float | str | tuple | None)
            fields.add(field)
            if default is not parameter.empty and literal and field != "rollout.pad_id":
                (line,) = re.findall(rf"^{field} = (.+?)(?: +#.*)?$", text, re.M)
                assert ast.literal_eval(line) == default, field
    for name in FUNCTIONS:
        parameters = inspect.signature(resolve(name)).parameters.values()
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
    assert own <= set(FUNCTIONS)


def test_a_target_is_named_and_bound_in_a_gin_file():
    lines = ["divergence.target = @target_barycentre", "target_barycentre.alpha = 0.25"]
    target = load_experiment([QUICKSTART], lines)[0].divergence.target
    assert target((np.array([1.0]), np.array([2.0]))).tolist() == [1.25]


@pytest.mark.parametrize(
    "bindings, words",
    [
        (
            ["train.num_stepz = 3"],
            r"^gin: train has no num_stepz; did you mean train.num_steps\? ",
        ),
        (["train.max_new_tokens = 3"], r"has no max_.*; did you mean rollout.max_new_tokens\?"),
        (["train.xyz = 3"], "train has no xyz; it has model, problems, num_steps, "),
        (
            ["trane.num_steps = 3"],
            r"^gin: there is no trane; did you mean train\? in bindings",
        ),
        (["jsonlproblems.path = 'x'"], r"no jsonlproblems; did you mean JsonlProblems\?"),
        (["qqq.x = 3"], "there is no qqq; there are Anchor, Benchmark, ChainArithmetic, "),
        (["train.problems = @JsonProblems()"], r"no @JsonProblems; did you mean @JsonlProblems\?"),
        (
            ["train.problems = @qqq()"],
            "there is no @qqq; there are @Anchor, @Benchmark, @ChainArithmetic, ",
        ),
        (["train.probes = (@wrong_prefix_prob,)"], r"did you mean @wrong_prefix_probe\?"),
        (["train.seed = %seeed", "seed = 3"], r"%seeed is used but never .*; did you mean %seed\?"),
        (["num_steps = 3"], r"num_steps would be ignored: .*; did you mean train.num_steps\?$"),
        (["import colorsys", "seed = 3"], r"seed would be ignored: .*; did you mean \w+.seed\?$"),
        (
            ["JsonlProblems.path = 'x'"],
            "JsonlProblems.path would .*: this experiment uses no @J",
        ),
        (["skip_first.num_tokens = 2"], "skip_first.num_tokens would be ignored"),
        (["train.num_steps = 'many'"], "train.num_steps"),
        (["train.num_steps = 0"], "train.num_steps"),
        (["train.problems = @JsonlProblems"], "train.problems"),
        (["train.heldout = 'my.jsonl'"], "train.heldout"),
        (["teacher.model = @PretrainedModel"], "teacher.model"),
        (["train.seed = %seed"], "^gin: the macro %seed is used but never defined$"),
        (["train.heldout = none"], "line 1: Failed to parse token 'none'"),
        (["divergence.clip = 'hard'"], "divergence.clip"),
        (["train.model = None"], "train.model"),
        (["train.num_steps ="], "Unable to parse"),
        (["train.probes = ("], "^gin: bindings: .*EOF in multi-line"),
        (["heldoutt/ChainArithmetic.num_problems = 3"], "heldoutt/.*in use are heldout, train"),
        (
            ["heldout/evaluate.num_problems = 3"],
            "heldout/evaluate.num_problems .*leave out heldout/",
        ),
        (
            ["train.completions = @References()", "References.template = '1 = 2'"],
            "References.templ",
        ),
        (
            ["train.completions = @References()", "References.template = '{solution} {sol}'"],
            r"References.template .*\{sol\}'$",
        ),
        (
            ["train.dtype = 'float16'"],
            "^train.dtype must be 'float32' or 'bfloat16', not 'float16'",
        ),
        (
            ["train.attention = 'flash'"],
            "^train.attention must be 'xla', 'splash' or 'cudnn' or None, not 'flash'",
        ),
        (
            [
                "train.model = @PretrainedModel()",
                "PretrainedModel.path = 'x'",
                "PretrainedModel.dtype = 'float16'",
            ],
            "^PretrainedModel.dtype must be 'float32' or",
        ),
        (
            ["TestbedBase.warm_start = @WarmStart()", "WarmStart.num_steps = 0"],
            "^WarmStart.num_steps must be an integer >= 1, not 0",
        ),
        (["train.num_steps = True"], "train.num_steps must be an integer >= 1, not True"),
        (["train.seed = 99999999999999999999"], "train.seed .*32 bits"),
        (["evaluate.seed = -1"], "evaluate.seed must be an integer >= 0 and <= 4294967295, not -1"),
        (["ChainArithmetic.seed = -1"], "ChainArithmetic.seed must be an integer >= 0"),
        (
            ["TestbedBase.warm_start = @WarmStart()", "WarmStart.seed = -1"],
            "WarmStart.seed must be an integer >= 0",
        ),
        (
            ["train.model = @RandomModel()", "RandomModel.seed = -1"],
            "RandomModel.seed must be an integer >= 0",
        ),
        (["train.learning_rate = 1e999"], "train.learning_rate must be a number > 0, not inf"),
        (
            ["train.remat = 'no'"],
            "train.remat must be True or False or 'keep_projections' or 'offload_projections', "
            "not 'no'",
        ),
        (["train.lora = 'lora'"], r"train.lora must be @lora\(\) or None, not 'lora'"),
        (["train.lora = @lora"], "train.lora .*not @lora without parentheses"),
        (["train.lora = @lora()", "lora.rank = 1.5"], "lora.rank must be an integer"),
        (["train.lora = @lora()", "lora.alpha = 'x'"], "lora.alpha must be a number"),
        (["train.lora = @lora()", "lora.targets = 'q_proj'"], r"lora.targets .*\(text in quotes,"),
        (["train.keep_checkpoints = 'all'"], "train.keep_checkpoints must be an integer"),
        (["train.grader_workers = '2'"], "train.grader_workers"),
        (["train.probes = @wrong_prefix_probe"], r"train.probes must be a tuple \(a function, "),
        (["train.problems = @RandomModel()"], "train.problems must be problems such as"),
        (["train.model = @train/ChainArithmetic()"], "train.model must be a model such as"),
        (["train.objective = @StudentRollouts()"], "train.objective must be an objective"),
        (["TestbedBase.warm_start = @WarmStart"], r"TestbedBase.warm_start must be @WarmStart\(\)"),
        (["teacher.model = @train/ChainArithmetic()"], "teacher.model must be a model"),
        (
            ["rollout.stop_ids = 5"],
            r"rollout.stop_ids must be a tuple \(an integer >= 0, ...\), not 5",
        ),
        (["rollout.stop_ids = ('</s>',)"], "rollout.stop_ids"),
        (["rollout.max_new_tokens = 18.5"], "rollout.max_new_tokens must be an integer"),
        (["rollout.temperature = 'hot'"], "rollout.temperature must be a number"),
        (["contexts.student_max_tokens = '1k'"], "contexts.student_max_tokens must be an integer"),
        (
            ["contexts.student_thinking = 'yes'"],
            "contexts.student_thinking .*True or False or None",
        ),
        (
            ["divergence.weights = (@skip_first,)", "skip_first.num_tokens = 'x'"],
            "skip_first.num_t",
        ),
        (
            ["divergence.weights = (@skip_first,)", "skip_first.num_tokens = -1"],
            "skip_first.num_tokens must be an integer >= 0, not -1",
        ),
        (
            ["divergence.target = @target_barycentre", "target_barycentre.alpha = 2"],
            "target_barycentre.alpha must be a number >= 0 and <= 1, not 2",
        ),
        (["divergence.beta = 2"], "divergence.beta must be strictly between 0 and 1, not 2: the"),
        (["divergence.beta = 0"], "divergence.beta must be strictly between 0 and 1, not 0: the"),
        (
            [*SAMPLED_TOKEN, "rollout.top_p = 0.95"],
            "'sampled_token' is biased where some tokens are never sampled: set rollout.temp",
        ),
        (
            [*SAMPLED_TOKEN, "train.completions = @References()"],
            "'sampled_token' needs completions that were sampled",
        ),
        (["optimizer.b1 = 1.5"], "optimizer.b1 must be a number >= 0 and < 1, not 1.5"),
        (["optimizer.b2 = 1.0"], "optimizer.b2"),
        (["optimizer.eps = -1.0"], "optimizer.eps must be a number > 0, not -1.0"),
        (["optimizer.warmup_steps = -5"], "optimizer.warmup_steps must be an integer >= 0, not -5"),
        (["optimizer.weight_decay = -0.1"], "optimizer.weight_decay"),
        (["optimizer.max_grad_norm = 'x'"], "optimizer.max_grad_norm must be a number"),
        (["evaluate.seed = 'a'"], "evaluate.seed"),
        (["train.heldout = @JsonlProblems()", "JsonlProblems.path = 5"], "JsonlProblems.path must"),
    ],
)
def test_a_bad_binding_is_told_in_one_line(bindings, words):
    with pytest.raises(UserError, match=words) as caught:
        load_experiment([QUICKSTART], bindings)
    assert "\n" not in str(caught.value)


def test_scopes_of_references_that_were_replaced_are_no_error():
    """An experiment that takes other problems keeps the bindings of the ones it includes."""
    jsonl = ["train.problems = @JsonlProblems()", "JsonlProblems.path = 'x.jsonl'"]
    experiment, _ = load_experiment([QUICKSTART], [*jsonl, "train.heldout = None"])
    assert experiment.train.problems.path == os.path.abspath("x.jsonl")


def test_what_the_last_file_binds_in_vain_is_told_and_what_it_includes_is_not(tmp_path, caplog):
    mine = tmp_path / "mine.gin"
    mine.write_text(f'include "{QUICKSTART}"\nspare = 1\nReasoningGym.seed = 1\ntrain.seed = 2\n')
    load_experiment([str(mine)])
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"{mine}: ReasoningGym.seed would be ignored: this experiment uses no @ReasoningGym",
        f"{mine}: spare would be ignored: nothing reads %spare",
    ]
    caplog.clear()
    load_experiment([QUICKSTART], ["train.heldout = None", "heldout/ChainArithmetic.seed = 1"])
    assert "heldout/ChainArithmetic.seed would be ignored" in caplog.records[0].getMessage()
    caplog.clear()
    load_experiment([str(mine), QUICKSTART])
    assert not caplog.records


@pytest.mark.parametrize("name", [*AREAS, *SOURCES])
def test_the_nearest_field_is_the_one_that_was_meant(name):
    known = {name: resolve(name) for name in (*AREAS, name)}
    for field in inspect.signature(known[name]).parameters:
        for typo in (field[1:], field[:-1], field[1:2] + field[:1] + field[2:], f"{field}s"):
            told = nearest_field(name, typo, known)
            fields = set(inspect.signature(known[name]).parameters)
            if len(field) > 5 and typo not in fields:
                meant = {told} & {f"; did you mean {area}.{field}?" for area in known}
                assert meant or told.split(".")[-1].rstrip("?") == typo, (typo, told)


def test_braces_of_mathematics_are_no_placeholder():
    template = "{answer}: $x^{n}$, \\boxed{answer}, {} and {1}"
    assert References(template).template == template


def test_what_a_script_has_silenced_stays_silent():
    logging.disable(logging.INFO)
    try:
        load_experiment(QUICKSTART)
        assert logging.root.manager.disable == logging.INFO
    finally:
        logging.disable(logging.NOTSET)


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match="nowhere.gin"):
        load_experiment(["nowhere.gin"])


def test_what_is_required_is_named():
    with pytest.raises(UserError, match="^train.model and train.problems must be bound"):
        load_experiment([str(EXPERIMENTS / "base.gin")])


def test_first_difference_names_the_binding_and_ignores_what_is_free():
    _, one = load_experiment([QUICKSTART])
    _, other = load_experiment([QUICKSTART], ["train.seed = 5"])
    assert "train.seed was 0 and is now 5" in first_difference(one, other)
    _, longer = load_experiment([QUICKSTART], ["train.num_steps = 600", "mesh.model = 2"])
    assert first_difference(one, longer) is None
    assert "train.num_steps" in FREE_TO_CHANGE


@pytest.mark.parametrize(
    "damage", ["", "train.seed = (", "train.seed = 'x'", "\0", "no gin at all"]
)
def test_a_damaged_config_of_a_run_is_named(damage, tmp_path):
    path = tmp_path / "config.gin"
    path.write_text(damage)
    for bindings in ((), ("train.seed = 1",)):
        with pytest.raises(UserError, match=f"^{path}: ") as caught:
            load_run(str(path), (), bindings)
        assert "\n" not in str(caught.value)


def test_a_binding_that_scopes_bind_again_is_refused(tmp_path, caplog):
    """Gin would take that of the scope, and say nothing."""
    words = "ChainArithmetic.num_problems would be ignored: heldout/ChainArithmetic.num_problems"
    words += " and other/ChainArithmetic.num_problems is what is read; bind that"
    lines = ["train.problems = @other/ChainArithmetic()", "other/ChainArithmetic.num_problems = 5"]
    unscoped = "ChainArithmetic.num_problems = 6"
    with pytest.raises(UserError, match=words):
        load_experiment([QUICKSTART], [*lines, unscoped])
    # One of them still reads it; and a binding of the scope is meant to win over the file's.
    experiment, _ = load_experiment([QUICKSTART], [lines[0], unscoped])
    assert experiment.train.problems.num_problems == 6
    load_experiment([QUICKSTART], lines)
    assert not caplog.records
    # A file that hides its own line is told.
    (tmp_path / "mine.gin").write_text("\n".join([f'include "{QUICKSTART}"', *lines, unscoped]))
    load_experiment([str(tmp_path / "mine.gin")])
    assert words in caplog.records[0].getMessage()


def test_a_binding_that_a_runs_config_has_scopes_for_is_refused(tmp_path, caplog):
    """So it is where one asks a run something else: its config.gin names every scope."""
    _, text = load_experiment([QUICKSTART], ["train.problems = @a/ChainArithmetic()"])
    config, more = tmp_path / "config.gin", tmp_path / "more.gin"
    config.write_text(text)
    words = "ChainArithmetic.seed would be ignored: a/ChainArithmetic.seed and heldout/Chain"
    with pytest.raises(UserError, match=words):
        load_run(str(config), bindings=["ChainArithmetic.seed = 8"])
    assert load_run(str(config), bindings=["a/ChainArithmetic.seed = 8"])
    more.write_text("ChainArithmetic.seed = 8")
    load_run(str(config), [str(more)])
    assert f"{more}: {words}" in caplog.records[0].getMessage()
