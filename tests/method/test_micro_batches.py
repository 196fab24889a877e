# SPDX-License-Identifier: Apache-2.0
"""Micro-batches of rows of like length, at several widths: the same sums, at less work."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opsd_jax.errors import UserError
from opsd_jax.method.completions import References
from opsd_jax.method.micro_batches import MicroBatch, accumulate, widths
from opsd_jax.method.mix import Distillation, Likelihood, Mix
from opsd_jax.method.policy_gradient import PolicyGradient
from opsd_jax.method.train_step import update
from opsd_jax.model.sharding import MeshConfig, make_mesh, on_mesh, shard_batch
from opsd_jax.run.config import load_experiment
from opsd_jax.sampling.prompts import Completion
from tests.method.test_train_step import method_of, norm, state_of
from tests.representatives import representatives
from tests.run.test_train import ROOT
from tests.tiny import tiny_batch, tiny_config

C, LENGTHS = 32, [32, 3, 0, 9, 7, 1, 16, 5]  # one of them empty


def completion(lengths):
    rng = np.random.default_rng(0)
    mask = np.arange(C) < np.array(lengths)[:, None]
    ids = np.where(mask, rng.integers(1, 24, mask.shape), 0)
    logps = np.where(mask, rng.normal(-3, 0.1, mask.shape), 0).astype(np.float32)
    stopped = np.array(lengths) < C
    return Completion(*map(jnp.asarray, (ids, mask, logps, stopped)))


@pytest.mark.parametrize("longest, num, expected", [
    (1024, 3, [256, 512, 1024]),
    (1024, 1, [1024]),
    (40, 3, [16, 24, 40]),
    (12, 3, [8, 12]),
    (6, 3, [6]),
])  # fmt: skip
def test_widths_are_halves_and_multiples_of_eight(longest, num, expected):
    assert widths(longest, num) == expected


@pytest.mark.parametrize("num_parts, expected", [
    (1, [32] * 8),  # all rows as wide as the longest
    (2, [8] * 4 + [32] * 4),  # 0 1 3 5 | 7 9 16 32
    (4, [8] * 4 + [16] * 2 + [32] * 2),  # 0 1 | 3 5 | 7 9 | 16 32
    (8, [8] * 5 + [16] * 2 + [32]),
])  # fmt: skip
def test_rows_share_a_width_that_holds_their_lengths(num_parts, expected):
    numbers = jnp.arange(8)
    plan = {"weights": jnp.ones((8, C)), "advantages": jnp.arange(8.0)}
    rows = MicroBatch(tiny_batch(8), completion(LENGTHS), plan, numbers)

    def read(trainable, part):
        """Each row's width, by what is cut, in its own place."""
        tokens = part.completion
        assert tokens.ids.shape == tokens.logps.shape == part.plan["weights"].shape
        assert part.plan["advantages"].shape == part.numbers.shape == (8 // num_parts,)
        here = jnp.zeros(8, jnp.int32).at[part.numbers].set(tokens.ids.shape[1])
        kept = jnp.zeros(8, jnp.int32).at[part.numbers].set(tokens.mask.sum(1))
        return here, kept, jnp.zeros(8).at[part.numbers].set(part.plan["advantages"])

    here, kept, advantages = accumulate(read, None, rows, num_parts, 3)
    assert kept.tolist() == LENGTHS
    assert [here[i] for i in np.argsort(LENGTHS, kind="stable")] == expected
    assert advantages.tolist() == list(range(8))


OBJECTIVES = {
    "distillation": Distillation(),
    "likelihood": Likelihood(mean="sequence"),
    "grpo": PolicyGradient(mean="constant"),
    "mix": Mix((PolicyGradient(), Distillation())),
}


@pytest.mark.parametrize("num_devices, longest", [(1, 7), (4, 32)])  # 7: all parts at a quarter
@pytest.mark.parametrize("objective", representatives(OBJECTIVES, "mix"))
def test_an_update_is_the_same_as_of_the_whole_batch(objective, num_devices, longest):
    """The metrics, the rows' sums in their places, and what it adds to the parameters."""
    said = completion([min(n, longest) for n in LENGTHS])
    rewards = jnp.array([1, 0, 1, 1, 0, 0, 0, 0], jnp.float32)
    whole = method_of(tiny_config(), objective=OBJECTIVES[objective], group_size=2)
    parts = method_of(
        tiny_config(),
        objective=OBJECTIVES[objective],
        group_size=2,
        num_micro_batches=2,
        num_widths=3,
    )
    state, batch = state_of(whole), tiny_batch(8)
    expected, want = jax.jit(partial(update, whole))(state, batch, said, rewards)
    placement = MeshConfig()
    mesh = make_mesh(placement, jax.devices()[:num_devices])
    run = on_mesh(jax.jit(partial(update, parts)), mesh, placement.rules)
    found, metrics = run(state, *shard_batch((batch, said, rewards), mesh))
    assert metrics.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=2e-6, err_msg=name)
    moved = [jax.tree.map(jnp.subtract, s.trainable, state.trainable) for s in (found, expected)]
    assert norm(jax.tree.map(jnp.subtract, *moved)) < 1e-3 * norm(moved[1])


@pytest.mark.parametrize("num_parts, num_widths, copies, order", [
    (2, 1, 2, [0, 1, 4, 5, 2, 3, 6, 7]),
    (2, 1, 4, [0, 1, 2, 3, 4, 5, 6, 7]),
    (4, 1, 4, [0, 4, 1, 5, 2, 6, 3, 7]),  # parts of two rows hold no group
    (2, 3, 2, [2, 5, 1, 7, 4, 3, 6, 0]),  # by length
])  # fmt: skip
def test_groups_stay_together_where_they_can(num_parts, num_widths, copies, order):
    batch = tiny_batch(8)
    batch = dataclasses.replace(
        batch,
        student=dataclasses.replace(batch.student, copies=copies),
        views=(dataclasses.replace(batch.teacher, copies=copies),),
    )
    rows = MicroBatch(batch, completion(LENGTHS), {}, jnp.arange(8))
    seen = []

    def read(trainable, part):
        seen.append((part.batch.student.copies, part.batch.views[0].copies))
        place = jnp.arange(8 // num_parts)
        return jnp.zeros(8, jnp.int32).at[part.numbers].set(place)

    place = accumulate(read, None, rows, num_parts, num_widths)
    assert place.tolist() == [i % (8 // num_parts) for i in np.argsort(order)]
    whole = order in ([0, 1, 4, 5, 2, 3, 6, 7], list(range(8)))
    assert set(seen) == {(copies, copies) if whole else (1, 1)}


@pytest.mark.parametrize("num_devices", [1, 2, 4])  # a part has two groups, for four devices
def test_an_update_of_groups_is_the_same_as_of_their_rows(num_devices):
    """In micro-batches, too; of the teacher's contexts some are each row's own."""
    said, batch = completion(LENGTHS), tiny_batch(8)
    rewards = jnp.array([1, 0, 1, 1, 0, 0, 0, 0], jnp.float32)
    shared = jax.tree.map(lambda x: jnp.repeat(x[::2], 2, axis=0), batch.student)
    objective = Mix((PolicyGradient(), Distillation()))
    whole = method_of(tiny_config(), objective=objective, group_size=2)
    whole = dataclasses.replace(whole, optimizer=optax.sgd(1.0))  # Adam's makes much of roundings
    parts = dataclasses.replace(whole, num_micro_batches=2)
    state = state_of(whole)
    placement = MeshConfig()
    mesh = make_mesh(placement, jax.devices()[:num_devices])
    once = dataclasses.replace(shared, copies=2)
    groups = dataclasses.replace(batch, student=once, views=(once,))
    apart = dataclasses.replace(batch, student=shared, views=(shared,))
    run = on_mesh(jax.jit(partial(update, parts)), mesh, placement.rules)
    found, metrics = run(state, *shard_batch((groups, said, rewards), mesh))
    expected, want = jax.jit(partial(update, whole))(state, apart, said, rewards)
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=2e-6, err_msg=name)
    moved = [jax.tree.map(jnp.subtract, s.trainable, state.trainable) for s in (found, expected)]
    assert norm(jax.tree.map(jnp.subtract, *moved)) < 2e-5 * norm(moved[1])


def test_no_branch_is_wider_than_its_tokens():
    """The compiled update has a conditional with the quarter, the half and the whole width."""
    parts = method_of(tiny_config(), num_micro_batches=2, num_widths=3)
    state, batch, said = state_of(parts), tiny_batch(8, 8, 8), completion(LENGTHS)
    text = jax.jit(partial(update, parts)).lower(state, batch, said).as_text()
    for width in (8, 16, 32):
        assert f"tensor<4x{8 + width}x16xf32>" in text, "hidden states of prompts and completions"


def test_references_beside_completions_want_one_width():
    lines = ["train.objective = @Likelihood()", "Likelihood.of = @References()"]
    gin_file = str(ROOT / "experiments" / "quickstart.gin")
    load_experiment([gin_file], lines)
    with pytest.raises(UserError, match="train.num_widths must be 1 with Likelihood.of"):
        load_experiment([gin_file], [*lines, "train.num_widths = 3"])
    assert References() == References()
