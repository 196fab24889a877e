# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in a bucket: exact round trips on other meshes, commits, damage, what is kept."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from opsd_jax.errors import UserError
from opsd_jax.host import array_objects, bucket_checkpoint
from opsd_jax.host.bucket import BucketError, BucketPath
from opsd_jax.host.bucket_checkpoint import checkpoints_of
from opsd_jax.host.stage import local
from tests.host.test_checkpoint import (
    assert_same,
    bits,
    make_iterator,
    make_state,
    position_after,
)


def mesh(*shape: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("data", "model")[: len(shape)])


def placed(array, *spec, on: Mesh) -> jax.Array:
    return jax.device_put(array, NamedSharding(on, PartitionSpec(*spec)))


# ------------------------------------------------------------------------------ arrays

LEAVES = {
    "words": lambda: jax.random.normal(jax.random.key(0), (16, 8)),
    "half": lambda: jax.random.normal(jax.random.key(1), (8, 8)).astype(jnp.bfloat16),
    "minus_zeros": lambda: -jnp.zeros((8, 4)),
    "bytes": lambda: (jnp.arange(32) - 16).astype(jnp.int8).reshape(8, 4),
    "flags": lambda: jnp.arange(16).reshape(8, 2) % 3 == 0,
}


def test_any_mesh_reads_what_another_wrote_bit_for_bit(bucket_run):
    four = mesh(4)
    state = {name: placed(make(), "data", on=four) for name, make in LEAVES.items()}
    state |= {
        "deep/key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(8, impl="rbg"), 3),
        "scalar": jnp.int32(5),
        "empty": jnp.zeros((0, 3)),
        "replicated": placed(jnp.arange(6.0), on=four),
    }
    array_objects.write(bucket_run, array_objects.shares(state))
    # One object per shard, and a replicated array is written once.
    chunks = [name for name in bucket_run.names() if name.startswith("words/c/")]
    assert len(chunks) == 4 and "replicated/c/0" in bucket_run.names()
    both, one = mesh(2, 4), SingleDeviceSharding(jax.devices()[3])
    for layout in (NamedSharding(both, PartitionSpec("model", "data")), one):
        whole = one if layout is one else NamedSharding(both, PartitionSpec())
        wanted = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=layout if name in LEAVES else whole
            )
            for name, leaf in state.items()
        }
        found = array_objects.read(bucket_run, wanted)
        for name, leaf in zip(wanted, found, strict=True):
            assert (leaf.dtype, leaf.shape, bits(leaf)) == (
                state[name].dtype,
                state[name].shape,
                bits(state[name]),
            ), name
            assert leaf.sharding.is_equivalent_to(wanted[name].sharding, leaf.ndim), name


def test_objects_are_cut_before_they_are_too_large(bucket_run, monkeypatch):
    monkeypatch.setattr(array_objects, "_MOST_CHUNK_BYTES", 64)
    array = placed(jnp.arange(96.0).reshape(12, 8), "data", on=mesh(2))  # 192 bytes a shard
    array_objects.write(bucket_run, array_objects.shares({"x": array}))
    stored = [bucket_run / name for name in bucket_run.names() if "/c/" in name]
    sizes = [len(path.read()[0]) for path in stored]
    assert sizes == [64] * 6  # [2, 8] float32
    (found,) = array_objects.read(bucket_run, {"x": array})
    assert bits(found) == bits(array)
    assert array_objects._chunk((5, 3), 100) == (1, 1)  # smaller it cannot be


def test_what_is_donated_later_is_saved_as_it_was(bucket_run):
    big = jnp.ones((1000, 100))
    shares = array_objects.shares({"x": big})
    jax.block_until_ready(jax.jit(lambda x: x * 0 - 7, donate_argnums=0)(big))
    array_objects.write(bucket_run, shares)
    wanted = jax.ShapeDtypeStruct(big.shape, big.dtype, sharding=big.sharding)
    np.testing.assert_array_equal(array_objects.read(bucket_run, {"x": wanted})[0], 1.0)


# ------------------------------------------------------------------------------ steps


def save_some(bucket_run: BucketPath, *steps: int, **limits) -> None:
    iterator = make_iterator()
    with checkpoints_of(local(str(bucket_run)), **limits) as checkpoints:
        for step in steps:
            next(iterator)
            assert checkpoints.save(step, make_state(step), iterator, {"note": f"at {step}"})


def test_restores_state_data_and_meta_exactly(bucket_run):
    save_some(bucket_run, 1, 2, 3)
    checkpoints, iterator = checkpoints_of(local(str(bucket_run))), make_iterator()
    assert checkpoints.steps() == [1, 2, 3] and checkpoints.meta() == {"note": "at 3"}
    step, state, meta = checkpoints.restore(make_state(0), iterator)
    assert (step, meta) == (3, {"note": "at 3"})
    assert_same(state, make_state(3))
    np.testing.assert_array_equal(next(iterator), position_after(3))
    part = checkpoints.restore_only({"params": make_state(0).params, "lora": None}, step=2)
    assert_same(part.state["params"], make_state(2).params)
    with pytest.raises(UserError, match=f"{bucket_run}/checkpoints has no step 7, only"):
        checkpoints.restore(make_state(0), step=7)
    with pytest.raises(UserError, match="is float32.* in .* and float32.* here"):
        checkpoints.restore(make_state(0, width=8))


def test_saving_twice_writes_once_and_going_back_is_refused(bucket_run):
    save_some(bucket_run, 1, 3)
    with checkpoints_of(local(str(bucket_run))) as checkpoints:
        assert not checkpoints.save(3, make_state(9))
        with pytest.raises(UserError, match="already holds step 3"):
            checkpoints.save(2, make_state(2))


def test_latest_and_best_survive_and_nothing_is_left_of_the_others(bucket_run):
    folder = local(str(bucket_run))
    for steps in ((1, 2, 3), (4, 5)):  # also across restarts
        with checkpoints_of(folder, 2, "acc") as checkpoints:
            for step in steps:
                checkpoints.save(step, make_state(step), metrics={"acc": -abs(step - 2)})
    assert checkpoints_of(folder).steps() == [2, 4, 5]
    assert {name.split("/")[1] for name in bucket_run.names()} == {"2", "4", "5"}
    assert checkpoints_of(folder, 2, "acc").best_step() == 2


def test_a_step_counts_once_its_record_is_there_and_the_files_before_it(bucket_run, monkeypatch):
    """As if killed before any of the writes of step 2: what is left of it goes with the next."""
    save_some(bucket_run, 1)
    folder, writes = local(str(bucket_run)), []
    write = BucketPath.write

    class Killed(BaseException): ...

    def cut(self, content):
        writes.append(str(self))
        if str(self).endswith("2/meta/metadata"):
            raise Killed
        return write(self, content)

    (folder / "metrics.jsonl").write_text("the lines of step 2")
    with monkeypatch.context() as patch:
        patch.setattr(BucketPath, "write", cut)
        with pytest.raises(Killed):
            checkpoints = checkpoints_of(folder)
            checkpoints.save(2, make_state(2), make_iterator())
            checkpoints.wait()
    assert writes[0] == f"{bucket_run}/metrics.jsonl" and writes[-1].endswith("meta/metadata")
    assert any(name.startswith("checkpoints/2/state/") for name in bucket_run.names())
    assert checkpoints_of(folder).steps() == [1]
    half = bucket_run / "checkpoints/2/state/params/embed"
    half.rmtree()
    (half / "zarr.json").write(b"of another mesh")
    save_some(bucket_run, 2)
    assert_same(checkpoints_of(folder).restore(make_state(0)).state, make_state(2))


def cut_short(path: BucketPath) -> None:
    path.write(path.read()[0][:-1])


def flip(path: BucketPath) -> None:
    content = bytearray(path.read()[0])
    content[len(content) // 2] ^= 1
    path.write(bytes(content))


@pytest.mark.parametrize(
    "name, damage",
    [
        ("state/params/embed/c/0/0", cut_short),
        ("state/params/embed/c/0/0", flip),
        ("state/params/embed/c/0/0", BucketPath.unlink),
        ("state/key/zarr.json", cut_short),
        ("state/key/zarr.json", BucketPath.unlink),
        ("data/process_0-of-1.json", flip),
        ("meta/metadata", cut_short),
        ("meta/metadata", flip),
    ],
)
def test_a_damaged_step_falls_back_loudly_and_nothing_is_deleted(bucket_run, name, damage):
    save_some(bucket_run, 1, 2)
    damage(bucket_run / "checkpoints/2" / name)
    told = []
    with checkpoints_of(local(str(bucket_run)), warn=told.append) as checkpoints:
        found = checkpoints.restore(make_state(0), make_iterator())
        assert found.step == 1 and len(told) == 1 and "falling back" in told[0]
        checkpoints.save(2, make_state(5))
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
    assert_same(checkpoints_of(local(str(bucket_run))).restore(make_state(0)).state, make_state(5))
    assert (bucket_run / "checkpoints/2.bad").exists()


def test_a_store_that_is_away_is_no_damage(bucket_run, monkeypatch):
    save_some(bucket_run, 1, 2)
    checkpoints = checkpoints_of(local(str(bucket_run)), warn=pytest.fail)

    def away(*_, **__):
        raise BucketError("cannot read it: UNAVAILABLE: no network")

    for part in ("opsd_jax.host.array_objects.read", "opsd_jax.host.bucket.BucketPath.read"):
        with monkeypatch.context() as patch:
            patch.setattr(part, away)
            with pytest.raises(BucketError, match="UNAVAILABLE"):
                checkpoints.restore(make_state(0))
    assert checkpoints.restore(make_state(0)).step == 2


def test_who_has_lost_the_lock_commits_nothing(bucket_run, monkeypatch):
    save_some(bucket_run, 1)
    folder = local(str(bucket_run))
    written = threading.Event()

    def lost(stage):
        if written.is_set():
            raise UserError("another process has taken over")
        written.set()  # it still had it when the save began

    monkeypatch.setattr("opsd_jax.host.stage.Stage.confirm", lost)
    checkpoints = checkpoints_of(folder)
    checkpoints.save(2, make_state(2))
    with pytest.raises(UserError, match="has taken over"):
        checkpoints.wait()
    assert checkpoints_of(folder).steps() == [1]
    assert isinstance(checkpoints, bucket_checkpoint.BucketCheckpoints)
