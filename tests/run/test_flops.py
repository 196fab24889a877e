# SPDX-License-Identifier: Apache-2.0
"""Model FLOPs by formula against the products of the traced program, scans counted out."""

import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from opsd_jax.divergence.losses import DivergenceConfig
from opsd_jax.method.completions import MixedRollouts, References, StudentRollouts, TeacherRollouts
from opsd_jax.method.mix import Anchor, Distillation, Likelihood, Mix
from opsd_jax.method.policy_gradient import PolicyGradient
from opsd_jax.model.config import LoraConfig
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.head import head_logits, output_head
from opsd_jax.run.flops import (
    Lengths,
    decoding_bytes,
    forward_flops,
    seen,
    step_flops,
    training_flops,
    writer_prompts,
)
from opsd_jax.sampling.config import RolloutConfig
from tests.tiny import tiny_config, tiny_variables

T = 5
SHAPES = {
    "plain": {},
    "adapters": {"lora": LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "down_proj"))},
}
EACH = ["adapters", pytest.param("plain", marks=pytest.mark.slow)]


def dots(jaxpr) -> float:
    """2 m n k of every dot_general, times the trips of the scans around it."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((inner, _), _), left = equation.params["dimension_numbers"], equation.invars[0].aval
            summed = math.prod(left.shape[axis] for axis in inner)
            total += 2.0 * summed * math.prod(equation.outvars[0].aval.shape)
        trips = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += trips * sum(map(dots, jaxprs_in_params(equation.params)))
    return total


def logits(config, variables):
    ids = jnp.ones((1, T), jnp.int32)
    hidden, _ = Decoder(config).apply(variables, ids, jnp.arange(T)[None])
    return head_logits(output_head(variables["params"], config), hidden)


def ahead(config) -> float:
    """What the program compares with tokens that lie ahead, and masks."""
    pairs = T * T - T * (T + 1) / 2
    return config.num_layers * 4 * config.num_heads * config.head_dim * pairs


@pytest.mark.parametrize("shape", EACH)
def test_a_pass_has_the_products_of_the_formula(shape):
    config = tiny_config(**SHAPES[shape])
    traced = jax.make_jaxpr(partial(logits, config))(tiny_variables(config))
    ours = forward_flops(config, np.array([0]), np.array([T]))
    assert dots(traced.jaxpr) == ours + ahead(config)


@pytest.mark.parametrize("shape", EACH)
def test_gradients_cost_twice_a_pass_again_but_for_frozen_matrices(shape):
    config = tiny_config(**SHAPES[shape])
    variables = tiny_variables(config)
    trained = {name: variables[name] for name in (["lora"] if config.lora else ["params"])}
    loss = lambda trained: jnp.sum(logits(config, variables | trained) ** 2)  # noqa: E731
    traced = jax.make_jaxpr(jax.grad(loss))(trained)
    ours = training_flops(config, np.array([0]), np.array([T]))
    assert dots(traced.jaxpr) == pytest.approx(ours + 3 * ahead(config), rel=0.02)


def test_a_window_and_a_row_end_what_is_seen():
    def pairs(config, *lengths):
        return sum(
            min(t, config.window if config.windows(layer) else t)
            for layer in range(config.num_layers)
            for n in lengths
            for t in range(1, n + 1)
        )

    for config in (tiny_config(), tiny_config(window=3, window_layers=(1,))):
        assert seen(config, np.array([2, 7])) == pairs(config, 2, 7)


def method(**changes):
    parts = {
        "model": Decoder(tiny_config()),
        "completions": StudentRollouts(),
        "objective": Distillation(),
        "rollout": RolloutConfig(8),
        "divergence": DivergenceConfig(),
        "num_updates": 1,
        "group_size": 1,
        "external": None,
        "reasoner": None,
    }
    return SimpleNamespace(**(parts | changes))


LENGTHS = Lengths(np.array([3, 4]), np.array([7, 9]), np.array([5, 2]))


def test_a_step_counts_who_writes_and_who_reads():
    config = tiny_config()
    read = [forward_flops(config, prompts, LENGTHS.completion) for prompts in LENGTHS[:2]]
    learn = training_flops(config, LENGTHS.student, LENGTHS.completion)
    assert step_flops(method(), LENGTHS) == (read[0], learn + read[1])
    off_policy = method(completions=TeacherRollouts(), objective=Likelihood())
    assert step_flops(off_policy, LENGTHS) == (read[1], learn)
    assert step_flops(method(completions=References()), LENGTHS)[0] == 0
    again = [count(config, LENGTHS[role][1:], np.array([0])) for count, role in (
        (forward_flops, 0), (training_flops, 0), (forward_flops, 1)
    )]  # fmt: skip
    of_a_group = read[0] - again[0], learn - again[1] + read[1] - again[2]
    assert step_flops(method(group_size=2), LENGTHS) == pytest.approx(of_a_group)
    two = LENGTHS._replace(views=(LENGTHS.student,))
    both, one, none = (
        step_flops(method(group_size=2), two._replace(own=own))[1]
        for own in ((True, True), (False, True), (False, False))
    )
    assert both - one == pytest.approx(again[2]) and one - none == pytest.approx(again[0])
    own = step_flops(method(group_size=2), LENGTHS._replace(own=(True,)))
    assert own == pytest.approx((of_a_group[0], of_a_group[1] + again[2]))
    grpo = method(objective=PolicyGradient(), num_updates=2)
    assert step_flops(grpo, LENGTHS) == (read[0], 2 * learn)
    grpo.objective = Mix((PolicyGradient(), Anchor()))
    assert step_flops(grpo, LENGTHS) == (read[0], 2 * (learn + read[0]))
    both = method(divergence=SimpleNamespace(target=len))
    assert step_flops(both, LENGTHS) == (read[0], learn + read[1] + read[0])
    view = np.array([8, 8])
    more = forward_flops(config, view, LENGTHS.completion)
    for each in (method(), both):
        found = step_flops(each, LENGTHS._replace(views=(view, view)))
        assert found == pytest.approx((read[0], learn + read[1] + 2 * more))
    beside = Mix((Distillation(), Likelihood(of=References())))
    assert step_flops(method(objective=beside), LENGTHS) is None
    assert step_flops(method(reasoner=object()), LENGTHS) is None
    mixed = writer_prompts(method(completions=MixedRollouts()), LENGTHS)
    assert mixed.tolist() == [3, 9]


def test_decoding_reads_every_weight_once_a_token_and_what_is_cached():
    params = tiny_variables(tiny_config())["params"]
    layers = sum(x.size for x in jax.tree.leaves(params) if x.ndim > 2)  # stacked matrices
    whole = layers + params["lm_head"].size
    cached = 2 * 2 * 8 * 2 * sum(p + t for p, n in ((3, 5), (4, 2)) for t in range(1, n + 1))
    assert decoding_bytes(method(), LENGTHS, 4, 1, 1) == 4 * (5 * whole + cached)
    assert decoding_bytes(method(), LENGTHS, 4, 2, 2) == 4 * (5 * whole + cached / 2) / 2
    eight = method(rollout=RolloutConfig(8, weights="int8", dtype="bfloat16"))
    assert decoding_bytes(eight, LENGTHS, 4, 1, 1) == 5 * whole + 2 * cached
    assert decoding_bytes(method(completions=References()), LENGTHS, 4, 1, 1) is None
