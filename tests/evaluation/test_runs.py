# SPDX-License-Identifier: Apache-2.0
"""Reading, grouping and tokens to an accuracy, against cases worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsd_jax.errors import UserError
from opsd_jax.evaluation.runs import (
    Group,
    Run,
    band,
    differing_settings,
    group_runs,
    newest,
    parse_workdir,
    reach,
    read_run,
    thinned,
    token_ratio,
    tokens_to_reach,
)


def run_of(accuracies, per_step=100, name="a", config="", label=None) -> Run:
    """Evaluated at every step, `per_step` generated tokens each."""
    history = [
        {"step": i, "eval/student/accuracy": a, "rollout/tokens_total": i * per_step}
        for i, a in enumerate(accuracies)
    ]
    return Run(Path(name), label, config, history)


def test_tokens_to_a_level_are_interpolated_at_the_first_crossing():
    run = run_of([0.5, 0.6, 0.8, 0.7, 0.9])
    assert tokens_to_reach(run, 0.7) == pytest.approx(150)  # half way from .6 to .8
    assert tokens_to_reach(run, 0.8) == pytest.approx(200)
    assert tokens_to_reach(run, 0.85) == pytest.approx(375)  # three quarters from .7 to .9
    assert tokens_to_reach(run, 0.4) == 0
    assert tokens_to_reach(run, 0.95) is None
    assert tokens_to_reach(run_of([]), 0.5) is None


def test_reach_over_seeds_and_the_ratio():
    fast = Group("fast", [run_of([0.5, 0.9]), run_of([0.5, 0.7, 0.9])])
    slow = Group("slow", [run_of([0.5] + [0.6] * 9 + [0.8]), run_of([0.5] * 21)])
    first, other = reach(fast, 0.7), reach(slow, 0.7)
    assert (first.num_reached, first.num_runs) == (2, 2)
    assert first.mean == pytest.approx((50 + 100) / 2)
    assert first.sd == pytest.approx(np.std([50, 100], ddof=1))
    # One run gets there after 950 tokens, the other not within its 2,000.
    assert (other.num_reached, other.num_runs, other.sd) == (1, 2, None)
    assert other.mean == pytest.approx(950) and other.at_least == pytest.approx(1475)
    assert token_ratio(first, other) == (pytest.approx(1475 / 75), True)
    assert token_ratio(first, first) == (pytest.approx(1.0), False)
    assert token_ratio(other, first) is None  # the first method does not always get there
    assert token_ratio(reach(fast, 0.4), other) is None  # needs nothing: no ratio


CONFIG = """
# Macros:
seed = {seed}
# Parameters for train:
train.seed = %seed
train.learning_rate = {rate}
train.num_steps = {seed}60
TestbedBase.warm_start = @WarmStart()
WarmStart.seed = {seed}
TestbedBase.cache_dir = '/somewhere/{seed}'
guard.window = %seed
"""


def test_runs_that_differ_by_their_seeds_are_one_group():
    runs = [
        run_of([], name=f"opsd_lr{rate}_seed{seed}", config=CONFIG.format(seed=seed, rate=rate))
        for rate in (1, 2)
        for seed in (3, 4, 5)
    ]
    groups = group_runs(runs)
    assert [(g.label, len(g.runs)) for g in groups] == [("opsd_lr1", 3), ("opsd_lr2", 3)]
    assert differing_settings(groups) == {"train.learning_rate": ["1", "2"]}
    assert runs[0].guard.window == 3


def test_a_name_loses_its_seed_and_no_other_number():
    names = ["tokens64", "tokens128", "x_s3", "loss2", "warm1_seed3", "quick-seed_4"]
    groups = group_runs([run_of([], name=name, config=f"a.b = '{name}'") for name in names])
    assert [g.label for g in groups] == [
        "tokens64",
        "tokens128",
        "x",
        "loss2",
        "warm1_seed3",
        "quick",
    ]


def test_labels_group_whatever_the_config_and_equal_names_are_told_apart():
    runs = [run_of([], config="a.b = 1", label="x"), run_of([], config="a.b = 2", label="x")]
    runs += [run_of([], name="p/run", config="a.b = 1"), run_of([], name="q/run", config="a.b = 2")]
    groups = group_runs(runs)
    assert [(g.label, len(g.runs)) for g in groups] == [("x", 2), ("run", 1), ("run (2)", 1)]


def test_a_workdir_flag_may_carry_a_label(tmp_path):
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert parse_workdir(str(odd)) == (None, odd)
    assert parse_workdir("OPSD=runs/x") == ("OPSD", Path("runs/x"))
    assert parse_workdir("runs/x") == (None, Path("runs/x"))
    with pytest.raises(UserError, match="label"):
        parse_workdir("=runs/x")


def test_a_run_is_read_as_far_as_it_goes(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is it a workdir"):
        read_run(tmp_path)
    (tmp_path / "config.gin").write_text("train.seed = 1\n")
    assert read_run(tmp_path).history == []  # begun, nothing logged yet
    good = [json.dumps({"step": s, "loss/divergence": v}) for s, v in ((0, 1.0), (1, None), (2, 3))]
    text = "\n".join([good[0], "[]", good[1], good[0], "\udcff", good[2], '{"step": 3, "lo'])
    (tmp_path / "metrics.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    run = read_run(tmp_path)
    assert [line["step"] for line in run.history] == [0, 1, 2]
    np.testing.assert_array_equal(run.series("loss/divergence"), [[0, 1], [2, 3]])
    assert run.series("no/such").shape == (0, 2)


def test_a_band_covers_what_all_seeds_have():
    one = np.array([[0, 0.0], [10, 1.0], [20, 3.0]])
    other = np.array([[5, 1.0], [25, 5.0]])
    found = band([one, other])
    np.testing.assert_allclose(found[:, 0], [5, 10, 20])
    np.testing.assert_allclose(found[:, 1], [(0.5 + 1) / 2, (1 + 2) / 2, (3 + 4) / 2])
    np.testing.assert_allclose(found[:, 2], np.array([0.5, 1, 1]) / np.sqrt(2))
    assert band([one]) is None and band([np.empty((0, 2)), one]) is None
    assert band([np.array([[0, 1.0]]), np.array([[5, 1.0]])]) is None
    assert len(band([np.stack([np.arange(999.0)] * 2, axis=1)] * 2, num_points=50)) == 50


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 80))
def test_thinning_keeps_order_and_range(values, limit):
    points = np.stack([np.arange(len(values)), values], axis=1)
    kept = thinned(points, limit)
    assert len(kept) == min(len(values), limit)
    assert (np.diff(kept[:, 0]) > 0).all()
    assert kept[:, 1].min() >= min(values) - 1e-6 and kept[:, 1].max() <= max(values) + 1e-6


@pytest.mark.parametrize("damage", ["guard.window =", "guard.window = %x", "guard.action = 'halt'"])
def test_a_damaged_config_is_named(damage):
    with pytest.raises(UserError, match="runs/a/config.gin is damaged where it binds guard"):
        print(Run(Path("runs/a"), None, f"train.seed = 0\n{damage}\n", []).guard)


def test_the_newest_texts_are_those_of_the_highest_step_of_any_length(tmp_path):
    assert newest(tmp_path) is None
    for step in (7, 999_999, 1_000_000):
        (tmp_path / f"step_{step:06d}.jsonl").touch()
    assert newest(tmp_path) == tmp_path / "step_1000000.jsonl"
