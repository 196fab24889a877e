# SPDX-License-Identifier: Apache-2.0
"""Sources of completions, methods on several devices, and every baseline file in two tiny steps."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from opsd_jax.data.contexts import ContextConfig
from opsd_jax.data.problems import Problem
from opsd_jax.data.references import ReferenceRows
from opsd_jax.data.tokenizer import HFTokenizer
from opsd_jax.errors import UserError
from opsd_jax.evaluation.report import CURVES
from opsd_jax.main import main
from opsd_jax.method.completions import MixedRollouts, References, StudentRollouts, TeacherRollouts
from opsd_jax.method.mix import Anchor, Distillation, Likelihood, Mix
from opsd_jax.method.optimizer import OptimizerConfig, make_optimizer
from opsd_jax.method.policy_gradient import PolicyGradient
from opsd_jax.method.train_step import init_state, jit_halves, sample_completion, state_shardings
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.model.sharding import (
    FULLY_SHARDED,
    MeshConfig,
    make_mesh,
    shard_batch,
    variable_shardings,
)
from opsd_jax.pretrained.export import save_pretrained
from opsd_jax.run.assembly import same_tokens, split_trainable
from opsd_jax.run.config import load_experiment
from opsd_jax.run.stepping import to_batch
from opsd_jax.sampling.prompts import Context
from opsd_jax.testbed.world import ChainTokenizer
from tests.data.test_tokenizer import byte_tokenizer
from tests.method.test_policy_gradient import method_of
from tests.method.test_train_step import moved
from tests.representatives import representatives
from tests.run.test_train import TINY
from tests.tiny import WordTokenizer, tiny_batch, tiny_config, tiny_variables

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
BASELINES = sorted((EXPERIMENTS / "baselines").glob("*.gin"))
METHOD_FILES = sorted((EXPERIMENTS / "methods").glob("*.gin"))
QUICKSTART = str(EXPERIMENTS / "quickstart.gin")
CLASSICS = ("grpo", "dr_grpo", "dapo", "sft")
CURVED = [*BASELINES, *(path for path in METHOD_FILES if path.stem in CLASSICS)]
# Those need another model, or a package and a finished run.
OUTSIDE = ("opsdc", "opsrd", "sd_zero", "gkd", "tinker_opd")
SLOW = [
    pytest.param(path, marks=pytest.mark.slow)
    for path in METHOD_FILES
    if path.stem not in (*CLASSICS, *OUTSIDE)
]


def sampled(source, **changes):
    method = method_of(Distillation(), completions=source, group_size=1, **changes)
    external = tiny_variables(changes["external"].config) if "external" in changes else None
    state = init_state(
        method,
        *split_trainable(tiny_variables(tiny_config())),
        jax.random.key(0),
        external=external,
    )
    return jax.jit(partial(sample_completion, method))(state, tiny_batch(8))


@pytest.mark.slow
def test_a_mixture_has_each_roles_own_rows():
    """Row for row what each role alone says, its log-probabilities included."""
    student, teacher = sampled(StudentRollouts()), sampled(TeacherRollouts())
    mixed = sampled(MixedRollouts(teacher_rows=1, of=4))
    from_teacher = np.arange(8) % 4 == 3
    assert student.ids[from_teacher].tolist() != teacher.ids[from_teacher].tolist()
    for name in ("ids", "mask", "stopped"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        pick = from_teacher.reshape(-1, *[1] * (ours.ndim - 1))
        assert getattr(mixed, name).tolist() == np.where(pick, theirs, ours).tolist()
    expected = np.where(from_teacher[:, None], teacher.logps, student.logps)
    np.testing.assert_allclose(mixed.logps, expected, atol=1e-5)


def test_an_external_teacher_may_have_another_shape():
    other = Decoder(tiny_config(num_layers=1, embed_dim=24))
    ours, theirs = sampled(TeacherRollouts()), sampled(TeacherRollouts(), external=other)
    assert ours.ids.tolist() != theirs.ids.tolist()


def test_references_are_whole_stop_at_their_end_and_are_never_cut():
    problem = Problem("p", "q", "one {answer} three", "7")
    tokenizer = WordTokenizer()
    words = tokenizer.encode("say one {answer} three 7")
    drop = ContextConfig("{question}", "{question} {solution}", "{question}")
    strict = dataclasses.replace(drop, too_long="error")
    rows = ReferenceRows(lambda p: {}, "say {solution} {answer}", tokenizer, 8, drop)
    row = rows(problem)
    assert row["reference_ids"].tolist() == [*words, 1, 0, 0] and row["reference_length"] == 6
    short = ReferenceRows(lambda p: {}, "say {solution} {answer}", tokenizer, 5, drop)
    assert short(problem) is None and short.dropped == {"p"}
    with pytest.raises(UserError, match="6 tokens"):
        ReferenceRows(lambda p: {}, "say {solution} {answer}", tokenizer, 5, strict)(problem)
    with pytest.raises(UserError, match="'p' has no answer"):
        ReferenceRows(lambda p: {}, "{answer}", tokenizer, 8, drop)(Problem("p", "q", "s", ""))
    prompt = {f"{role}_ids": np.ones((2, 3)) for role in ("student", "teacher")}
    prompt |= {f"{role}_length": np.ones(2) for role in ("student", "teacher")}
    batch = to_batch(prompt | {k: np.stack([v, v]) for k, v in row.items()}, group_size=2)
    completion = References()(None, None, batch, None, None)
    assert completion.ids.shape == (4, 8) and completion.mask.sum() == 24


def graded_steps(method, devices, num_micro_batches=1, num_steps=2):
    """As `run_steps`, of steps that are graded on the host by a fixed rule."""
    method = dataclasses.replace(method, num_micro_batches=num_micro_batches)
    mesh = make_mesh(MeshConfig(), devices)
    boxed = jax.eval_shape(lambda k: init_variables(method.model, k), jax.random.key(0))
    variables = variable_shardings(boxed, mesh, FULLY_SHARDED)
    start = init_state(
        method, *split_trainable(tiny_variables(method.model.config)), jax.random.key(0)
    )
    shardings = state_shardings(method, start, variables, mesh)
    state = jax.device_put(jax.tree.map(jax.numpy.copy, start), shardings)
    sample, learn = jit_halves(method, shardings, mesh, FULLY_SHARDED)
    found = []
    for seed in range(num_steps):
        rows = tiny_batch(16, seed=seed)
        rows = rows.replace(
            reference=Context(rows.teacher.ids[:, :5], rows.student.lengths % 5 + 1)
        )
        batch = shard_batch(rows, mesh)
        completion = sample(state, batch)
        rewards = np.asarray(completion.ids)[:, 0] % 2
        rewards = shard_batch(rewards.astype(np.float32), mesh)
        state, metrics = learn(state, batch, completion, rewards)
        found.append((jax.device_get(metrics), completion.ids.tolist()))
    return found, moved(state, start)


METHODS = {
    "grpo": dict(objective=Mix((PolicyGradient(), Anchor(weight=0.1))), num_updates=2),
    "sft": dict(objective=Likelihood(), completions=References()),
    "mix": dict(
        objective=Mix((PolicyGradient(weight=0.5, rows="right"), Distillation(rows="wrong"))),
        completions=MixedRollouts(),
        group_size=8,
    ),
}


@pytest.mark.parametrize("name", representatives(METHODS, "mix"))
def test_devices_and_micro_batches_change_nothing(name):
    """Invariant 7 for every method: same tokens, same metrics."""
    optimizer = make_optimizer(OptimizerConfig(), 1e-2)
    method = method_of(**(dict(optimizer=optimizer) | METHODS[name]))
    alone, _ = graded_steps(method, jax.devices()[:1])
    for devices, pieces in ((8, 1), (2, 4)):
        other, _ = graded_steps(method, jax.devices()[:devices], pieces)
        for (metrics, ids), (metrics_2, ids_2) in zip(alone, other, strict=True):
            assert ids == ids_2
            for key, value in metrics.items():
                np.testing.assert_allclose(metrics_2[key], value, rtol=3e-4, atol=5e-6, err_msg=key)


SHORT = ["train.num_steps = 2", "evaluate.greedy = False", "evaluate.roles = ('student',)"]


def objectives(path, workdir, bindings) -> list[float]:
    """The loss of each step of a run."""
    flags = [f"--gin_bindings={b}" for b in bindings]
    assert main(["train", f"--gin_file={path}", f"--workdir={workdir}", *flags]) == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    return [line["loss/objective"] for line in lines if "loss/objective" in line]


@pytest.mark.parametrize("path", SLOW, ids=lambda path: path.stem)
def test_every_method_runs_two_steps(path, tmp_path):
    tiny = [b.replace("max_new_tokens = 4", "max_new_tokens = 18") for b in TINY]
    tiny = [b for b in tiny if not b.startswith("teacher.weights")]
    found = objectives(path, tmp_path, tiny + SHORT)
    assert len(found) == 2 and np.isfinite(found).all()


@pytest.mark.parametrize("name", representatives(OUTSIDE))
def test_methods_of_another_model_run_two_steps(name, tmp_path):
    """Their own teacher, or their own world of chats, in small."""
    path = EXPERIMENTS / "methods" / f"{name}.gin"
    if name in ("opsdc", "opsrd", "sd_zero"):
        config = tiny_config(vocab_size=264, num_layers=1)
        tokenizer = HFTokenizer(byte_tokenizer())
        save_pretrained(str(tmp_path / "model"), config, tiny_variables(config), tokenizer)
        rows = ({"question": f"q{i}", "answer": f"{i}"} for i in range(16))
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = [
            f"PretrainedModel.path = '{tmp_path}/model'",
            "train.problems = @JsonlProblems()",
            f"JsonlProblems.path = '{tmp_path}/p.jsonl'",
            "JsonlProblems.solution_column = None",
            "train.heldout = None",
            "train.grader_workers = 0",
            "rollout.max_new_tokens = 4",
        ]
    else:
        own = [b for b in TINY if not b.startswith("teacher.weights")]
        own += ["teacher.model = @teacher/RandomModel()", "teacher/RandomModel.seed = 1"]
    found = objectives(path, tmp_path / "run", own + SHORT)
    assert len(found) == 2 and np.isfinite(found).all() and min(map(abs, found)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("path", CURVED, ids=lambda path: path.stem)
def test_every_baseline_runs_two_steps(path, tmp_path):
    tiny = [b for b in TINY if not b.startswith("teacher.weights")]
    tiny = [b.replace("max_new_tokens = 4", "max_new_tokens = 18") for b in tiny]
    if path.stem == "external_teacher":
        flags = [f"--gin_bindings={b}" for b in [*tiny, "train.num_steps = 1"]]
        run = ["train", f"--gin_file={QUICKSTART}", f"--workdir={tmp_path}/teacher", *flags]
        assert main(run) == 0
        tiny.append(f"FinishedRun.workdir = '{tmp_path}/teacher'")
    else:  # What else an evaluation compiles is no other for a baseline.
        tiny += ["evaluate.greedy = False", "evaluate.roles = ('student',)"]
    flags = [f"--gin_bindings={b}" for b in [*tiny, "train.num_steps = 2"]]
    command = ["train", f"--gin_file={path}", f"--workdir={tmp_path}/run", *flags]
    assert main(command) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert lines[2]["rollout/tokens_total"] > 0 and "eval/student/accuracy" in lines[2]
    rewarded = path.stem in ("grpo", "dr_grpo", "dapo", "opsd_reward")
    assert ("reward/zero_variance_fraction" in lines[1]) == rewarded
    assert main(["report", f"--workdir={tmp_path}/run", f"--out={tmp_path}/page.html"]) == 0
    imitates = path.stem.startswith("sft")
    expected = {"student/entropy", "student/nll_of_rollout", "rollout/reward_mean"}
    if rewarded:
        expected |= {"policy/clip_fraction", "reward/zero_variance_fraction"}
    if not imitates and (not rewarded or path.stem == "opsd_reward"):
        expected |= {"loss/divergence", "loss/clip_fraction", "teacher/entropy"}
    page = (tmp_path / "page.html").read_text()
    assert curves_of(page) == expected
    assert ("none is generated" in page) == imitates
    if path.stem == "external_teacher":
        assert main(["eval", f"--workdir={tmp_path}/run"]) == 0


def curves_of(page: str) -> set[str]:
    """Metrics with a chart of both steps, those that every run has left out."""
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    # A divergence's title goes on with which it is and its unit.
    charts = [(c["title"], c["series"][0]["lines"][0]) for c in data["charts"]]
    always = ("eval/", "optim/", "rollout/length", "rollout/truncated", "loss/divergence_")
    drawn = {
        metric
        for metric, title in CURVES.items()
        if any(known.startswith(title) and len(points) == 2 for known, points in charts)
    }
    return {metric for metric in drawn if not metric.startswith(always)}


@pytest.mark.parametrize(
    "bindings, words",
    [
        (["train.objective = @PolicyGradient()"], "train.group_size"),
        (["train.objective = @PolicyGradient"], "parentheses"),
        (["train.completions = 'teacher'"], "train.completions"),
        (["train.group_size = 7"], "multiple of train.group_size"),
        (
            ["train.objective = @PolicyGradient()", "train.group_size = 8",
             "train.completions = @References()"],
            "sampled",
        ),
        (["train.objective = @Mix()"], r"Mix.terms must be bound"),
        (
            ["train.objective = @Mix()", "Mix.terms = (@in/Mix(),)",
             "in/Mix.terms = (@Likelihood(),)"],
            "not another @Mix",
        ),
        (["Distillation.rows = 'varied'"], "different grades: set train.group_size"),
        (["Distillation.rows = ('wrong', 'x')"], r"must be 'all', .* or a tuple \('all', "),
        (["train.objective = @Mix()", "Mix.terms = ()"], r"must hold a term such as"),
        (["train.objective = @Mix()", "Mix.terms = (1,)"], r"a tuple \(an objective such as"),
        (
            ["train.objective = @Mix()", "Mix.terms = (@PolicyGradient(), @Distillation())",
             "train.group_size = 8", "rollout.temperature = 0.0"],
            "temperature above 0",
        ),
        *[
            (["train.objective = @PolicyGradient()", "train.group_size = 8", f"rollout.{one}"],
             "min_new_tokens = 0")
            for one in ("presence_penalty = 0.1", "repetition_penalty = 1.2", "min_new_tokens = 2")
        ],
        (
            ["train.objective = @Mix()", "train.group_size = 8",
             "Mix.terms = (@PolicyGradient(), @Anchor())", "teacher.weights = 'live'"],
            "initial policy",
        ),
        (["MixedRollouts.of = 1", "train.completions = @MixedRollouts()"], "MixedRollouts"),
        (["teacher.model = 'gpt'"], "teacher.model"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_told(bindings, words):
    with pytest.raises(UserError, match=words):
        load_experiment([QUICKSTART], bindings)


@pytest.mark.slow
def test_a_teacher_with_another_tokenizer_is_refused():
    class Other(ChainTokenizer):
        def decode(self, ids):
            return super().decode([(int(i) + 1) % self.vocab_size for i in ids])

    assert same_tokens(ChainTokenizer(), ChainTokenizer())
    assert not same_tokens(ChainTokenizer(), Other())
    assert not same_tokens(ChainTokenizer(), WordTokenizer())
