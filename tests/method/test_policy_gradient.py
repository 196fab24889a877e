# SPDX-License-Identifier: Apache-2.0
"""Policy gradients, likelihood and mixtures against slow float64 NumPy, values and gradients."""

import dataclasses
import itertools
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_jax.divergence.likelihood import token_logps
from opsd_jax.divergence.losses import DivergenceConfig
from opsd_jax.errors import UserError
from opsd_jax.method.advantage_shapes import add_gap
from opsd_jax.method.completions import StudentRollouts
from opsd_jax.method.mix import Anchor, Distillation, Likelihood, Mix
from opsd_jax.method.policy_gradient import PolicyGradient, group_advantages
from opsd_jax.method.rows import GradedBatch, mean_weights
from opsd_jax.method.scoring import completion_hidden
from opsd_jax.method.teacher import TeacherConfig
from opsd_jax.method.train_step import Method, init_state, sample_completion, update
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.head import Head, head_logits, output_head
from opsd_jax.run.assembly import split_trainable
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.prompts import Completion
from tests.representatives import representatives
from tests.tiny import tiny_batch, tiny_config, tiny_variables

LENGTHS = np.array([3, 1, 2, 3])
REWARDS = np.array([1.0, 0.0, 1.0, 1.0])
# Old log-probabilities and how far the new ones went: ratios from .55 to 1.8, both clips active.
OLD = -np.array([[0.5, 1.0, 0.2], [2.0, 9.0, 9.0], [0.3, 0.7, 9.0], [1.1, 0.4, 0.9]])
MOVED = np.array([[0.5, -0.6, 0.1], [-0.5, 5.0, 5.0], [0.05, 0.6, 5.0], [0.2, -0.1, 0.4]])
INITIAL = OLD + 0.3


def completion_of(lengths, old, stopped=None) -> Completion:
    mask = np.arange(old.shape[1]) < np.asarray(lengths)[:, None]
    return Completion(
        ids=jnp.zeros(mask.shape, jnp.int32),
        mask=jnp.asarray(mask),
        logps=jnp.asarray(np.where(mask, old, 0.0), jnp.float32),
        stopped=jnp.ones(len(mask), bool) if stopped is None else jnp.asarray(stopped),
    )


def loss_of(objective, logps, completion, rewards, group_size, initial=INITIAL):
    batch = SimpleNamespace(in_context=lambda mask: mask)
    step = GradedBatch(batch, completion, jnp.asarray(rewards, jnp.float32), group_size)
    rows, _ = objective.plan(step)
    reader = SimpleNamespace(
        batch=batch,
        completion=completion,
        student_logps=(logps, jnp.zeros_like(logps)),
        sampled_logps=(logps, completion.logps),
        initial_logps=jnp.asarray(initial, jnp.float32),
    )
    return objective(reader, rows)


def trl_loss(loss_type, logps, old, rewards, mask, group_size, low, high, beta, initial, scale):
    """TRL's GRPOTrainer, written out: `compute_loss` and the advantages before it."""
    total, num_rows, width = 0.0, len(rewards), mask.shape[1]
    losses = np.zeros(mask.shape)
    for i in range(num_rows):
        group = rewards[i // group_size * group_size :][:group_size]
        mean = sum(group) / len(group)
        advantage = rewards[i] - mean
        if scale:
            variance = sum((r - mean) ** 2 for r in group) / (len(group) - 1)
            advantage /= np.sqrt(variance) + 1e-4
        for t in range(width):
            ratio = np.exp(logps[i, t] - old[i, t])
            clipped = min(max(ratio, 1 - low), 1 + high)
            losses[i, t] = -min(ratio * advantage, clipped * advantage)
            d = initial[i, t] - logps[i, t]
            losses[i, t] += beta * (np.exp(d) - d - 1)
    if loss_type == "grpo":
        for i in range(num_rows):
            total += (losses[i] * mask[i]).sum() / mask[i].sum() / num_rows
    elif loss_type == "dapo":
        total = (losses * mask).sum() / mask.sum()
    elif loss_type == "dr_grpo":
        total = (losses * mask).sum() / (num_rows * width)
    return total


def numeric_gradient(function, x, step=1e-6):
    gradient = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


@pytest.mark.parametrize(
    "loss_type, mean", [("grpo", "sequence"), ("dapo", "token"), ("dr_grpo", "constant")]
)
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_loss_and_its_gradient_are_trls(loss_type, mean, scale, beta):
    """Four rows of two problems: padding, both clips, and a group without variance."""
    objective = PolicyGradient(clip_low=0.2, clip_high=0.28, mean=mean, normalize_std=scale)
    if beta:
        objective = Mix((objective, Anchor(weight=beta, mean=mean)))
    completion, mask = completion_of(LENGTHS, OLD), np.arange(3) < LENGTHS[:, None]
    expected = partial(
        trl_loss, loss_type, old=OLD, rewards=REWARDS, mask=mask, group_size=2, low=0.2,
        high=0.28, beta=beta, initial=INITIAL, scale=scale,
    )  # fmt: skip
    logps = OLD + MOVED

    def value(logps):
        return loss_of(objective, logps, completion, REWARDS, 2).value

    found, gradient = jax.value_and_grad(value)(jnp.asarray(logps, jnp.float32))
    np.testing.assert_allclose(found, expected(logps), rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(gradient, numeric_gradient(expected, logps), atol=1e-6)


def test_one_number_by_hand():
    """One group, rewards 1 and 0, one token each, no division by the standard deviation.

    A = ±1/2. Ratio 1.5 with A = 1/2 is clipped to 1.28: −.64; ratio .5 with A = −1/2 is clipped
    to .8: +.4. The mean is −.12, and nothing has a gradient.
    """
    old = np.log(np.full((2, 1), 0.4))
    logps = jnp.log(jnp.array([[0.6], [0.2]]))
    objective = PolicyGradient(clip_high=0.28, normalize_std=False)
    value = partial(loss_of, objective, completion=completion_of([1, 1], old), initial=old)
    run = lambda logps: value(logps=logps, rewards=[1.0, 0.0], group_size=2)  # noqa: E731
    loss = run(logps)
    np.testing.assert_allclose(loss.value, -0.12, rtol=1e-6)
    assert loss.sums["policy/clip_fraction"] == 2
    assert not np.any(jax.grad(lambda x: run(x).value)(logps))


def test_groups_without_variance_are_counted_and_can_be_left_out():
    completion = completion_of(LENGTHS, OLD, stopped=[True, False, True, True])
    rewards = jnp.asarray(REWARDS, jnp.float32)
    rows, metrics = PolicyGradient(mean="token").plan(GradedBatch(None, completion, rewards, 2))
    assert metrics["reward/zero_variance_fraction"] == 0.5
    np.testing.assert_allclose(rows["weights"][0], 1 / 9, rtol=1e-6)
    assert not np.any(rows["advantages"][2:])
    dropping = PolicyGradient(mean="token", rows="varied")
    rows, _ = dropping.plan(GradedBatch(None, completion, rewards, 2))
    np.testing.assert_allclose(rows["weights"].sum(axis=1), [3 / 4, 1 / 4, 0, 0], rtol=1e-6)
    dropping = dataclasses.replace(dropping, rows=("varied", "complete"))
    rows, _ = dropping.plan(GradedBatch(None, completion, rewards, 2))
    np.testing.assert_allclose(rows["weights"].sum(axis=1), [1, 0, 0, 0], rtol=1e-6)
    rows, _ = dropping.plan(GradedBatch(None, completion, jnp.ones(4), 2))
    assert not np.any(rows["weights"])  # All left out: a step without a gradient, and no NaN.


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1, width=16), min_size=6, max_size=6), st.sampled_from([2, 3, 6]))
def test_advantages_are_centred_and_scaled(rewards, group_size):
    advantages, flat = group_advantages(jnp.array(rewards), group_size, True)
    groups = np.array(rewards, np.float64).reshape(-1, group_size)
    expected = groups - groups.mean(1, keepdims=True)
    expected /= groups.std(1, ddof=1, keepdims=True) + 1e-4
    np.testing.assert_allclose(advantages, expected.ravel(), atol=2e-3)
    assert flat.tolist() == np.repeat(np.ptp(groups, axis=1) == 0, group_size).tolist()


def test_a_group_of_one_has_nothing_to_compare_with():
    advantages, flat = group_advantages(jnp.array([1.0, 0.0]), 1, True)
    assert advantages.tolist() == [0.0, 0.0] and flat.all()


def test_means_weigh_tokens_as_they_say():
    mask = np.arange(4) < np.array([[4], [1], [0]])
    for mean, rows in (("token", [4 / 5, 1 / 5, 0]), ("sequence", [0.5, 0.5, 0]),
                       ("constant", [4 / 8, 1 / 8, 0])):  # fmt: skip
        weights = mean_weights(jnp.asarray(mask), mean)
        np.testing.assert_allclose(weights.sum(axis=1), rows, rtol=1e-6)
        assert not np.any(weights[~mask])


def test_token_logps_in_blocks_equal_the_dense_ones():
    rng = np.random.default_rng(0)
    head = Head(jnp.asarray(rng.normal(size=(11, 5)), jnp.float32))
    hidden = jnp.asarray(rng.normal(size=(3, 7, 5)), jnp.float32).at[0, 5:].set(jnp.nan)
    ids, mask = jnp.asarray(rng.integers(0, 11, (3, 7))), np.ones((3, 7), bool)
    mask[0, 5:] = False

    def value(hidden, block):
        logps, entropy = token_logps(head, hidden, ids, jnp.asarray(mask), block)
        return jnp.sum(logps * jnp.arange(7)), (logps, entropy)

    dense, dense_gradient = jax.value_and_grad(value, has_aux=True)(hidden, None)
    z = np.einsum("bcd,vd->bcv", np.asarray(hidden, np.float64), np.asarray(head.kernel))
    p = (
        np.exp(z - z.max(-1, keepdims=True))
        / np.exp(z - z.max(-1, keepdims=True)).sum(-1)[..., None]
    )
    chosen = np.take_along_axis(p, np.asarray(ids)[..., None], -1)[..., 0]
    np.testing.assert_allclose(dense[1][0], np.where(mask, np.log(chosen), 0), atol=1e-5)
    np.testing.assert_allclose(dense[1][1], np.where(mask, -(p * np.log(p)).sum(-1), 0), atol=1e-5)
    for block in (1, 6, 9, 1000):
        found, gradient = jax.value_and_grad(value, has_aux=True)(hidden, block)
        np.testing.assert_allclose(found[1], dense[1], atol=1e-6)
        np.testing.assert_allclose(gradient, dense_gradient, atol=1e-6)


# ---- whole steps: the parameters' gradient


def method_of(objective, **changes) -> Method:
    fields = dict(
        model=Decoder(tiny_config()),
        rollout=RolloutConfig(max_new_tokens=5, stop_ids=(3, 5)),
        divergence=DivergenceConfig(),
        teacher=TeacherConfig("initial").build(),
        optimizer=optax.sgd(1.0),
        objective=objective,
        group_size=4,
    )
    return Method(**(fields | changes))


@pytest.fixture(scope="module")
def rollouts():
    """Completions of slightly other weights, so that ratios differ from 1; and some rewards."""
    method = method_of(PolicyGradient())
    variables = tiny_variables(method.model.config)
    rng = np.random.default_rng(1)
    older = jax.tree.map(lambda x: x + 0.03 * rng.normal(size=x.shape).astype(x.dtype), variables)
    state = init_state(method, *split_trainable(variables), jax.random.key(0))
    old_state = init_state(method, *split_trainable(older), jax.random.key(0))
    batch = tiny_batch(8)
    completion = jax.jit(partial(sample_completion, method))(old_state, batch)
    rewards = jnp.array([1, 0, 1, 1, 0, 0, 0, 0], jnp.float32)
    return state, batch, completion, rewards


def logit_oracle(objective, method, state, batch, completion, rewards, initial):
    """(loss, d loss / d logits) in float64, token by token, in closed form."""
    hidden = completion_hidden(method.model, state.student, batch.student, completion)
    head = output_head(state.student["params"], method.model.config)
    z = np.asarray(head_logits(head, hidden), np.float64)
    mask, old = np.asarray(completion.mask), np.asarray(completion.logps, np.float64)
    ids, rewards = np.asarray(completion.ids), np.asarray(rewards, np.float64)
    total, gradient = 0.0, np.zeros(z.shape)
    for b, t in zip(*np.nonzero(mask), strict=True):
        p = np.exp(z[b, t] - z[b, t].max())
        p /= p.sum()
        logp = np.log(p[ids[b, t]])
        if isinstance(objective, Likelihood):
            weight, loss, slope = 1 / mask.sum(), -logp, -1.0
        else:
            group = rewards[b // 4 * 4 : b // 4 * 4 + 4]
            advantage = (rewards[b] - group.mean()) / (group.std(ddof=1) + 1e-4)
            weight = 1 / (mask[b].sum() * len(mask))
            ratio = np.exp(logp - old[b, t])
            bound = np.clip(ratio, 0.95, 1.08)
            loss = -min(ratio * advantage, bound * advantage)
            slope = -ratio * advantage if ratio * advantage <= bound * advantage else 0.0
            d = initial[b, t] - logp
            loss += 0.5 * (np.exp(d) - d - 1)
            slope += 0.5 * (1 - np.exp(d))
        total += weight * loss
        gradient[b, t] = weight * slope * (np.eye(len(p))[ids[b, t]] - p)
    return total, gradient


GRPO_KL = Mix((PolicyGradient(0.05, 0.08), Anchor(weight=0.5, mean="sequence")))


@pytest.mark.parametrize(
    "objective, num_micro_batches",
    representatives(
        itertools.product([GRPO_KL, Likelihood()], [1, 2]), (GRPO_KL, 2), (Likelihood(), 1)
    ),
    ids=["grpo", "grpo-2", "sft", "sft-2"],
)
def test_a_step_follows_the_oracles_gradient(objective, num_micro_batches, rollouts):
    state, batch, completion, rewards = rollouts
    method = method_of(objective, num_micro_batches=num_micro_batches)
    # The initial policy is not the student's any more.
    store = jax.tree.map(lambda x: x * 1.02, state.teacher)
    state = dataclasses.replace(state, teacher=store)
    initial_hidden = completion_hidden(method.model, store, batch.student, completion)
    head = output_head(store["params"], method.model.config)
    initial = token_logps(head, initial_hidden, completion.ids, completion.mask)[0]
    expected, d_logits = logit_oracle(
        objective, method, state, batch, completion, rewards, np.asarray(initial, np.float64)
    )

    def logits(params):
        hidden = completion_hidden(method.model, {"params": params}, batch.student, completion)
        return head_logits(output_head(params, method.model.config), hidden)

    params = state.trainable["params"]
    _, pull = jax.vjp(logits, params)
    (gradient,) = pull(jnp.asarray(d_logits, jnp.float32))
    new, metrics = jax.jit(partial(update, method))(state, batch, completion, rewards)
    np.testing.assert_allclose(metrics["loss/objective"], expected, rtol=2e-5, atol=1e-6)
    jax.tree.map(
        lambda before, after, g: np.testing.assert_allclose(before - after, g, atol=2e-6),
        params, new.trainable["params"], gradient,
    )  # fmt: skip
    assert metrics["optim/grad_norm"] > 0.01
    if objective is GRPO_KL:
        assert 0 < metrics["policy/clip_fraction"] < 1 and metrics["policy/kl_initial"] > 0
        assert metrics["reward/zero_variance_fraction"] == 0.5


def test_routing_distils_wrong_rows_and_reinforces_right_ones(rollouts):
    """Each part of the mixture equals its own objective on its own rows."""
    state, batch, completion, rewards = rollouts
    mix = Mix((
        PolicyGradient(mean="token", weight=0.3, rows="right", over="batch"),
        Distillation(weight=0.7, rows="wrong", over="batch"),
    ))  # fmt: skip

    def step(objective, completion, rewards=rewards):
        run = jax.jit(partial(update, method_of(objective)))
        return run(state, batch, completion, rewards)[1]

    mixed = step(mix, completion)
    num_tokens, right = int(completion.mask.sum()), np.asarray(rewards) >= 0.5

    def rows(those):
        return completion.replace(mask=completion.mask & jnp.asarray(those)[:, None])

    share = completion.mask[~right].sum() / num_tokens
    distilled = step(Distillation(), rows(~right))["loss/objective"] * share
    share = completion.mask[right].sum() / num_tokens
    reinforced = step(PolicyGradient(mean="token"), rows(right))["loss/objective"] * share
    expected = 0.7 * distilled + 0.3 * reinforced
    np.testing.assert_allclose(mixed["loss/objective"], expected, rtol=1e-5)
    divergence = mixed["rows/divergence"]
    assert divergence.shape == (8,) and np.all(divergence > 0)
    np.testing.assert_allclose(divergence.sum() / num_tokens, mixed["loss/divergence"], rtol=1e-5)
    parts = mixed["loss/policy_gradient"], mixed["loss/distillation"]
    np.testing.assert_allclose(parts, [0.3 * reinforced, 0.7 * distilled], rtol=1e-5)
    assert mixed["loss/policy_gradient_rows_fraction"] == right.mean()
    assert mixed["loss/distillation_rows_fraction"] == 1 - right.mean()
    groups = np.asarray(rewards).reshape(-1, method_of(mix).group_size)
    within = groups.std(axis=1, ddof=1).mean()
    np.testing.assert_allclose(mixed["reward/group_std"], within, rtol=1e-6)
    whole = Mix((PolicyGradient(mean="token", weight=0.3), Distillation(weight=0.7)))
    whole = step(whole, completion)
    plain = step(Distillation(), completion)["loss/objective"]
    reward = step(PolicyGradient(mean="token"), completion)["loss/objective"]
    np.testing.assert_allclose(whole["loss/objective"], 0.7 * plain + 0.3 * reward, rtol=1e-5)


@pytest.mark.slow
def test_weights_and_shapes_are_told(rollouts):
    """Their means over the tokens, and of the teacher what they looked at."""
    state, batch, completion, rewards = rollouts
    mask, places = np.asarray(completion.mask), np.arange(completion.mask.shape[1])

    def step(objective):
        return jax.jit(partial(update, method_of(objective)))(state, batch, completion, rewards)[1]

    weights = (lambda tokens, mask: tokens.positions + 1.0, lambda tokens, mask: mask * 0.5)
    blind = step(PolicyGradient(shape=lambda tokens, mask: -tokens.positions, weights=weights))
    mean = (mask * (places + 1)).sum() / mask.sum()
    np.testing.assert_allclose(blind["loss/token_weight"], mean / 2, rtol=1e-6)
    np.testing.assert_allclose(blind["policy/advantage_size"], mean - 1, rtol=1e-6)
    assert not any(name.startswith("teacher/") for name in blind)
    distilled = step(Mix((Distillation(weights=weights), PolicyGradient())))
    np.testing.assert_allclose(distilled["loss/distillation_token_weight"], mean / 2, rtol=1e-6)
    assert "loss/token_weight" not in distilled
    seeing = step(PolicyGradient(shape=add_gap))
    assert "loss/token_weight" not in seeing and "loss/rows_fraction" not in seeing
    for name in ("teacher/nll_of_rollout", "teacher/entropy"):
        np.testing.assert_allclose(seeing[name], distilled[name], rtol=1e-5)


def test_several_passes_move_away_from_the_rollout(rollouts):
    state, batch, _, rewards = rollouts
    method = method_of(PolicyGradient(), num_updates=3, optimizer=optax.sgd(0.5))
    completion = jax.jit(partial(sample_completion, method))(state, batch)
    new, metrics = jax.jit(partial(update, method))(state, batch, completion, rewards)
    assert new.step == state.step + 1 and metrics["rollout/logp_gap"] < 1e-5
    once = dataclasses.replace(method, num_updates=1)
    by_hand = state
    for _ in range(3):
        by_hand, _ = jax.jit(partial(update, once))(by_hand, batch, completion, rewards)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new.trainable, by_hand.trainable
    )
    assert isinstance(method.completions, StudentRollouts)


@pytest.mark.parametrize(
    "fields",
    [
        dict(clip_low=0.0),
        dict(clip_high=-1),
        dict(baseline="x"),
        dict(mean="x"),
        dict(weight=-1),
        dict(rows="x"),
        dict(rows=("right", 2)),
        dict(over="x"),
    ],
)
def test_bad_settings_are_named(fields):
    (name,) = fields
    with pytest.raises(UserError, match=name):
        PolicyGradient(**fields)
