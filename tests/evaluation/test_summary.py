# SPDX-License-Identifier: Apache-2.0
"""The table at the end of a run, worked out by hand."""

import json

from opsd_jax.evaluation.summary import summary


def test_accuracies_always_lengths_and_probes_where_they_move(tmp_path):
    def line(step, student, teacher, length, weak, **more):
        roles = {"student": student, "teacher": teacher}
        found = {"step": step, "probe/weak": weak, "probe/strong": 0.999, "probe/gone": None} | more
        for role, accuracy in roles.items():
            found |= {
                f"eval/{role}/accuracy": accuracy,
                f"eval/{role}/accuracy_se": 0.0216,
                f"eval/{role}/greedy_accuracy": accuracy,
                f"eval/{role}/length_mean": length if role == "student" else 18.0,
                f"eval/{role}/length_p90": length,
                f"eval/{role}/truncated_fraction": step / 1e6,
                f"eval/{role}/num_problems": 512.0,
            }
        return found

    lines = [
        line(0, 0.4922, 0.988, 1218.04, 0.297, **{"rollout/tokens_total": 0}),
        {"step": 30, "loss/divergence": 0.1, "rollout/tokens_total": 30000},
        line(60, 0.988, None, 18.0, 0.994, **{"rollout/tokens_total": 69119}),
        {"step": 61, "rollout/tokens_total": 70000},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert summary(tmp_path).splitlines() == [
        "                                        step 0         step 60",
        "student: accuracy, sampled        0.492 ±0.022    0.988 ±0.022",
        "student: accuracy, greedy                0.492           0.988",
        "student: tokens per answer             1,218.0            18.0",
        "teacher: accuracy, sampled        0.988 ±0.022               -",
        "teacher: accuracy, greedy                0.988               -",
        "generated tokens                             0          69,119",
        "probes: weak 0.297 -> 0.994",
    ]


def test_of_several_samples_the_vote_and_the_best_of_all(tmp_path):
    found = {"eval/student/accuracy": 0.5, "rollout/tokens_total": 7}
    found |= {f"eval/student/pass_at_{k}": 0.5 + k / 100 for k in (1, 2, 4)}
    found |= {"eval/student/maj_at_4": 0.625, "eval/student/truncated_fraction": 0.25}
    later = found | {"eval/student/truncated_fraction": 0.0}
    text = "".join(json.dumps({"step": i} | x) + "\n" for i, x in enumerate([found, later]))
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "config.gin").write_text("train.completions = @References()\n")
    assert [" ".join(row.split()) for row in summary(tmp_path).splitlines()] == [
        "step 0 step 1",
        "student: accuracy, sampled 0.500 0.500",
        "student: majority of 4 0.625 0.625",
        "student: best of 4 0.540 0.540",
        "student: cut at the limit 0.250 0.000",
        "target tokens 7 7",
    ]


def test_a_run_without_evaluations_says_so(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/divergence": 0.1}\n')
    assert "no evaluation was made" in summary(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")  # it was lost, and the run resumed
    assert summary(tmp_path) == "metrics.jsonl has no line of this run"
