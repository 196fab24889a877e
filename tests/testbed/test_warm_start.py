# SPDX-License-Identifier: Apache-2.0
"""The warm start: its loss, its gate, its cache. The recipe itself runs in the quickstart test."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from opsd_jax.errors import UserError
from opsd_jax.model.decoder import Decoder
from opsd_jax.testbed import warm_start
from opsd_jax.testbed.corpus import CorpusConfig, write_rows
from opsd_jax.testbed.warm_start import (
    TESTBED_MODEL,
    BaseReport,
    WarmStartConfig,
    load_or_train,
    measure,
)
from tests.small_disk import small_disk

TINY = dataclasses.replace(
    TESTBED_MODEL, num_layers=1, embed_dim=16, num_heads=1, num_kv_heads=1, mlp_dim=16
)
SHORT = WarmStartConfig(num_steps=20, hinted_rows=4, plain_rows=4, require_gate=False)
GOOD = BaseReport(0.51, 0.40, 0.99, 0.73, 0.10, 0.74, 0.11, 0.30, 1.0)


@pytest.fixture(scope="module", autouse=True)
def measured():
    """Three rollouts are slow to compile: they run once, everything else takes a given report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm_start, "measure", lambda *_: GOOD)
        yield


@pytest.fixture(scope="module")
def cached(measured, tmp_path_factory):
    """A short, untaught base and the directory that keeps it."""
    place = tmp_path_factory.mktemp("cache")
    return place, load_or_train(SHORT, TINY, place, say=lambda line: None)


def test_loss_is_the_divergence_from_the_writer(cached):
    """Against float64 NumPy, position by position."""
    params = cached[1].params
    task, rng = SHORT.task, np.random.default_rng(3)
    kinds = []
    for shown in ("nothing", "feedback"):
        rows = write_rows(task, CorpusConfig(), rng, 3, shown)
        kinds.append((rows.ids, rows.targets, rows.target_fact))
    memory = task.memory.reshape(200, 10)
    loss = warm_start._loss(params, Decoder(TINY), np.float32(memory), kinds)

    divergences = []
    for ids, targets, fact in kinds:
        T, C = ids.shape[1], targets.shape[1]
        positions = np.tile(np.arange(T), (len(ids), 1))
        hidden, _ = Decoder(TINY).apply({"params": params}, ids, positions)
        logits = np.asarray(hidden, np.float64) @ np.asarray(params["lm_head"], np.float64).T
        for b in range(len(ids)):
            for t in range(C):
                z = logits[b, T - C + t - 1]
                logp = z - np.log(np.exp(z).sum())
                target = {int(targets[b, t]): 1.0}
                if fact[b, t] >= 0:
                    target = dict(enumerate(memory[fact[b, t]]))
                divergences.append(
                    sum(p * (np.log(p) - logp[v]) for v, p in target.items() if p > 0)
                )
    np.testing.assert_allclose(loss, np.mean(divergences), rtol=1e-5)


def test_a_base_is_trained_once_and_read_back_exactly(cached):
    place, base = cached
    lines = []
    again = load_or_train(SHORT, TINY, place, say=lines.append)
    assert len(lines) == 1 and "found" in lines[0]
    assert (again.report, again.num_steps) == (base.report, 20)
    jax.tree.map(np.testing.assert_array_equal, again.params, base.params)


def test_an_untaught_base_fails_the_gate(cached):
    config = dataclasses.replace(SHORT, answer_rows=4, feedback_rows=4)
    report = measure(Decoder(TINY), cached[1].params, config, num_problems=64)
    assert report.student == report.teacher == report.answer == 0.0
    assert "with an answer 0.000, weak with feedback 0." in report.summary()
    assert abs(report.feedback - 0.1) < 0.1
    assert abs(report.student_ok - 0.1) < 0.1 and abs(report.weak - 0.1) < 0.1
    assert len(report.failures()) >= 4
    plain = measure(Decoder(TINY), cached[1].params, SHORT, num_problems=64)
    assert {plain.answer, plain.answer_ok, plain.feedback, plain.feedback_ok} == {None}


def test_another_recipe_is_another_base(cached):
    place, base = cached
    before = set(place.iterdir())
    other = load_or_train(dataclasses.replace(SHORT, seed=1), TINY, place, say=lambda line: None)
    assert len(set(place.iterdir()) - before) == 1
    assert not np.array_equal(other.params["embed"], base.params["embed"])


@pytest.mark.parametrize("damage", ["truncate", "json", "recipe"])
def test_a_damaged_base_is_trained_again(cached, damage):
    place, base = cached
    load_or_train(SHORT, TINY, place, say=lambda line: None)
    (folder,) = (p for p in place.iterdir() if '"seed": 0' in (p / "base.json").read_text())
    if damage == "truncate":
        data = (folder / "base.safetensors").read_bytes()
        (folder / "base.safetensors").write_bytes(data[: len(data) // 2])
    elif damage == "json":
        (folder / "base.json").write_text("{")
    else:
        text = (folder / "base.json").read_text()
        (folder / "base.json").write_text(text.replace('"hinted_rows": 4', '"hinted_rows": 5'))
    lines = []
    again = load_or_train(SHORT, TINY, place, say=lines.append)
    assert "cannot be used" in lines[0]
    jax.tree.map(np.testing.assert_array_equal, again.params, base.params)
    assert not [p for p in place.iterdir() if p.name.startswith(".")]


def test_gate_passes_a_good_base_and_names_what_fails():
    assert GOOD.failures() == []
    for changes, word in (
        ({"student": 0.44}, "student accuracy 0.440"),
        ({"student": 0.58}, "student accuracy 0.580"),
        ({"student_greedy": 0.51}, "greedy accuracy 0.510"),
        ({"teacher": 0.94}, "teacher accuracy 0.940"),
        ({"teacher_ok": 0.69}, "differ by more than 0.03"),
        ({"answer": 0.94, "answer_ok": 0.73}, "accuracy 0.940 with a right answer"),
        ({"answer": 0.99, "answer_ok": 0.69}, "teacher with an answer (0.690)"),
        ({"feedback": 0.94, "feedback_ok": 0.73}, "belief 0.940 in weak facts after feedback"),
        ({"feedback": 0.99, "feedback_ok": 0.69}, "teacher with feedback (0.690) and student"),
    ):
        (failure,) = dataclasses.replace(GOOD, **changes).failures()
        assert word in failure
    taught = dataclasses.replace(GOOD, answer=0.95, answer_ok=0.75, feedback=0.95, feedback_ok=0.71)
    assert taught.failures() == []


def test_training_goes_on_until_the_gate_is_passed(monkeypatch):
    reports = iter([dataclasses.replace(GOOD, teacher=0.7), GOOD])
    monkeypatch.setattr(warm_start, "measure", lambda *_: next(reports))
    config = dataclasses.replace(SHORT, extra_steps=20, require_gate=True)
    base = warm_start.warm_start(config, TINY, say=lambda line: None)
    assert (base.report, base.num_steps) == (GOOD, 40)


def test_a_base_that_never_passes_is_refused(monkeypatch):
    bad = dataclasses.replace(GOOD, teacher=0.7)
    monkeypatch.setattr(warm_start, "measure", lambda *_: bad)
    config = dataclasses.replace(SHORT, extra_steps=20, max_rounds=2, require_gate=True)
    with pytest.raises(UserError, match="after 40 steps: teacher accuracy 0.700 is below 0.95"):
        warm_start.warm_start(config, TINY, say=lambda line: None)


def test_bad_recipes_are_refused():
    for fields in ({"num_steps": 0}, {"learning_rate": 0.0}, {"max_rounds": 0}):
        with pytest.raises(UserError, match="WarmStart"):
            WarmStartConfig(**fields)


def test_a_full_disk_is_told_and_leaves_nothing(cached, tmp_path, monkeypatch):
    monkeypatch.setattr(warm_start, "warm_start", lambda *_: cached[1])
    with small_disk(2000), pytest.raises(UserError, match=f"cannot write {tmp_path}: File too"):
        load_or_train(SHORT, TINY, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_noticed_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(warm_start, "warm_start", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    for folder in ("/dev/null", tmp_path / "file" / "cache"):
        with pytest.raises(UserError, match=f"cannot write to {folder}"):
            load_or_train(SHORT, TINY, folder)
