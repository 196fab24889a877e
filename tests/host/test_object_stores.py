# SPDX-License-Identifier: Apache-2.0
"""What the lock and the checkpoints need of a store, on servers that speak S3 and GCS."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.errors import UserError
from opsd_jax.host.bucket import BucketError, BucketPath
from opsd_jax.host.bucket_checkpoint import checkpoints_of
from opsd_jax.host.lease import Lease
from opsd_jax.host.lock import only_writer
from opsd_jax.host.stage import Stage, local
from tests.host.test_bucket import (
    test_an_object_is_written_if_nobody_else_has as written_if,
)
from tests.host.test_bucket import test_objects_below_a_path_are_its_own as objects_below
from tests.host.test_bucket_checkpoint import save_some
from tests.host.test_checkpoint import assert_same, make_iterator, make_state
from tests.pods import run_pod


def test_objects_and_conditions_are_as_in_memory(emulated):
    objects_below(BucketPath(f"{emulated}/some folder/objects"))
    written_if(BucketPath(f"{emulated}/conditions"))
    with pytest.raises(BucketError, match="cannot write .*/no-bucket/x: NOT_FOUND"):
        BucketPath(f"{emulated[:5]}no-bucket/x").write(b"")


def test_one_writer_whose_files_and_steps_another_process_finds(emulated):
    run = BucketPath(f"{emulated}/run")
    folder = local(str(run))
    with only_writer(folder, print):
        second = Stage(run)
        assert (run / ".lock").is_file()
        (folder / "metrics.jsonl").write_text("1\n")
        save_some(run, 1, 2, max_to_keep=1)
        second.fetch()
        assert (second.folder / "metrics.jsonl").read_text() == "1\n"
    assert not (run / ".lock").is_file()
    steps = {name.split("/")[1] for name in run.names() if name.startswith("checkpoints/")}
    assert steps == {"2"}
    iterator = make_iterator()
    found = checkpoints_of(folder).restore(make_state(0), iterator)
    assert found.step == 2
    assert_same(found.state, make_state(2))


def test_the_lock_of_a_dead_process_is_taken_once(emulated):
    path = BucketPath(f"{emulated}/locked/.lock")
    dead, one = Lease(path, 1.0), Lease(path, 1.0)
    dead.take(print)
    one.take(print)
    with pytest.raises(UserError, match="taken over"):
        dead.renew()
    dead.release()
    one.renew()
    one.release()
    assert not path.is_file()


POD = """
import grain, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from opsd_jax.host.bucket_checkpoint import checkpoints_of
from opsd_jax.host.lock import only_writer
from opsd_jax.host.pod import first_process_first
from opsd_jax.host.stage import fetch, local, stage_of, upload

jax.distributed.initialize()
folder = local(arguments[0])

def make():
    fetch(folder)
    if not (folder / "base").exists():
        (folder / "base").write_text(f"made by {index}")
    upload(folder)
    return (folder / "base").read_text()

def numbers():
    return iter(grain.MapDataset.source(range(9)).to_iter_dataset())

mesh = Mesh(np.array(jax.devices()), ("data",))
values = np.arange(64, dtype=np.float32).reshape(8, 8)
sharding = NamedSharding(mesh, PartitionSpec("data"))
state = {
    "w": jax.make_array_from_callback(values.shape, sharding, lambda i: values[i]),
    "key": jax.jit(lambda: jax.random.key(5), out_shardings=NamedSharding(mesh, PartitionSpec()))(),
}
position = numbers()
for _ in range(index + 1):
    next(position)
said = []
with only_writer(folder, print), checkpoints_of(folder, warn=said.append) as checkpoints:
    assert first_process_first(make, "base") == "made by 0"
    for step in (1, 2):
        assert checkpoints.save(step, state, position)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
    if index == 0:
        (stage_of(folder).source / "checkpoints/2/data/process_1-of-2.json").unlink()
    jax.experimental.multihost_utils.sync_global_devices("removed")
    fresh = numbers()
    step, again, _ = checkpoints.restore(state, fresh)
    assert step == 1 and next(fresh) == index + 1, step
    assert len(said) == (index == 0), said
    for shard in again["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, values[shard.index])
    assert checkpoints.save(2, state, position)
print(folder)
"""


@pytest.mark.slow
def test_a_pod_writes_its_shards_and_another_mesh_reads_them(emulated):
    run = BucketPath(f"{emulated}/pod")
    folders = [said.splitlines()[-1] for said, _ in run_pod(POD, run, num_devices=2)]
    assert len(set(folders)) == 2  # as hosts that share no disk
    steps = {name.split("/")[1] for name in run.names() if name.startswith("checkpoints/")}
    assert steps == {"1", "2", "2.bad"} and (run / "base").read_text() == "made by 0"
    state = {"w": jnp.zeros((8, 8)), "key": jax.random.key(0)}
    one = checkpoints_of(local(str(run)), warn=pytest.fail)
    found = one.restore(state)
    assert found.step == 2
    np.testing.assert_array_equal(found.state["w"], np.arange(64).reshape(8, 8))
    assert found.state["key"] == jax.random.key(5)
    with pytest.raises(UserError, match="of 2 processes"):
        one.restore(state, make_iterator())
