# SPDX-License-Identifier: Apache-2.0
"""Rows that are refilled against one rollout per prompt, alone."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.model.decoder import Decoder
from opsd_jax.model.kv_cache import capacity, parts
from opsd_jax.model.sharding import MeshConfig, make_mesh
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.prompts import pad
from opsd_jax.sampling.rollout import rollout
from opsd_jax.sampling.slots import Sampler
from tests.representatives import representatives
from tests.tiny import VOCAB, tiny_config, tiny_variables

CONFIG = RolloutConfig(max_new_tokens=23, stop_ids=(3, 5), segment_len=4)
NUM_SLOTS = 4


def sampler(data=1, model=1, num_slots=NUM_SLOTS, replica=1):
    config = MeshConfig(data, model, replica=replica)
    mesh = make_mesh(config, jax.devices()[: replica * data * model])
    return Sampler(Decoder(tiny_config()), 0, mesh, config.rules, num_slots)


def questions(num=7, samples=3, longest=19):
    """Prompts of uneven lengths, each asked several times, and a key for each sample."""
    r = np.random.default_rng(0)
    prompts = [r.integers(1, VOCAB, n).tolist() for n in r.integers(1, longest, num)]
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    return prompts, jax.random.split(jax.random.key(3), len(prompts))


def alone(prompts, keys, config):
    model, variables = Decoder(tiny_config()), tiny_variables(tiny_config())
    jitted = jax.jit(partial(rollout, model, variables, config=config))
    for prompt, key in zip(prompts, keys, strict=True):
        ids = np.zeros((1, 32), np.int32)
        ids[0, : len(prompt)] = prompt
        out = jitted(jnp.asarray(ids), jnp.asarray([len(prompt)]), key[None])
        mask = np.asarray(out.mask[0])
        yield out.ids[0][mask].tolist(), np.asarray(out.logps[0][mask]), bool(out.stopped[0])


def together(prompts, keys, config):
    """(ids, logps, stopped) of every prompt, by one rollout of all."""
    variables = tiny_variables(tiny_config())
    jitted = jax.jit(partial(rollout, Decoder(tiny_config()), variables, config=config))
    out = jax.tree.map(np.asarray, jitted(*map(jnp.asarray, pad(prompts, 32, 0)), keys))
    for ids, mask, logps, stopped in zip(out.ids, out.mask, out.logps, out.stopped, strict=True):
        yield ids[mask].tolist(), logps[mask], bool(stopped)


PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "min_new_tokens": 3, "top_k": 9}


@pytest.mark.parametrize(
    "changes, slots",
    [
        pytest.param({}, (1, 1), marks=pytest.mark.slow),
        pytest.param({}, (4, 2), marks=pytest.mark.slow),
        ({}, (4, 2, 16)),
        pytest.param({"min_p": 0.01}, (2, 2, 16, 2), marks=pytest.mark.slow),
        (PENALTIES, (1, 1)),
        ({"max_new_tokens": 1}, (1, 1)),
        ({"unroll_layers": 0, "temperature": 0.0, "stop_ids": ()}, (1, 1)),
    ],
)
def test_refilled_slots_say_what_every_prompt_says_alone(changes, slots):
    config = dataclasses.replace(CONFIG, **changes)
    prompts, keys = questions()
    found = {
        s.prompt: s for s in sampler(*slots)(tiny_variables(tiny_config()), prompts, config, keys)
    }
    assert sorted(found) == list(range(len(prompts)))
    for i, (ids, logps, stopped) in enumerate(alone(prompts, keys, config)):
        assert (found[i].ids, found[i].stopped) == (ids, stopped)
        np.testing.assert_allclose(found[i].logps, logps, atol=1e-5)


@pytest.mark.slow
def test_the_order_of_the_prompts_does_not_matter():
    prompts, keys = questions()
    run, variables = sampler(), tiny_variables(tiny_config())
    order = np.random.default_rng(1).permutation(len(prompts))
    straight = {s.prompt: s.ids for s in run(variables, prompts, CONFIG, keys)}
    mixed = run(variables, [prompts[i] for i in order], CONFIG, keys[order])
    assert {int(order[s.prompt]): s.ids for s in mixed} == straight


def row_steps(run, *asked):
    """Rows computed per step, for every step of a run that has been compiled."""
    (programs,), found = run._programs.values(), []
    inner = programs.segment

    def recorded(variables, rows):
        found.extend([len(rows.ids)] * CONFIG.segment_len)
        return inner(variables, rows)

    programs.segment = recorded
    list(run(*asked))
    return found


@pytest.mark.parametrize(("num", "rows"), representatives([(1, 1), (3, 4), (21, 16)], (3, 4)))
def test_no_more_rows_are_computed_than_there_are_prompts(num, rows):
    prompts, keys = questions()
    config = dataclasses.replace(CONFIG, min_new_tokens=CONFIG.max_new_tokens)
    asked = tiny_variables(tiny_config()), prompts[:num], config, keys[:num]
    run = sampler(num_slots=16)
    assert len(list(run(*asked))) == num
    assert max(row_steps(run, *asked)) == rows


def test_a_slot_does_not_wait_for_a_long_neighbour():
    """Lengths are uneven, so 21 samples on 4 slots take fewer steps than batches of 4 would."""
    prompts, keys = questions()
    asked = tiny_variables(tiny_config()), prompts, CONFIG, keys
    run = sampler()
    lengths = [len(s.ids) for s in sorted(run(*asked))]
    steps = len(row_steps(run, *asked))
    in_batches = sum(max(lengths[at : at + 4]) for at in range(0, 21, 4))
    assert sum(lengths) / NUM_SLOTS <= steps < in_batches


def test_the_last_rows_move_to_a_quarter_of_the_slots():
    """One long answer among short ones: after them it is computed alone, and stays the same."""
    prompts, keys = questions()
    run, variables = sampler(), tiny_variables(tiny_config())
    found = sorted(run(variables, prompts, CONFIG, keys), key=lambda s: len(s.ids))
    chosen = [*found[:3], found[-1]]
    asked = [prompts[s.prompt] for s in chosen], CONFIG, keys[np.array([s.prompt for s in chosen])]
    again = sorted(run(variables, *asked))
    assert [s.ids for s in again] == [s.ids for s in chosen]
    together, all_steps = (
        -(-(len(s.ids) - 1) // CONFIG.segment_len) * CONFIG.segment_len for s in chosen[2:]
    )
    assert together < all_steps
    steps = row_steps(run, variables, *asked)
    assert steps == [4] * together + [1] * (all_steps - together)


def test_equal_prompts_are_read_once_and_a_handful_of_programs_is_compiled():
    prompts, keys = questions(num=3, samples=9)
    run, variables = sampler(), tiny_variables(tiny_config())
    list(run(variables, prompts, CONFIG, keys))
    (programs,) = run._programs.values()
    reads, read = [], programs.read
    programs.read = lambda *arguments: reads.append(1) or read(*arguments)
    list(run(variables, prompts, CONFIG, keys))
    assert len(reads) == 1
    assert len(programs.sizes) <= 4
    for longest in (2, 5, 9, 16):  # Prompts of other lengths, the same width and programs.
        other, other_keys = questions(longest=longest)
        list(run(variables, other, CONFIG, other_keys))
    assert set(run._programs) <= {(CONFIG, 16), (CONFIG, 32)}


def test_nothing_asked_nothing_said():
    keys = jax.random.split(jax.random.key(0), 0)
    assert list(sampler()(tiny_variables(tiny_config()), [], CONFIG, keys)) == []


@pytest.mark.parametrize("unroll_layers", representatives([0, 4], 4))
def test_no_device_holds_the_caches_of_all_rows(unroll_layers):
    """Neither before the first prompt is placed nor when a quarter of the rows goes on."""
    prompts, keys = questions()
    config = dataclasses.replace(CONFIG, unroll_layers=unroll_layers)
    run, variables = sampler(4, 2, 16), tiny_variables(tiny_config())
    list(run(variables, prompts, config, keys))
    (programs,) = run._programs.values()
    ids = np.ones((16, 32), np.int32)
    store = programs.read(programs.prepare(variables), ids, np.full(16, 3, np.int32))
    rows = programs.idle(store)
    few = programs.pick(rows, np.arange(4, dtype=np.int32))
    for kept, num_rows in ((rows, 16), (few, 4)):
        for x in jax.tree.leaves(kept.cache):
            here = x.addressable_shards[0].data.shape
            assert here[-4:-2] == (num_rows // 4, tiny_config().num_kv_heads // 2)
            assert x.shape[-4:-2] == (num_rows, tiny_config().num_kv_heads)


def recorded_caches(run, variables, prompts, config, keys):
    """Completions; of every part, at every segment, (slots, slots that its rows need); how often
    rows moved; the sizes that there are."""
    list(run(variables, [max(prompts, key=len)], config, keys[:1]))
    (programs,) = run._programs.values()
    segment, exchange, found, moves = programs.segment, programs.exchange, [], []

    def recorded(variables, rows):
        needs = np.where(rows.done, 0, np.asarray(rows.lengths) + programs.length)
        found.append([(capacity(part), needs[own].max()) for part, own in parts(rows.cache)])
        return segment(variables, rows)

    programs.segment = recorded
    programs.exchange = lambda *rows: moves.append(rows) or exchange(*rows)
    return list(run(variables, prompts, config, keys)), found, len(moves), programs.sizes


@pytest.mark.parametrize(
    "changes, model",
    [
        pytest.param({"stop_ids": (11,)}, 1, marks=pytest.mark.slow),
        pytest.param(
            {"stop_ids": (7,), "presence_penalty": 0.3, "unroll_layers": 0},
            2,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_long_row_does_not_make_all_caches_long(changes, model):
    """Rows change places between the parts of the cache, and say what they say in a rollout."""
    config = dataclasses.replace(CONFIG, max_new_tokens=140, **changes)
    prompts, keys = questions(num=40, samples=2)
    asked = tiny_variables(tiny_config()), prompts, config, keys
    out, found, moves, sizes = recorded_caches(sampler(1, model, 8), *asked)
    assert moves > 0
    assert all(slots >= need for caches in found for slots, need in caches)
    small = [c for c in found if len(c) == 2 and c[0][0] > c[1][0]]
    assert small and all(caches[1][0] == sizes[0] for caches in small)
    said = {s.prompt: s for s in out}
    assert sorted(said) == list(range(len(prompts)))
    assert max(len(s.ids) for s in out) > sizes[0] > np.median([len(s.ids) for s in out])
    for i, (ids, logps, stopped) in enumerate(together(prompts, keys, config)):
        assert (said[i].ids, said[i].stopped) == (ids, stopped)
        np.testing.assert_allclose(said[i].logps, logps, atol=1e-5)


@pytest.mark.slow
def test_the_cache_is_as_large_as_the_longest_row_needs():
    """It grows as rows do, and shrinks again when the long ones have made room."""
    prompts, keys = questions(num=6, samples=1)
    config = dataclasses.replace(CONFIG, max_new_tokens=140, stop_ids=())
    asked = tiny_variables(tiny_config()), prompts, config, keys
    _, found, _, sizes = recorded_caches(sampler(), *asked)
    least = [min(s for s in sizes if s >= max(need for _, need in caches)) for caches in found]
    first = [caches[0][0] for caches in found]
    assert first == least and first != sorted(first) and set(first) == set(sizes)
    shapes = {tuple(slots for slots, _ in caches) for caches in found}
    assert len([shape for shape in shapes if len(shape) == 2]) < 2 * len(sizes)
    # Three of four rows are long at once, for which the first part has no room.
    assert any(len(caches) == 2 and caches[1][0] > sizes[0] for caches in found)
