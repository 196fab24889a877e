# SPDX-License-Identifier: Apache-2.0
"""Whole runs from Python: what a notebook does with `train`, `evaluate`, `load_run` and `plot`."""

import dataclasses
import json
import signal
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import opsd_jax
from opsd_jax.evaluation.runs import ACCURACY, TOKENS
from opsd_jax.host.chips import compile_clock
from opsd_jax.run.gin_text import gin_lines
from opsd_jax.run.loop import Loop
from opsd_jax.run.notebook import TrainingRun
from tests.run.test_train import QUICKSTART, TINY

SMALL = [*TINY, "evaluate.greedy = False", "evaluate.roles = ('student',)"]  # few programs
RATE = "train.learning_rate = 5e-4"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Three steps in two calls of one process: the first is stopped in the middle of step 1.

    The stop button of a notebook is SIGINT.
    """
    workdir, report = tmp_path_factory.mktemp("run"), Loop.report

    def stop(self, step, *rest):
        if step.number == 1:
            signal.raise_signal(signal.SIGINT)
        return report(self, step, *rest)

    before, bindings = signal.getsignal(signal.SIGINT), [*SMALL, "train.num_steps = 3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "report", stop)
        run = opsd_jax.train(QUICKSTART, workdir, bindings)
    assert 1 <= run.last_step < 3 and signal.getsignal(signal.SIGINT) is before
    assert (workdir / "checkpoints" / str(run.last_step)).is_dir()
    assert opsd_jax.train(QUICKSTART, workdir, bindings).last_step == 3
    return workdir


def test_metrics_are_arrays_that_keep_in_step(workdir):
    run = opsd_jax.load_run(workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    np.testing.assert_array_equal(run.steps, [0, 1, 2, 3])
    for name in ("loss/divergence", ACCURACY, TOKENS):
        wanted = [line.get(name) for line in lines]
        assert run.metrics[name].dtype == np.float64
        np.testing.assert_array_equal(run.metrics[name], np.array(wanted, float))
    assert np.isnan(run.metrics["loss/divergence"][0])
    with pytest.raises(opsd_jax.UserError, match="no step has .* did you mean eval/student/acc"):
        run.metrics["eval/student/acuracy"]
    assert run.settings["train.num_steps"] == "3"


def test_a_run_shows_samples_itself_and_its_student(workdir):
    run = opsd_jax.load_run(str(workdir))
    assert {row["role"] for row in run.samples()} == {"student"}
    assert run.samples(0) != run.samples()
    with pytest.raises(opsd_jax.UserError, match=r"no samples of step 7; it has steps \[0, 3\]"):
        run.samples(7)
    tokens, accuracy = run.metrics[TOKENS][-1], run.metrics[ACCURACY]
    assert repr(run) == (
        f"TrainingRun({str(workdir)!r}, step 3 of 3, {tokens:,.0f} generated tokens, "
        f"{ACCURACY} {accuracy[0]:.3f} -> {accuracy[-1]:.3f})"
    )
    logits = opsd_jax.forward(run.model, run.student, [run.tokenizer.encode("1+2?")])
    assert logits.shape == (1, 3, 37) and np.isfinite(logits).all()


def test_evaluate_gives_what_training_logged(workdir, capsys):
    run = opsd_jax.load_run(workdir)
    found = opsd_jax.evaluate(workdir)
    assert found["step"] == 3 and found[ACCURACY] == run.metrics[ACCURACY][-1]
    few = opsd_jax.evaluate(workdir, bindings="evaluate.num_problems = 8", step=0)
    assert few["step"] == 0 and few["eval/student/num_problems"] == 8
    assert capsys.readouterr().out == ""


def test_a_repeated_call_compiles_nothing_again(tmp_path):
    """Although every call makes its functions anew, and this process is told to forget them."""
    bindings = [*TINY, "train.num_steps = 1", "train.heldout = None", "train.eval_every_steps = 0"]
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        for number in (0, 1):
            jax.clear_caches()
            with compile_clock() as clock:
                opsd_jax.train(QUICKSTART, tmp_path / str(number), bindings)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert clock.programs == clock.read > 2, vars(clock)


def test_in_a_notebook_there_is_a_panel(workdir, monkeypatch):
    shown = []
    display = types.SimpleNamespace(display=lambda data, **_: shown.append(data) or Handle())
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("opsd_jax.run.notebook.in_notebook", lambda: True)
    run = opsd_jax.train(QUICKSTART, workdir, [*SMALL, "train.num_steps = 3"])
    assert "from step 3" in shown[0]["text/plain"] or "model: random" in shown[0]["text/plain"]
    assert "student: accuracy, sampled" in run._repr_html_()


class Handle:
    def update(self, data, raw):
        pass


def test_what_is_wrong_is_a_user_error(workdir, tmp_path):
    for wrong, words in (
        (lambda: opsd_jax.load_run(tmp_path / "none"), "no such folder"),
        (lambda: opsd_jax.train("none.gin", tmp_path / "run"), "none.gin"),
        (lambda: opsd_jax.train(QUICKSTART, workdir, SMALL + ["train.seed = 5"]), "train.seed was"),
        (lambda: opsd_jax.evaluate(tmp_path / "model"), "gin_file"),
        (lambda: opsd_jax.evaluate("smollm2", step=3), "does not apply"),
        (lambda: opsd_jax.plot([]), "at least one run"),
        (lambda: opsd_jax.plot(workdir, y="eval/acuracy"), "did you mean"),
    ):
        with pytest.raises(opsd_jax.UserError, match=words):
            wrong()


def test_an_experiment_changed_in_python_is_kept_as_gin(workdir, tmp_path):
    experiment, _ = opsd_jax.load_experiment([QUICKSTART], [*TINY, "train.num_steps = 1"])
    settings = dataclasses.replace(experiment.train, num_steps=3, learning_rate=0.25)
    experiment = dataclasses.replace(experiment, train=settings)
    found, text = opsd_jax.load_experiment([], gin_lines(experiment))
    assert found == experiment and "train.learning_rate = 0.25" in text
    with pytest.raises(opsd_jax.UserError, match="train.probes.0 = .* cannot be kept"):
        mine = dataclasses.replace(settings, probes=(lambda *_: {},))
        opsd_jax.train(dataclasses.replace(experiment, train=mine), tmp_path)
    assert not (tmp_path / "config.gin").exists()


def test_every_experiment_is_the_same_after_it_was_written_as_gin():
    count = 0
    for path in sorted(Path(QUICKSTART).parent.rglob("*.gin")):
        if path.parent.name == "eval" or path.name in ("base.gin", "recipe.gin"):
            continue  # Parts of an experiment.
        experiment, _ = opsd_jax.load_experiment(str(path))
        if experiment.imports:
            continue  # What its own modules bring can be named by no config.
        assert opsd_jax.load_experiment([], gin_lines(experiment))[0] == experiment, path
        count += 1
    assert count > 20


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda run: opsd_jax.load_run("/no/such"), "^/no/such: no such folder"),
        (lambda run: opsd_jax.load_run(run / "samples"), "samples: neither config.gin nor metrics"),
        (lambda run: opsd_jax.report(run, levels=[80]), "^levels: an accuracy lies in"),
        (
            lambda run: opsd_jax.evaluate(run / "samples"),
            "no training workdir; a model needs gin_f",
        ),
        (lambda run: opsd_jax.evaluate(run, step="bst"), "step must be a number, 'best' or None"),
        (lambda run: opsd_jax.evaluate(run, step=9), r"has no step 9, only \[\d, 3\]"),
        (
            lambda run: opsd_jax.evaluate(run, bindings="x.y = 1"),
            "there is no x; .* bindings, line",
        ),
        (lambda run: opsd_jax.evaluate(run, bindings="X = 1"), "^gin bindings: X would be ignored"),
        (lambda run: opsd_jax.tokens(run, num=0), "^num must be an integer >= 1, not 0"),
        (lambda run: opsd_jax.tokens(run, seed=-1), "^seed must be an integer >= 0"),
        (lambda run: opsd_jax.tokens(run / "samples"), "samples: no config.gin there"),
        (lambda run: opsd_jax.load_experiment("no.gin"), "^gin file no.gin: no such file"),
        (
            lambda run: opsd_jax.train(QUICKSTART, run, [*SMALL, "train.num_steps = 4", RATE]),
            "train.learning_rate was .*; use another workdir, or the old setting",
        ),
    ],
)
def test_what_is_refused_names_arguments_and_no_flag(workdir, call, words):
    with pytest.raises(opsd_jax.UserError, match=words) as refused:
        call(workdir)
    assert "--" not in str(refused.value)


def test_plot_draws_every_point_and_a_band_over_seeds(workdir):
    pytest.importorskip("matplotlib")
    run = opsd_jax.load_run(workdir)
    figure = opsd_jax.plot(run, y=[ACCURACY, "loss/divergence"])
    for axes, name in zip(figure.axes, (ACCURACY, "loss/divergence"), strict=True):
        (line,) = axes.lines
        np.testing.assert_array_equal(line.get_xydata(), run.series(name, TOKENS))
    assert figure.axes[0].get_xlabel() == "generated tokens"
    figure = opsd_jax.plot({"ours": [workdir, run], "other": str(workdir)}, x="step")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["ours (2 runs)", "other"] and len(figure.axes[0].collections) == 1


def test_a_run_that_was_never_evaluated_has_no_samples(tmp_path):
    run = TrainingRun(tmp_path, None, "", [])
    with pytest.raises(opsd_jax.UserError, match=r"has no samples; it has steps \[\]"):
        run.samples()


def test_plot_names_the_extra(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(opsd_jax.UserError, match=r"needs matplotlib: pip install '\.\[plot\]'"):
        opsd_jax.plot(workdir)


def test_a_batch_by_hand_says_which_prompt_is_too_long():
    problems = opsd_jax.ChainArithmetic(num_problems=3).load(None)
    asks, tells = dict.fromkeys(("student", "evaluation"), "{question}?"), "{question}|{solution}?"
    teacher, view = {"teacher": tells}, {"teacher": "{question}?", "views": (tells,)}
    for templates, name in ((teacher, "teacher"), (view, r"views\[0\]")):
        contexts = opsd_jax.ContextConfig(**asks, **templates, teacher_max_tokens=9)
        told = f"its {name} prompt is over contexts.teacher_max_tokens = 9"
        with pytest.raises(opsd_jax.UserError, match=told):
            opsd_jax.make_batch(contexts, opsd_jax.ChainTokenizer(), problems)
    model = opsd_jax.Decoder(opsd_jax.ModelConfig(37, 1, 8, 1, 1, 8, 8))
    variables = opsd_jax.random_variables(model, jax.random.key(0))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))
