# SPDX-License-Identifier: Apache-2.0
"""What another setting leaves unread is told where it was bound, and nowhere else."""

import logging

import pytest

from opsd_jax.run.config import load_experiment
from tests.run.test_train import ROOT

QUICKSTART = str(ROOT / "experiments" / "quickstart.gin")
GRPO = ("train.objective = @PolicyGradient()", "train.group_size = 8")


@pytest.mark.parametrize("bindings, told", [
    (("divergence.beta = 0.3",), "divergence.beta has no effect: divergence.name is not"),
    (("divergence.beta = 0.3", "divergence.name = 'jensen_shannon'"), None),
    (("divergence.beta = 0.3", "divergence.name = 'mixed_kl'"), None),
    (("divergence.beta = 0.5",), None),  # its default
    (("contexts.verdict_wrong = 'No.'",), "contexts.verdict_wrong has no effect: no context of"),
    (("contexts.verdict_wrong = 'n'", "contexts.teacher = '{question} {verdict}'"), None),
    (("divergence.clip = 'none'", "divergence.clip_threshold = 0.1"), "divergence.clip_threshold"),
    (("divergence.top_k = 8",), "divergence.top_k has no effect: divergence.support is 'full'"),
    (("divergence.top_k = 8", "divergence.support = 'teacher_top_k'"), None),
    (("teacher.ema_decay = 0.9",), "teacher.ema_decay has no effect: teacher.weights is not 'ema'"),
    (("teacher.ema_decay = 0.9", "teacher.weights = 'ema'"), None),
    (("contexts.views = ('answer',)",), "contexts.views has no effect"),
    (("contexts.views = ('answer',)", "divergence.target = @target_mean"), None),
    (("contexts.teacher_fallback = 'answer'",), "contexts.teacher_fallback has no effect"),
    (("contexts.teacher_fallback = 'answer'", "contexts.teacher = '{question} {hint}'"), None),
    (("contexts.teacher_fallback = 'answer'", "contexts.teacher = @own_solution"), None),
    ((*GRPO, "divergence.name = 'reverse_kl'"), "train.objective has no @Distillation()"),
    ((*GRPO, "divergence.name = 'reverse_kl'", "PolicyGradient.shape = @rlsd"), None),
])  # fmt: skip
def test_what_is_bound_and_unread_is_told(bindings, told, caplog):
    with caplog.at_level(logging.WARNING):
        load_experiment([QUICKSTART], bindings)
    if told is None:
        assert "has no effect" not in caplog.text
    else:
        assert told in caplog.text


def test_a_file_is_told_what_it_binds_itself(tmp_path, caplog):
    """The quickstart's clip, which it includes, is not its doing."""
    file = tmp_path / "mine.gin"
    lines = (f"include {QUICKSTART!r}", *GRPO, "divergence.top_k = 8")
    file.write_text("\n".join(lines))
    with caplog.at_level(logging.WARNING):
        load_experiment([str(file)], [])
    told = [record.getMessage() for record in caplog.records]
    assert [text for text in told if "has no effect" in text] == [
        f"{file}: divergence.top_k has no effect: train.objective has no @Distillation()"
    ]
