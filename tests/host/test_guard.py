# SPDX-License-Identifier: Apache-2.0
"""Alarms against cases worked out by hand, and what a run does about them."""

import json

import pytest

from opsd_jax.errors import UserError
from opsd_jax.host.guard import Alarm, Guard, GuardConfig, alarms, restored_step, write_verdict


def lines(**columns) -> list[dict]:
    """Metrics of steps 0, 1, …: name__with__slashes = values, None = not logged."""
    names = {name.replace("__", "/"): values for name, values in columns.items()}
    rows = zip(*names.values(), strict=True)
    return [
        {"step": i} | {n: v for n, v in zip(names, row, strict=True) if v is not None}
        for i, row in enumerate(rows)
    ]


def rung(config, history) -> list[tuple[int, str]]:
    return [(alarm.step, alarm.name) for alarm in alarms(config, history)]


def test_divergence_that_rises_from_its_minimum():
    # Means of 2: .35 .20 .10 .06 .12 .19; 1.9 x .06 is reached at step 5, but only .06 above.
    values = [0.4, 0.3, 0.1, 0.1, 0.02, 0.22, 0.16]
    config = GuardConfig(window=2, divergence_rise=1.9, divergence_floor=0.1)
    (alarm,) = alarms(config, lines(loss__divergence=values))
    assert alarm[:2] == (6, "divergence")
    assert "0.19" in alarm.reason and "0.06 at step 4" in alarm.reason
    low = GuardConfig(window=2, divergence_rise=1.9, divergence_floor=0.01)
    assert rung(low, lines(loss__divergence=values)) == [(5, "divergence")]


def test_a_single_noisy_step_is_no_alarm():
    values = [0.5, 0.1, 0.01, 0.01, 0.04, 0.01, 0.01, 0.01]
    assert rung(GuardConfig(), lines(loss__divergence=values)) == []


def test_entropy_is_judged_by_the_teachers_and_excused_when_solved():
    student = [0.8, 0.5, 0.05, 0.03]
    teacher = [0.4, 0.2, 0.1, 0.1]
    config = GuardConfig(window=1, entropy_fall=0.1)
    history = lines(student__entropy=student, teacher__entropy=teacher)
    assert rung(config, history) == [(3, "entropy")]  # .03 < .1 * .4
    assert rung(config, lines(student__entropy=student)) == [(2, "entropy")]  # .05 < .1 * .8
    solved = lines(student__entropy=student, rollout__reward_mean=[0.1, 0.6, 0.92, 0.97])
    assert rung(config, solved) == []


def test_a_gradient_of_nothing_for_a_whole_window():
    config, norms = GuardConfig(window=2), [0.0, 0.1, 0.0, 0.0, 0.0]
    assert rung(config, lines(optim__grad_norm=norms)) == [(3, "gradient")]
    solved = lines(optim__grad_norm=norms, rollout__reward_mean=[0.5, 0.9, 1.0, 1.0, 1.0])
    assert rung(config, solved) == []  # groups of right answers alone


def test_length_and_truncation():
    config = GuardConfig(window=1, length_rise=2.0, truncated_rise=0.25)
    history = lines(
        rollout__length_mean=[100, 150, 199, 201, 500],
        rollout__truncated_fraction=[0.5, 0.6, 0.74, 0.75, 0.7],
    )
    assert rung(config, history) == [(3, "length"), (3, "truncation")]


def test_accuracy_below_its_best_by_standard_errors():
    # hypot(.03, .04) = .05: at 4 errors the fall must exceed .20.
    history = lines(
        eval__student__accuracy=[0.5, 0.9, None, 0.71, 0.69],
        eval__student__accuracy_se=[0.05, 0.03, None, 0.04, 0.04],
    )
    (alarm,) = alarms(GuardConfig(num_standard_errors=4), history)
    assert alarm[:2] == (4, "student accuracy")
    assert "0.690 ± 0.040, after 0.900 ± 0.030 at step 1" in alarm.reason
    assert rung(GuardConfig(num_standard_errors=3), history) == [(3, "student accuracy")]
    teacher = [{k.replace("student", "teacher"): v for k, v in line.items()} for line in history]
    assert rung(GuardConfig(), teacher) == [(4, "teacher accuracy")]


def test_a_leaking_teacher_is_told_before_the_first_step():
    leaky = [{"step": 0, "probe/teacher/ok": 0.07, "probe/teacher/leak": 0.62}]
    assert rung(GuardConfig(), leaky) == [(0, "leakage")]
    assert rung(GuardConfig(), [leaky[0] | {"probe/teacher/leak": 0.05}]) == []


def test_missing_none_and_nan_metrics_are_passed_over():
    history = [{"step": 0}, {"step": 1, "loss/divergence": None}]
    history += [{"step": 2, "loss/divergence": float("nan"), "eval/student/accuracy": 0.5}]
    assert alarms(GuardConfig(window=1), history) == []


def test_line_by_line_is_the_same_and_each_alarm_rings_once():
    history = lines(loss__divergence=[0.1, 0.01, 0.5, 0.5, 0.001, 0.5])
    guard = Guard(GuardConfig(window=1, action="stop"))
    seen = [alarm for line in history for alarm in guard.see(line)]
    assert seen == guard.alarms == alarms(guard.config, history)
    assert [alarm.step for alarm in seen] == [2] and guard.ends_the_run
    assert not Guard(GuardConfig(action="stop")).ends_the_run


@pytest.mark.parametrize(
    "changes",
    [
        {"action": "pause"},
        {"window": 0},
        {"divergence_rise": 0.5},
        {"length_rise": 1.0},
        {"num_standard_errors": -1},
        {"entropy_fall": "low"},
    ],
)
def test_a_bad_setting_names_its_binding(changes):
    with pytest.raises(UserError, match=f"guard.{next(iter(changes))}"):
        GuardConfig(**changes)


def test_the_verdict_is_read_back(tmp_path):
    assert restored_step(tmp_path) is None
    write_verdict(tmp_path, [Alarm(40, "divergence", "0.3 again")], restore_step=30)
    assert restored_step(tmp_path) == 30
    assert json.loads((tmp_path / "guard.json").read_text())["alarms"][0]["step"] == 40
    write_verdict(tmp_path, [], None)
    assert restored_step(tmp_path) is None


_NO_STEPS = ("true", '"30"', "30.0", "-1", "Infinity", "[30]", "1" + "0" * 400)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "null", "[" * 100_000, "{}", *(f'{{"restore_step": {v}}}' for v in _NO_STEPS)],
)
def test_a_verdict_without_a_step_is_not_taken_for_the_latest(text, tmp_path):
    (tmp_path / "guard.json").write_text(text)
    with pytest.raises(UserError, match="guard.json is damaged"):
        restored_step(tmp_path)
