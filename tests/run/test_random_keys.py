# SPDX-License-Identifier: Apache-2.0
"""No two draws of a run share a random key, whatever they decide."""

import collections
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opsd_jax.divergence.config import DivergenceConfig
from opsd_jax.evaluation.evaluate import EvaluateConfig, Evaluator, Prompt
from opsd_jax.method.reason_first import Reasoner
from opsd_jax.method.teacher import TeacherConfig
from opsd_jax.method.train_step import Method, init_state, train_step
from opsd_jax.model.config import LoraConfig
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.run.assembly import Assembly, initial_variables
from opsd_jax.sampling.config import RolloutConfig
from tests.evaluation.test_evaluate import PROBLEMS, SmallTokenizer
from tests.tiny import tiny_batch, tiny_config

SETTINGS = RolloutConfig(5, segment_len=4)  # No stop id and no part of a segment: no row waits.


class Keys:
    """What keys serve, as seen at run time.

    drawn: of every draw; parents: key -> the places in the code that derive others from it.
    """

    def __init__(self):
        self.drawn: list[bytes] = []
        self.parents: dict[bytes, set[str]] = collections.defaultdict(set)

    def draws(self, key):
        self._tell(key, self.drawn.append)
        return key

    def derives(self, key):
        frame = sys._getframe(2)  # Whoever called the patched `fold_in`.
        while not any(
            part in frame.f_code.co_filename for part in ("/opsd_jax/", "/flax/", "/tests/")
        ):
            frame = frame.f_back
        place = f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
        self._tell(key, lambda data: self.parents[data].add(place))
        return key

    def _tell(self, key, say):
        data = jax.random.key_data(key)
        jax.debug.callback(lambda data: say(np.asarray(data).tobytes()), data)

    def refuse_shared(self):
        twice = [key for key, number in collections.Counter(self.drawn).items() if number > 1]
        assert not twice, f"{len(twice)} keys serve two draws"
        both = [self.parents[key] for key in self.drawn if key in self.parents]
        assert not both, f"{len(both)} keys serve a draw and are folded in {both[0]}"
        shared = [places for places in self.parents.values() if len(places) > 1]
        assert not shared, shared


@pytest.fixture
def keys(monkeypatch):
    keys, scope = Keys(), flax.core.scope.Scope
    uniform, fold_in, make_rng = jax.random.uniform, jax.random.fold_in, scope.make_rng
    monkeypatch.setattr(jax.random, "uniform", lambda key: uniform(keys.draws(key)))
    monkeypatch.setattr(jax.random, "fold_in", lambda key, x: fold_in(keys.derives(key), x))
    monkeypatch.setattr(scope, "make_rng", lambda self, name="": keys.draws(make_rng(self, name)))
    return keys


def method():
    lora = LoraConfig(rank=2, alpha=2, targets=("q_proj", "down_proj"), dropout=0.3)
    return Method(
        model=Decoder(tiny_config(lora=lora)),
        rollout=SETTINGS,
        divergence=DivergenceConfig(),
        teacher=TeacherConfig().build(),
        optimizer=optax.sgd(0.1),
        num_micro_batches=2,
        num_updates=2,
        reasoner=Reasoner(SETTINGS, (1,)),
    )


class Handed(Exception):
    """The keys that the evaluator hands its sampler, one per completion."""


def evaluation_keys(seed: int):
    def sampler(variables, prompts, settings, keys):
        raise Handed(keys)

    evaluator = object.__new__(Evaluator)
    config = EvaluateConfig(seed=seed)
    evaluator.__dict__ |= {
        "config": config,
        "settings": SETTINGS,
        "sampler": sampler,
        "tokenizer": SmallTokenizer(),
    }
    prompts = [Prompt(problem, [1]) for problem in PROBLEMS.problems[:4]]
    with pytest.raises(Handed) as handed:
        list(evaluator._generations("student", "sampled", {}, prompts, 3, None))
    return handed.value.args[0]


@pytest.mark.slow
def test_no_two_draws_of_a_run_share_a_key(keys):
    """Adapters, analyses, completions, dropout in passes and micro-batches, held-out samples."""
    chosen, seed, num_steps, num_rows = method(), 0, 2, 4
    model, root = chosen.model, jax.random.key(seed)
    shapes = jax.eval_shape(lambda: flax.linen.meta.unbox(init_variables(model, root)))
    parameters = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes["params"])
    mesh = jax.make_mesh((1,), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    parts = Assembly(model, chosen, mesh, (), jax.tree.map(lambda _: place, shapes), None)
    adapters = jax.device_get(initial_variables(parts, parameters, seed)["lora"])
    jax.effects_barrier()
    initial = len(keys.drawn)
    assert initial >= 2 * 2  # A of two projections in two layers, and weights that are dropped.

    state = init_state(chosen, {"lora": adapters}, {"params": parameters}, root)
    step = jax.jit(lambda state, batch: train_step(chosen, state, batch)[0])
    for _ in range(num_steps):
        state = step(state, tiny_batch(num_rows))
    jax.effects_barrier()
    texts = 2 * SETTINGS.max_new_tokens * num_rows
    dropouts = chosen.num_updates * chosen.num_micro_batches * 2 * 2
    assert len(keys.drawn) == initial + num_steps * (texts + dropouts)

    for key in evaluation_keys(seed):
        for t in range(SETTINGS.max_new_tokens):
            keys.draws(jax.random.fold_in(key, t))
    jax.effects_barrier()
    keys.refuse_shared()
