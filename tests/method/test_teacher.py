# SPDX-License-Identifier: Apache-2.0
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.errors import UserError
from opsd_jax.method.teacher import TeacherConfig
from opsd_jax.plan.program import Program, num_bytes

BASE, ADAPTER = {"w": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0])}
FULL = ({"params": BASE}, {})
LORA = ({"lora": ADAPTER}, {"params": BASE})


def walk(config: TeacherConfig, trainable, frozen, num_steps: int):
    """The teacher's variables after each step; every step adds 1 to all that is trained."""
    teacher = config.build()
    store, seen = teacher.init(trainable, frozen), []
    for step in range(1, num_steps + 1):
        trainable = {k: {n: x + 1 for n, x in tree.items()} for k, tree in trainable.items()}
        store = teacher.update(store, trainable, jnp.int32(step))
        seen.append(teacher.variables(trainable, frozen, store))
    return seen


def test_initial_exists_with_full_fine_tuning_and_with_lora():
    """Invariant 6."""
    *_, last = walk(TeacherConfig("initial"), *FULL, 5)
    assert last["params"]["w"].tolist() == [1.0, 2.0]
    *_, last = walk(TeacherConfig("initial"), *LORA, 5)
    assert set(last) == {"params"} and last["params"]["w"].tolist() == [1.0, 2.0]


def test_the_stored_copy_has_its_own_buffers():
    store = TeacherConfig("initial").build().init(*FULL)
    mine, theirs = store["params"]["w"], FULL[0]["params"]["w"]
    assert mine.unsafe_buffer_pointer() != theirs.unsafe_buffer_pointer()


def test_live_follows_at_once():
    assert walk(TeacherConfig("live"), *LORA, 3)[-1]["lora"]["a"].tolist() == [6.0]
    assert walk(TeacherConfig("live"), *FULL, 3)[-1]["params"]["w"].tolist() == [4.0, 5.0]


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_ema_is_the_weighted_mean(decay):
    seen = walk(TeacherConfig("ema", ema_decay=decay), *LORA, 4)
    expected = 3.0
    for step, variables in enumerate(seen, 1):
        expected = decay * expected + (1 - decay) * (3.0 + step)
        np.testing.assert_allclose(variables["lora"]["a"], [expected], rtol=1e-6)
        assert variables["params"] is BASE


def test_snapshot_is_renewed_every_so_many_steps():
    seen = walk(TeacherConfig("snapshot", snapshot_every_steps=2), *LORA, 5)
    assert [float(v["lora"]["a"][0]) for v in seen] == [3.0, 5.0, 5.0, 7.0, 7.0]


def test_a_snapshot_is_not_rewritten_by_steps_that_keep_it():
    """In the compiled program one branch copies all arrays, and the other none."""
    teacher = TeacherConfig("snapshot", snapshot_every_steps=2).build()
    tree = {"lora": [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 3}

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(store, trainable, number):
        trainable = jax.tree.map(lambda x: x * 2.0, trainable)
        return teacher.update(store, trainable, number), trainable

    text = step.lower(tree, tree, jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text()
    program = Program.parse(text)
    (choice,) = [i for i in program.computations[program.entry] if i.opcode == "conditional"]
    keeps, renews = re.search(r"branch_computations=\{%(\S+), %(\S+)\}", choice.line).groups()

    def made(name: str) -> int:
        whole = [i for i in program.computations[name] if i.opcode in ("copy", "fusion", "call")]
        return sum(num_bytes(each.result) for each in whole)

    assert (made(keeps), made(renews)) == (0, 3 * 64 * 64 * 4)


def test_a_copy_may_be_narrow():
    seen = walk(TeacherConfig("snapshot", snapshot_every_steps=2, dtype="bfloat16"), *LORA, 2)
    assert [v["lora"]["a"].dtype.name for v in seen] == ["bfloat16"] * 2
    assert float(seen[1]["lora"]["a"][0]) == 5.0
    store = TeacherConfig(dtype="bfloat16").build().init(*FULL)
    assert store["params"]["w"].dtype == jnp.bfloat16
    with pytest.raises(UserError, match="teacher.dtype = 'bfloat16' rounds away"):
        TeacherConfig("ema", dtype="bfloat16")


def test_a_users_own_rule():
    own = TeacherConfig("live").build()
    assert TeacherConfig(lambda: own).build() is own


@pytest.mark.parametrize(
    "changes", [{"weights": "frozen"}, {"ema_decay": 1.5}, {"snapshot_every_steps": 0}]
)
def test_bad_settings_name_themselves(changes):
    with pytest.raises(UserError, match=f"teacher.{next(iter(changes))}"):
        TeacherConfig(**changes)
