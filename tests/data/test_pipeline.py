# SPDX-License-Identifier: Apache-2.0
import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_jax.data.contexts import ContextConfig
from opsd_jax.data.pipeline import make_batches
from opsd_jax.data.problems import LoadedProblems, Problem
from opsd_jax.data.training_prompts import TrainingPrompts
from opsd_jax.errors import UserError


def problem_set(size):
    problems = tuple(Problem(str(i), str(i), "s", "a") for i in range(size))
    return LoadedProblems(problems, lambda problem, completion: 0.0)


def render(problem):
    number = int(problem.question)
    return {"ids": np.full(3, number, np.int32), "length": np.int32(number % 3)}


def render_most(problem):
    return None if int(problem.question) % 5 == 4 else render(problem)


def take(batches, count):
    iterator = iter(batches)
    return [next(iterator) for _ in range(count)]


def test_batches_hold_what_render_gave():
    for batch in take(make_batches(problem_set(10), render, 4), 5):
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            "index": ((4,), np.int32),
            "ids": ((4, 3), np.int32),
            "length": ((4,), np.int32),
        }
        np.testing.assert_array_equal(batch["ids"], np.repeat(batch["index"][:, None], 3, 1))
        np.testing.assert_array_equal(batch["length"], batch["index"] % 3)


@settings(max_examples=20, deadline=None)
@given(
    size=st.integers(4, 20),
    seed=st.integers(0, 2**31),
    epochs=st.integers(1, 3),
)
def test_every_epoch_shows_every_problem_once(size, seed, epochs):
    batches = make_batches(problem_set(size), render, 4, seed)
    stream = np.concatenate([b["index"] for b in take(batches, size * epochs // 4)])
    for epoch in range(len(stream) // size):
        assert set(stream[epoch * size : (epoch + 1) * size]) == set(range(size))


def test_epochs_and_seeds_shuffle_differently():
    def order(seed):
        batches = take(make_batches(problem_set(16), render, 16, seed), 2)
        return [tuple(batch["index"]) for batch in batches]

    assert len({*order(0), *order(1)}) == 4
    assert order(0) == order(0)


def test_what_does_not_fit_is_dropped_and_counted(caplog):
    batches = make_batches(problem_set(10), render_most, 8)
    assert (batches.num_problems, batches.num_dropped) == (8, 2)
    assert "2 of 10 problems are dropped" in caplog.text
    (batch,) = take(batches, 1)
    assert set(batch["index"]) == {0, 1, 2, 3, 5, 6, 7, 8}


@pytest.mark.parametrize("position", [0, 1, 7, 30])
def test_a_position_resumes_exactly(position):
    """Across the end of an epoch, on a pipeline made anew."""
    batches = make_batches(problem_set(11), render_most, 3)
    straight = take(batches, position + 5)
    iterator = iter(batches)
    for _ in range(position):
        next(iterator)
    state = iterator.get_state()
    assert state == {"next_index": position}
    resumed = iter(make_batches(problem_set(11), render_most, 3))
    next(resumed)
    resumed.set_state(state)
    for expected in straight[position:]:
        np.testing.assert_equal(next(resumed), expected)


def test_orbax_keeps_the_position(tmp_path):
    batches = make_batches(problem_set(11), render, 3)
    iterator = iter(batches)
    for _ in range(5):
        next(iterator)
    with ocp.CheckpointManager(tmp_path) as manager:
        save = grain.checkpoint.CheckpointSave(iterator)
        manager.save(5, args=ocp.args.Composite(data=save))
        expected = [next(iterator) for _ in range(4)]  # while the save may still be running
        manager.wait_until_finished()
        restored = iter(batches)
        restore = grain.checkpoint.CheckpointRestore(restored)
        manager.restore(5, args=ocp.args.Composite(data=restore))
    for batch in expected:
        np.testing.assert_equal(next(restored), batch)


@pytest.mark.parametrize(
    ("size", "render", "message"),
    [
        (3, render, r"a batch of 4 problems is more than the 3 problems there are \(0 of 3 were"),
        (4, render_most, None),
        (5, lambda problem: None, r"more than the 0 problems there are \(5 of 5 were dropped"),
        (0, render, r"more than the 0 problems there are \(0 of 0"),
    ],
)
def test_too_little_is_told(size, render, message):
    def make():
        return make_batches(problem_set(size), render, 4)

    if message is None:
        assert make().num_problems == 4
        return
    with pytest.raises(UserError, match=message):
        make()


def test_shapes_that_change_are_a_bug_of_render():
    def ragged(problem):
        return {"ids": np.zeros(int(problem.question) + 1, np.int32)}

    with pytest.raises(ValueError, match="for 1, but"):
        make_batches(problem_set(4), ragged, 2)


def test_uneven_prompts_compile_no_more_programs_than_there_are_widths():
    lengths = np.random.default_rng(0).geometric(0.03, 200).clip(1, 300)
    problems = LoadedProblems(
        tuple(Problem(str(i), "q" * n, "s", "a") for i, n in enumerate(lengths.tolist())),
        lambda problem, text: 0.0,
    )

    class Characters:
        pad_id = 0

        def render(self, text, **switches):
            return [ord(c) for c in text]

    prompts = TrainingPrompts(
        ContextConfig("{question}", "{question} {solution}"), Characters(), problems
    )
    batches = make_batches(problems, prompts, 4, narrow=prompts.narrow)
    traced = []

    @jax.jit
    def step(ids):
        traced.append(ids.shape)
        return ids.sum()

    slots = used = 0
    for batch in take(batches, 60):
        step(batch["student_ids"])
        assert (batch["student_ids"] != 0).sum() == batch["student_length"].sum()
        slots += batch["student_ids"].size
        used += 4 * prompts.levels[-1][0]
    assert 1 < len(traced) <= 3 and slots < 0.75 * used
