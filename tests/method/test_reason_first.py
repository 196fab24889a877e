# SPDX-License-Identifier: Apache-2.0
"""Reason first: contexts built by hand in Python lists, texts read in full, steps on any mesh."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_jax.errors import UserError
from opsd_jax.main import main
from opsd_jax.method.batch import Batch
from opsd_jax.method.completions import TeacherRollouts
from opsd_jax.method.reason_first import Reasoner, ReasonFirst
from opsd_jax.method.train_step import sample_completion, update
from opsd_jax.model.head import head_logits, output_head
from opsd_jax.run.config import load_experiment
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.prompts import Completion, Context
from tests.experiments.test_baselines import QUICKSTART, graded_steps
from tests.method.test_train_step import MESHES, assert_same_run, method_of, run_steps, state_of
from tests.run.test_train import command
from tests.tiny import text_hidden, tiny_batch, tiny_config, tiny_variables

CONFIG = tiny_config(num_layers=1)
PAD, STOPS, TRANSITION = 0, (3, 5), (7, 4)
REASONER = ReasonFirst(max_new_tokens=5).build(
    RolloutConfig(max_new_tokens=6, stop_ids=STOPS, pad_id=PAD), list(TRANSITION)
)


def rows_of(context: Context) -> list[list[int]]:
    pairs = zip(context.ids.tolist(), context.lengths.tolist(), strict=True)
    return [ids[:length] for ids, length in pairs]


def read_by_hand(prompts: Context, analysis: Completion, transition=TRANSITION) -> list[list[int]]:
    """What the teacher reads in each row, from the ids alone."""
    rows = []
    for b, prompt in enumerate(rows_of(prompts)):
        written = [int(i) for i in analysis.ids[b][np.asarray(analysis.mask[b])]]
        if written[-1:] and written[-1] in STOPS:
            written.pop()
        rows.append([*prompt, *written, *transition])
    return rows


def padded(rows: list[list[int]], width: int) -> Context:
    ids = [row + [PAD] * (width - len(row)) for row in rows]
    return Context(jnp.array(ids, jnp.int32), jnp.array([len(row) for row in rows], jnp.int32))


def sampled(method, batch, state=None) -> Completion:
    return jax.jit(partial(sample_completion, method))(state or state_of(method), batch)


IDS = st.sampled_from([i for i in range(1, 10) if i not in STOPS])
ROW = st.tuples(
    st.lists(IDS, min_size=1, max_size=4), st.lists(IDS, max_size=4), st.sampled_from([*STOPS, 0])
)


@given(st.lists(ROW, min_size=1, max_size=4), st.lists(IDS, max_size=3))
@settings(max_examples=60, deadline=None)
@pytest.mark.slow
def test_contexts_are_compact_and_without_stop_tokens(rows, transition):
    """Ragged prompts, analyses that are empty, stopped, or cut by the limit."""
    analyses = []
    for _, written, stop in rows:
        text = [*written, stop] if stop else (written + [9] * 5)[:5]
        analyses.append(text)
    analysis = Completion(
        ids=padded(analyses, 5).ids,
        mask=jnp.arange(5) < jnp.array([[len(text)] for text in analyses]),
        logps=jnp.zeros((len(rows), 5)),
        stopped=jnp.array([bool(stop) for *_, stop in rows]),
    )
    prompts = padded([prompt for prompt, *_ in rows], 4)
    reasoner = Reasoner(REASONER.settings, tuple(transition))
    found = reasoner.join(Batch(prompts, prompts), analysis)
    expected = read_by_hand(prompts, analysis, transition)
    assert rows_of(found.teacher) == expected and rows_of(found.student) == rows_of(prompts)
    assert found.teacher.ids.tolist() == padded(expected, 4 + 5 + len(transition)).ids.tolist()


def test_a_step_is_one_on_contexts_built_by_hand():
    """New weights and all metrics: so no gradient passes through what was written."""
    method = method_of(CONFIG, "live", reasoner=REASONER)
    state, batch = state_of(method), tiny_batch(8)
    completion = sampled(method, batch, state)
    by_hand = padded(read_by_hand(batch.teacher, completion.analysis), 20)
    told = dataclasses.replace(batch, teacher=by_hand)
    plain = dataclasses.replace(method, reasoner=None)
    new, metrics = jax.jit(partial(update, method))(state, batch, completion)
    silent = dataclasses.replace(completion, analysis=None)
    new_2, metrics_2 = jax.jit(partial(update, plain))(state, told, silent)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new.trainable, new_2.trainable
    )
    written = int(jnp.sum(completion.analysis.mask))
    assert metrics.pop("analysis/tokens") == written
    assert metrics.pop("analysis/length_mean") == written / 8
    cut = np.mean(~np.asarray(completion.analysis.stopped))
    assert 0 < metrics.pop("analysis/truncated_fraction") == cut < 1
    assert metrics.pop("rollout/tokens") == metrics_2.pop("rollout/tokens") + written
    assert metrics.keys() == metrics_2.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, metrics_2[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_the_teacher_scores_the_whole_text():
    """Token by token: its log-probabilities are those of the text read without cache or batch."""
    method = method_of(CONFIG, "snapshot", reasoner=REASONER, completions=TeacherRollouts())
    state, batch = state_of(method), tiny_batch(4)
    teacher = tiny_variables(CONFIG, seed=1)
    state = dataclasses.replace(state, teacher=teacher)
    completion = sampled(method, batch, state)
    head, hidden = output_head(teacher["params"], CONFIG), text_hidden(CONFIG)
    for written, prompts in (
        (completion.analysis, rows_of(batch.teacher)),
        (completion, read_by_hand(batch.teacher, completion.analysis)),
    ):
        for b, t in zip(*np.nonzero(written.mask), strict=True):
            text = [*prompts[b], *written.ids[b, :t].tolist()]
            logps = jax.nn.log_softmax(head_logits(head, hidden(teacher, text)[-1:]))[0]
            np.testing.assert_allclose(written.logps[b, t], logps[written.ids[b, t]], atol=1e-5)
    _, metrics = jax.jit(partial(update, method))(state, batch, completion)
    mean = np.asarray(completion.logps)[np.asarray(completion.mask)].mean()
    np.testing.assert_allclose(metrics["teacher/nll_of_rollout"], -mean, rtol=1e-5)


def test_draws_of_completions_and_analyses_are_apart():
    """The student says the same with and without them; a group's rows have their own."""
    plain = method_of(CONFIG)
    batch = tiny_batch(8)
    batch = dataclasses.replace(batch, teacher=batch.student)
    run = jax.jit(partial(sample_completion, dataclasses.replace(plain, reasoner=REASONER)))
    one, other = sampled(plain, batch), run(state_of(plain), batch)
    assert one.analysis is None
    for name in ("ids", "mask", "logps", "stopped", "sampled_logps"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    # Equal weights and prompts, different texts.
    assert other.analysis.ids.tolist() != other.ids[:, :5].tolist()
    group = jax.tree.map(lambda x: jnp.repeat(x[:1], 8, axis=0), batch)
    analyses = run(state_of(plain), group).analysis.ids.tolist()
    assert len({tuple(ids) for ids in analyses}) > 2


@pytest.mark.slow
def test_halves_devices_and_micro_batches_change_nothing():
    """One program on 2 x 4 devices, against two halves on two devices with micro-batches."""
    method = method_of(CONFIG, "ema", reasoner=REASONER)
    whole = run_steps(method, MESHES["data 2 x model 4"], jax.devices(), num_steps=2)
    assert_same_run(whole, graded_steps(method, jax.devices()[:2], num_micro_batches=4))


def test_an_update_without_the_analysis_is_refused():
    method = method_of(CONFIG, reasoner=REASONER)
    batch = tiny_batch(2)
    ids = jnp.zeros((2, 6), jnp.int32)
    silent = Completion(ids, ids == 0, jnp.zeros((2, 6)), jnp.ones(2, bool))
    with pytest.raises(ValueError, match="without analysis"):
        jax.eval_shape(partial(update, method), state_of(method), batch, silent)


# ---- the command line

BINDINGS = (
    "teacher.reasons = @ReasonFirst()",
    "ReasonFirst.max_new_tokens = 3",
    "contexts.teacher = '{question}'",
    "contexts.analysis = '{question}|{solution}?'",
    "contexts.transition = '|'",
)


@pytest.mark.slow
def test_a_run_and_its_token_view(tmp_path):
    flags = ("train.num_steps = 2", "train.group_size = 2", "train.eval_every_steps = 0")
    assert main(command(tmp_path, *BINDINGS, *flags)) == 0
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").open())
    assert 1 <= first["analysis/length_mean"] <= 3
    total = sum(
        line["analysis/tokens"] + 8 * line["rollout/length_mean"] for line in (first, second)
    )
    assert second["rollout/tokens_total"] == total
    assert main(["tokens", f"--workdir={tmp_path}", "--num=3"]) == 0
    for line in map(json.loads, (tmp_path / "tokens" / "step_000002.jsonl").open()):
        assert line["teacher_prompt"].startswith(f"{line['question']}|#")
        assert line["analysis"].endswith("|")
    page = tmp_path / "page.html"
    assert main(["report", f"--workdir={tmp_path}", f"--out={page}"]) == 0
    assert "sample.analysis" in page.read_text()


@pytest.mark.parametrize(
    "bindings, words",
    [
        (["teacher.reasons = @ReasonFirst"], "teacher.reasons .*parentheses"),
        (["teacher.reasons = 512"], "teacher.reasons"),
        (["teacher.reasons = @ReasonFirst()", "ReasonFirst.max_new_tokens = 0"],
         "^ReasonFirst.max_new_tokens must be an integer >= 1"),
        (["teacher.reasons = @ReasonFirst()", "ReasonFirst.top_p = 0.0"], "^ReasonFirst.top_p"),
        (["contexts.analysis = 'Why?'"], "contexts.analysis"),
        (["teacher.reasons = @ReasonFirst()", "train.objective = @Likelihood()"], "of no use"),
        (["teacher.reasons = @ReasonFirst()", "train.objective = @PolicyGradient()",
          "train.group_size = 8"], "of no use"),
    ],
)  # fmt: skip
def test_bad_settings_are_told(bindings, words):
    with pytest.raises(UserError, match=words):
        load_experiment([QUICKSTART], bindings)


def test_what_the_analysis_is_asked():
    experiment, _ = load_experiment([QUICKSTART], BINDINGS)
    asked, evaluated = experiment.training_contexts, experiment.contexts
    assert asked.teacher == "{question}|{solution}?" and asked.teacher_thinking is False
    assert evaluated.teacher == "{question}" and asked.student == evaluated.student
    plain, _ = load_experiment([QUICKSTART])
    assert plain.training_contexts == plain.contexts
