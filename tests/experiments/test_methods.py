# SPDX-License-Identifier: Apache-2.0
"""Loss and gradient of the methods that learn from rewards against float64 NumPy.

Two problems of three rows: one row is truncated, one has no teacher context, the second problem has
no right answer. Logits are given: hidden states are logits and the head is the identity.
"""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.data.attempts import Attempt, Group
from opsd_jax.data.training_prompts import AfterPrompts
from opsd_jax.method.batch import Batch, Policy
from opsd_jax.method.mix import Anchor
from opsd_jax.method.objective import Reader
from opsd_jax.method.policy_gradient import PolicyGradient
from opsd_jax.method.rows import GradedBatch
from opsd_jax.run.config import load_experiment
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.prompts import Completion, Context
from opsd_jax.testbed.probe import prompt_with
from opsd_jax.testbed.world import ChainTokenizer, own_notation
from tests.representatives import representatives

METHODS = Path(__file__).parents[2] / "experiments" / "methods"
B, C, V, STEP = 6, 4, 5, 10
LENGTHS = np.array([4, 2, 4, 3, 1, 4])
MASK = np.arange(C) < LENGTHS[:, None]
REWARDS = np.array([1.0, 0, 1, 0, 0, 0])
CONTEXT = np.array([True, True, True, False, True, True])
STOPPED = np.array([True, True, False, True, True, True])
SEEN = MASK & CONTEXT[:, None]  # tokens that a teacher with a context looks at
_rng = np.random.default_rng(0)
IDS = _rng.integers(0, V, (B, C))
STUDENT, TEACHER, PLAIN, INITIAL = _rng.normal(size=(4, B, C, V)) * 1.5
VIEWS = _rng.normal(size=(2, B, C, V)) * 1.5
# Ratios from .7 to 1.4, so that both clips act.
MOVED = _rng.uniform(-0.35, 0.35, (B, C))


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def at_ids(z):
    return np.take_along_axis(log_softmax(z), IDS[..., None], -1)[..., 0]


def entropy(z):
    return -(np.exp(log_softmax(z)) * log_softmax(z)).sum(-1)


OLD = at_ids(STUDENT) - MOVED
GAP = np.where(SEEN, at_ids(TEACHER) - at_ids(STUDENT), 0.0)  # constant in every oracle
A = np.array([[2 / 3 - 1 / 3], [-2 / 3], [1 / 3], [0], [0], [0]]) / (np.sqrt(1 / 3) + 1e-4)


def token_mean(values, mask):
    return values[mask].sum() / mask.sum()


def row_mean(values, mask):
    kept = mask.any(1)
    return sum(values[b][mask[b]].mean() for b in np.flatnonzero(kept)) / kept.sum()


def surrogate(z, advantages, high=1.2):
    ratio = np.exp(at_ids(z) - OLD)
    return -np.minimum(ratio * advantages, np.clip(ratio, 0.8, high) * advantages)


def rows(those, mask=MASK):
    return mask & np.asarray(those)[:, None]


def grpo(z):
    return row_mean(surrogate(z, A), MASK)


def dr_grpo(z):
    return surrogate(z, A * (np.sqrt(1 / 3) + 1e-4))[MASK].sum() / (B * C)


def dapo(z):
    varied_and_complete = rows([True, True, False, False, False, False])
    return token_mean(surrogate(z, A, 1.28), varied_and_complete)


def sft(z):
    return token_mean(-at_ids(z), MASK)


def rejection(z):
    return token_mean(-at_ids(z), rows(REWARDS == 1))


def rlsd(z):
    share = 0.5 * (1 - STEP / 50)
    size = np.clip(np.exp(np.sign(A) * GAP), 0.8, 1.2)
    return row_mean(surrogate(z, A * ((1 - share) + share * size)), MASK)


def sdpo(z):
    weight = np.minimum(np.exp(at_ids(STUDENT) - OLD), 2)
    return token_mean(weight * jensen_shannon(z), SEEN)


def sdpo_feedback(z):
    return sdpo(z)  # what the teacher is shown is tested below


def rlcsd(z):
    logs = [at_ids(logits) for logits in (TEACHER, *VIEWS)]
    e = logs[0] - np.log((np.exp(logs[1]) + np.exp(logs[2])) / 2)
    return row_mean(surrogate(z, contrasted(0.5 * np.tanh(e / 0.02))), MASK)


def contrasted(r):
    moved = np.where(A > 0, np.maximum(A + r, 0), np.where(A < 0, np.minimum(A + r, 0), 0))
    return np.where((np.abs(r) > 0.02) & SEEN, moved, A)


def antisd(z):
    phi = (np.log1p(np.exp(GAP)) - np.log(2)) / 2  # 0 without a context
    return row_mean(surrogate(z, A - 0.5 * phi), MASK)


def reward_and_teacher(z):
    return row_mean(surrogate(z, A + 0.1 * GAP), MASK)


def sdar(z):
    gate = 1 / (1 + np.exp(-5 * GAP))
    return grpo(z) + 0.01 * token_mean(-gate * at_ids(z), SEEN)


def jensen_shannon(z):
    logs, teacher = log_softmax(z), log_softmax(TEACHER)
    mixture = np.log((np.exp(logs) + np.exp(teacher)) / 2)
    both = np.exp(teacher) * (teacher - mixture) + np.exp(logs) * (logs - mixture)
    return both.sum(-1) / 2


def srpo(z):
    weight = np.exp(-entropy(TEACHER))
    weight = weight / weight[SEEN].mean()
    distilled = token_mean(weight * jensen_shannon(z), rows(REWARDS == 0, SEEN))
    return row_mean(surrogate(z, A), rows(REWARDS == 1)) + distilled


def hdpo(z):
    teacher = log_softmax(TEACHER)
    kl = (np.exp(teacher) * (teacher - log_softmax(z))).sum(-1)
    return grpo(z) + token_mean(kl, rows([False] * 3 + [True] * 3, SEEN))


def pi_distill(z):
    teacher = log_softmax(TEACHER)
    kl = (np.exp(teacher) * (teacher - log_softmax(z))).sum(-1)
    return grpo(z) + 0.1 * token_mean(kl, SEEN)


def edge_opd(z):
    evidence = at_ids(TEACHER) > at_ids(PLAIN)
    d = at_ids(INITIAL) - at_ids(z)
    anchor = 0.05 * token_mean(np.exp(d) - d - 1, MASK)
    return token_mean(np.where(evidence, -at_ids(z), 0), SEEN) + anchor


def of_kept(values, kept):
    return np.where(kept, values, 0) * SEEN.sum() / kept.sum()


def eopd(z):
    teacher = log_softmax(TEACHER)
    kl = (np.exp(teacher) * (teacher - log_softmax(z))).sum(-1)
    return token_mean(surrogate(z, GAP) + np.where(entropy(TEACHER) > 0.8, kl, 0), SEEN)


def reopold(z):
    floor = np.log(0.1) / 0.9
    kept = SEEN & (floor <= GAP)
    assert 0 < kept.sum() < SEEN.sum()
    return token_mean(surrogate(z, of_kept(GAP, kept)), SEEN)


def opsa(z):
    last = np.sort(at_ids(STUDENT)[SEEN])[int(0.2 * SEEN.sum()) - 1]
    kept, H = SEEN & (at_ids(STUDENT) <= last), entropy(STUDENT)
    assert kept.sum() == int(0.2 * SEEN.sum()) > 1
    rank = (H - H[kept].min()) / (H[kept].max() - H[kept].min())
    return token_mean(surrogate(z, of_kept(-0.5 - rank / 2, kept)), SEEN)


ORACLES = [
    *(grpo, dr_grpo, dapo, sft, rejection, rlsd, antisd, reward_and_teacher, sdar, srpo, hdpo),
    *(pi_distill, edge_opd, sdpo, sdpo_feedback, rlcsd, eopd, reopold, opsa),
]


def reader_of(student, config, rollout=None, old=OLD) -> Reader:
    """A reader whose hidden states are these logits, as if a model had given them."""
    context = Context(jnp.zeros((B, 1), jnp.int32), jnp.ones(B, jnp.int32))
    policy = Policy(
        SimpleNamespace(config=SimpleNamespace(tie_embeddings=False)),
        {"params": {"lm_head": jnp.eye(V)}},
    )
    completion = Completion(
        *(jnp.asarray(IDS, jnp.int32), jnp.asarray(MASK), jnp.asarray(old, jnp.float32)),
        jnp.asarray(STOPPED),
        sampled_logps=jnp.asarray(old, jnp.float32),
    )
    batch = Batch(context, context, has_context=jnp.asarray(CONTEXT))
    reader = Reader(policy, policy, batch, completion, config, rollout=rollout, step=STEP)
    found = dict(student=student, teacher=TEACHER, plain=PLAIN, initial=INITIAL)
    for name, logits in found.items():
        reader.__dict__[f"{name}_hidden"] = jnp.asarray(logits, jnp.float32)
    reader.__dict__["views_hidden"] = tuple(jnp.asarray(VIEWS, jnp.float32))
    # Whose hidden states they are is known to the reader alone.
    object.__setattr__(reader, "initial", policy)
    return reader


def loss_and_gradient(objective, config, student=STUDENT, **changes):
    reader = reader_of(student, config, **changes)
    rewards = jnp.asarray(REWARDS, jnp.float32)
    plan, _ = objective.plan(GradedBatch(reader.batch, reader.completion, rewards, 3, STEP))

    def value(logits):
        return objective(reader_of(logits, config, **changes), plan).value

    return jax.value_and_grad(value)(jnp.asarray(student, jnp.float32))


def numeric(function, z, step=1e-6):
    gradient = np.zeros(z.shape)
    for index in np.ndindex(*z.shape):
        up, down = z.copy(), z.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


def assert_follows(found, oracle, z=STUDENT):
    value, gradient = found
    np.testing.assert_allclose(value, oracle(z), rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(gradient, numeric(oracle, z), atol=2e-6)
    assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize(
    "oracle", representatives(ORACLES, rlcsd, srpo, edge_opd), ids=lambda oracle: oracle.__name__
)
def test_a_method_follows_its_formula(oracle):
    experiment, _ = load_experiment([str(METHODS / f"{oracle.__name__}.gin")])
    text = (METHODS / f"{oracle.__name__}.gin").read_text()
    assert sum(" = " in line.split("#")[0] for line in text.splitlines()) <= 12
    found = loss_and_gradient(experiment.train.objective, experiment.divergence)
    assert_follows(found, oracle)


def test_sdpo_asks_as_its_base_was_taught():
    """A right sibling where there is one, else what this attempt's first wrong line should be."""
    experiment, _ = load_experiment([str(METHODS / "sdpo_feedback.gin")])
    problems = dataclasses.replace(experiment.train.problems, num_problems=1).load(None)
    problem, tokenizer = problems[0], ChainTokenizer()
    prompts = AfterPrompts(experiment.training_contexts, tokenizer, problems, 18)
    right = own_notation(problem.question_text)
    wrong = f"{right[:4]}{9 - int(right[4])}{right[5:-1]}{9 - int(right[-1])}"

    def asked(number, *texts):
        given = [problems.grade(problem, text) for text in texts]
        both = [each if isinstance(each, tuple) else (each, "") for each in given]
        attempts = tuple(Attempt(t, *each) for t, each in zip(texts, both, strict=True))
        found = prompts(problem, Group(attempts, number)).ids
        return found and found[0]

    assert asked(0, wrong, right) == tokenizer.encode(prompt_with("answer", problem))
    assert asked(0, wrong, wrong) == tokenizer.encode(prompt_with("feedback", problem))
    assert asked(0, right, wrong) is None  # itself is no sibling
    assert asked(0, "#", wrong) is None


def test_rlcsd_sets_a_right_hint_against_wrong_ones():
    """Its shape on three views: e from logs of a mean, a selection, and the sign of A kept."""
    experiment, _ = load_experiment(
        [str(METHODS / "grpo.gin")],
        ["PolicyGradient.shape = @rlcsd", "rlcsd.tau = 0.5", "rlcsd.weight = 0.9"],
    )
    logs = [at_ids(z) for z in (TEACHER, *VIEWS)]
    r = 0.9 * np.tanh((logs[0] - np.log((np.exp(logs[1]) + np.exp(logs[2])) / 2)) / 0.5)
    shaped = contrasted(r)

    def oracle(z):
        return row_mean(surrogate(z, shaped), MASK)

    assert (shaped == 0)[A[:, 0] != 0].any()
    assert_follows(loss_and_gradient(experiment.train.objective, experiment.divergence), oracle)


def test_reopold_turns_to_the_tokens_of_the_highest_entropy():
    """After the switch the floor lifts those below it."""
    experiment, _ = load_experiment(
        [str(METHODS / "reopold.gin")],
        [f"reopold.switch_steps = {STEP}", "reopold.fraction = 0.5", "reopold.mixture = 0.5"],
    )
    kept = SEEN & (entropy(STUDENT) >= np.quantile(entropy(STUDENT)[SEEN], 0.5))
    floor = np.log(0.5) / 0.5
    assert (GAP[kept] < floor).any() and kept.sum() < SEEN.sum()

    def oracle(z):
        return token_mean(surrogate(z, of_kept(np.maximum(GAP, floor), kept)), SEEN)

    assert_follows(loss_and_gradient(experiment.train.objective, experiment.divergence), oracle)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
def test_an_anchor_holds_the_whole_distribution(name):
    experiment, _ = load_experiment([str(METHODS / "grpo.gin")])
    initial = log_softmax(INITIAL)

    def oracle(z):
        logs = log_softmax(z)
        first, second = (logs, initial) if name == "reverse_kl" else (initial, logs)
        return 0.3 * token_mean((np.exp(first) * (first - second)).sum(-1), MASK)

    assert_follows(loss_and_gradient(Anchor(weight=0.3, name=name), experiment.divergence), oracle)


def test_a_policy_gradient_compares_what_was_sampled():
    """Temperature .7, the three largest, nucleus .9: the ratio is of that distribution.

    Ids that the student's filters remove now have ratio 0 and no gradient.
    """
    rollout = RolloutConfig(max_new_tokens=C, temperature=0.7, top_k=3, top_p=0.9)

    def sampled(z):
        order = np.argsort(-z, -1)
        kept = np.zeros(z.shape, bool)
        for index in np.ndindex(B, C):
            top = order[index][:3]
            p = np.exp(z[index][top] / 0.7)
            before = np.cumsum(p / p.sum()) - p / p.sum()
            kept[index][top[before < 0.9]] = True
        logs = log_softmax(np.where(KEPT if KEPT is not None else kept, z / 0.7, -1e30))
        return np.take_along_axis(logs, IDS[..., None], -1)[..., 0], kept

    KEPT = None
    now, KEPT = sampled(STUDENT)
    inside = now > -1e20
    assert 0 < (~inside & MASK).sum() < MASK.sum() / 2
    old = np.where(inside, now - MOVED, -1.0)

    def oracle(z):
        ratio = np.where(inside, np.exp(np.where(inside, sampled(z)[0], 0) - old), 0)
        values = -np.minimum(ratio * A, np.clip(ratio, 0.8, 1.2) * A)
        return row_mean(values, MASK)

    config = load_experiment([str(METHODS / "grpo.gin")])[0].divergence
    found = loss_and_gradient(PolicyGradient(), config, rollout=rollout, old=old)
    assert_follows(found, oracle)
