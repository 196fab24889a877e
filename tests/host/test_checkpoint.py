# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: exact round trips, and every way a checkpoint can go wrong."""

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time

import flax
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_jax.errors import UserError
from opsd_jax.host.checkpoint import Checkpoints
from opsd_jax.host.checkpoint_record import checksums, leaf_checksum
from tests.representatives import representatives
from tests.small_disk import small_disk

# Orbax leaves coroutines behind when a read fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    lora: dict | None
    opt_state: tuple
    key: jax.Array


def make_state(seed, width=16, optimizer=None):
    key = jax.random.key(seed)
    params = {
        "embed": jax.random.normal(key, (8, width)),
        "half": jax.random.normal(key, (3, width)).astype(jnp.bfloat16),
        "zeros": -jnp.zeros((5,)),
        "flags": jnp.arange(4) > 1,
    }
    optimizer = optimizer or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    floats = {name: leaf for name, leaf in params.items() if name != "flags"}
    return State(jnp.int32(seed), params, None, optimizer.init(floats), key)


def make_iterator():
    data = grain.MapDataset.source(range(100)).seed(3).shuffle().repeat().batch(4)
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 1, 2, 3; step n holds make_state(n) and a data position of its own."""
    folder = tmp_path_factory.mktemp("saved")
    iterator = make_iterator()
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2, 3):
            next(iterator)
            checkpoints.save(step, make_state(step), iterator, {"note": f"at {step}"})
    return folder


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


@pytest.fixture(autouse=True)
def collect_what_orbax_leaves():
    """Its coroutines of a failed read complain when collected: here, not in another test."""
    yield
    gc.collect()


def position_after(num_batches):
    iterator = make_iterator()
    for _ in range(num_batches):
        next(iterator)
    return next(iterator)


# ------------------------------------------------------------------------------ round trip


def test_restores_state_data_and_meta_exactly(run):
    iterator = make_iterator()
    step, state, meta = Checkpoints(run).restore(make_state(0), iterator)
    assert (step, meta) == (3, {"note": "at 3"})
    assert_same(state, make_state(3))
    np.testing.assert_array_equal(next(iterator), position_after(3))


def test_restores_an_asked_step_and_an_abstract_state(run):
    restored = Checkpoints(run).restore(jax.eval_shape(lambda: make_state(0)), step=2)
    assert restored.step == 2
    assert_same(restored.state, make_state(2))


def test_restores_some_fields_without_the_optimiser(run):
    restored = Checkpoints(run).restore_only({"params": make_state(0).params, "lora": None})
    assert restored.state.keys() == {"params", "lora"}
    assert_same(restored.state["params"], make_state(3).params)


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    big = jnp.ones((1000, 1000))
    spoil = jax.jit(lambda x: x * 0 - 7, donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": big})
        abstract = {"x": jax.block_until_ready(spoil(big))}
        np.testing.assert_array_equal(checkpoints.restore(abstract).state["x"], 1.0)


def test_saving_twice_writes_once_and_going_back_is_refused(run):
    with Checkpoints(run) as checkpoints:
        assert not checkpoints.save(3, make_state(9))
        with pytest.raises(UserError, match="already holds step 3"):
            checkpoints.save(0, make_state(2))
    assert_same(Checkpoints(run).restore(make_state(0)).state, make_state(3))


def test_reading_leaves_no_trace(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.steps() == []
    with pytest.raises(UserError, match="no checkpoint in .*none"):
        checkpoints.restore(make_state(0))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------- retention


def test_latest_and_best_survive_also_across_restarts(tmp_path):
    scores = {1: 0.2, 2: 0.9, 3: float("nan"), 4: 0.9, 5: None, 6: 0.1, 7: 0.5}
    for step, score in scores.items():  # a fresh process each time: scores come from disk
        with Checkpoints(tmp_path, max_to_keep=2, best_metric="eval/accuracy") as checkpoints:
            metrics = {} if score is None else {"eval/accuracy": score}
            checkpoints.save(step, {"x": jnp.float32(step)}, metrics=metrics)
        expected = {1: 1, 2: 2, 3: 2}.get(step, 4)  # of the two best, the later
        assert checkpoints.best_step() == expected
        assert checkpoints.steps() == sorted({*range(max(1, step - 1), step + 1), expected})


def test_without_a_metric_only_the_latest_survive(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.float32(step)})
    assert checkpoints.steps() == [3]
    assert checkpoints.best_step() is None


# -------------------------------------------------------------------------------- mismatch


def test_another_model_or_optimiser_is_told_by_its_first_leaf(run):
    checkpoints = Checkpoints(run, warn=pytest.fail)
    with pytest.raises(UserError, match=r"leaf params/embed is float32\[8, 16\] in .* and float"):
        checkpoints.restore(make_state(0, width=32))
    with pytest.raises(UserError, match=r"has a leaf opt_state/1/0/count that this run"):
        checkpoints.restore(make_state(0, optimizer=optax.sgd(1e-3)))
    with pytest.raises(UserError, match=r"has no leaf params/more"):
        checkpoints.restore_only({"params": {"more": jnp.zeros(3)}})


def test_data_position_missing_is_told(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(3)})
        with pytest.raises(UserError, match="data positions of 0 processes"):
            checkpoints.restore({"x": jnp.zeros(3)}, make_iterator())


# ------------------------------------------------------------------------------ corruption


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset % len(data)] ^= 0x10
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def alter_position(folder):
    (path,) = (folder / "data").glob("*.json")
    path.write_text(path.read_text().replace('"next_index": 3', '"next_index": 4'))
    assert '"next_index": 4' in path.read_text()


def alter_record(folder):
    path = folder / "meta" / "metadata"
    path.write_text(path.read_text().replace("at 3", "at 4"))


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGES = {
    "truncated array file": lambda folder: truncate(largest(folder / "state" / "d")),
    "array file gone": lambda folder: largest(folder / "state" / "d").unlink(),
    "state gone": lambda folder: shutil.rmtree(folder / "state"),
    "meta gone": lambda folder: shutil.rmtree(folder / "meta"),
    "data gone": lambda folder: shutil.rmtree(folder / "data"),
    "record truncated": lambda folder: truncate(folder / "meta" / "metadata"),
    "record altered": alter_record,
    "data position altered": alter_position,
    "state of another step": lambda folder: shutil.copytree(
        folder.parent / "2" / "state", folder / "state", dirs_exist_ok=True
    ),
    "everything gone": lambda folder: [shutil.rmtree(p) for p in folder.iterdir() if p.is_dir()],
}


@pytest.mark.parametrize(
    "damage",
    representatives(
        DAMAGES, "truncated array file", "record altered", "data position altered", "data gone"
    ),
)
def test_a_damaged_step_falls_back_loudly_and_nothing_is_deleted(run, damage):
    if damage == "state of another step":
        shutil.rmtree(run / "3" / "state" / "d")
    DAMAGES[damage](run / "3")
    said = []
    iterator = make_iterator()
    with Checkpoints(run, warn=said.append) as checkpoints:
        with pytest.raises(UserError, match="/3 is damaged"):
            checkpoints.restore(make_state(0), iterator, step=3)
        assert said == []
        step, state, meta = checkpoints.restore(make_state(0), iterator)
        assert (step, meta) == (2, {"note": "at 2"})
        assert_same(state, make_state(2))
        np.testing.assert_array_equal(next(iterator), position_after(2))
        assert len(said) == 1 and f"{run}/3 is damaged" in said[0]
        assert checkpoints.save(3, make_state(33), iterator)
    assert_same(Checkpoints(run, warn=pytest.fail).restore(make_state(0)).state, make_state(33))
    assert (run / "3.bad").is_dir()


def test_a_damaged_step_that_is_met_twice_is_told_and_set_aside_once(run):
    alter_record(run / "3")
    said = []
    with Checkpoints(run, warn=said.append) as checkpoints:
        assert [checkpoints.restore(make_state(0)).step for _ in range(2)] == [2, 2]
        assert len(said) == 1
        assert checkpoints.save(3, make_state(33))
    assert Checkpoints(run).steps()[-1] == 3 and (run / "3.bad").is_dir()


def test_any_flipped_byte_is_harmless_or_caught(run):
    """In the files of the tree; some turn a typed key into plain words, the same bits."""
    rng = np.random.default_rng(0)
    files = sorted(p for p in (run / "3" / "state").rglob("*") if p.is_file())
    sizes = np.array([p.stat().st_size for p in files], float)
    for _ in range(25):
        path = files[rng.choice(len(files), p=sizes / sizes.sum())]
        original = path.read_bytes()
        flip(path, int(rng.integers(len(original))))
        said = []
        step, state, _ = Checkpoints(run, warn=said.append).restore(make_state(0))
        assert_same(state, make_state(step))
        assert (step, len(said)) in [(3, 0), (2, 1)]
        path.write_bytes(original)


def test_a_flipped_byte_that_orbax_restores_silently_is_caught(tmp_path):
    tree = {"w": jax.random.normal(jax.random.key(0), (256, 64))}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, tree)
    path = largest(tmp_path / "2" / "state")
    original = path.read_bytes()
    said = []
    for offset in np.linspace(0.1, 0.9, 8) * len(original):
        flip(path, int(offset))
        restored = Checkpoints(tmp_path, warn=said.append).restore(tree)
        assert restored.step == 1
        assert_same(restored.state, tree)
        path.write_bytes(original)
    assert len(said) == 8 and "leaf w differs from what was saved" in said[3]


def test_no_whole_step_is_one_clear_error(run):
    for step in (1, 2, 3):
        shutil.rmtree(run / str(step) / "state")
    with pytest.raises(UserError, match="no whole checkpoint.*/3 is damaged.*/1 is damaged"):
        Checkpoints(run, warn=lambda _: None).restore(make_state(0))


# ------------------------------------------------------------------------------- checksums

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "bool", "float8_e4m3fn"]


def numpy_checksum(array):
    """The formula of leaf_checksum in exact Python integers."""
    width = array.dtype.itemsize
    total = 0
    for index, word in enumerate(np.ascontiguousarray(array).view(f"u{width}").ravel()):
        h = (int(word) + index * 0x9E3779B1) % 2**32
        h = (h ^ (h >> 16)) * 0x7FEB352D % 2**32
        h = (h ^ (h >> 15)) * 0x846CA68B % 2**32
        total += h ^ (h >> 16)
    return total % 2**32


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(), (1,), (7,), (3, 5), (2, 3, 4)]),
    seed=st.integers(0, 2**31 - 1),
)
def test_checksum_matches_exact_integers_and_sees_every_bit(dtype, shape, seed):
    rng = np.random.default_rng(seed)
    array = np.asarray(jnp.asarray(rng.normal(size=shape) * 50).astype(dtype))
    checksum = int(leaf_checksum(array))
    assert checksum == numpy_checksum(array)
    if dtype == "bool":
        return
    width = 8 * array.dtype.itemsize
    flipped = array.copy()
    raw = flipped.reshape(-1).view(f"u{width // 8}")
    raw[rng.integers(raw.size)] ^= raw.dtype.type(1 << int(rng.integers(width)))
    assert int(leaf_checksum(flipped.reshape(shape))) != checksum


def test_checksums_tell_leaves_by_path_and_know_keys():
    sums = checksums({"a": jax.random.key(1), "b": [jax.random.key(2), jnp.zeros(2)]})
    assert sums.keys() == {"a", "b/0", "b/1"}
    assert len(set(sums.values())) == 3


# --------------------------------------------------------------------------- the disk fails


def test_a_full_disk_while_writing_is_told_and_the_last_step_stands(run):
    """A file-size limit makes the writing threads fail as a full disk does."""
    checkpoints = Checkpoints(run)
    state = make_state(0)
    big = {"x": jax.random.normal(jax.random.key(0), (512, 512))}
    told = rf"checkpoint to {run}: File too large"
    with small_disk(2**16), pytest.raises(UserError, match=told):
        checkpoints.save(4, big)
        checkpoints.close()
    with Checkpoints(run, warn=pytest.fail) as checkpoints:
        assert_same(checkpoints.restore(state).state, make_state(3))
        assert checkpoints.save(4, make_state(4))
    assert_same(Checkpoints(run).restore(state).state, make_state(4))
    assert {p.name for p in run.iterdir()} == {"1", "2", "3", "4"}


def test_no_space_at_once_is_told(run, monkeypatch):
    checkpoints = Checkpoints(run)
    checkpoints.save(4, make_state(4))
    checkpoints.wait()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(UserError, match=rf"{run}: No space left on device"):
        checkpoints.save(5, make_state(5))
    checkpoints.close()


def test_an_error_on_its_way_out_is_not_replaced(run, monkeypatch):
    said = []
    with pytest.raises(KeyError), Checkpoints(run, warn=said.append) as checkpoints:
        monkeypatch.setattr(checkpoints, "close", lambda: 1 / 0)
        raise KeyError("the first error")
    assert said == ["division by zero"]


# -------------------------------------------------------------------------- other processes


def python(script, *args, **env):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_kill_9_during_saves_leaves_a_whole_step(tmp_path):
    """One process saves on and on; it is killed at an arbitrary moment of a write."""
    script = """
        import sys, jax, jax.numpy as jnp
        from opsd_jax.host.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1], max_to_keep=2)
        step = int(sys.argv[2])
        make = jax.jit(lambda n: {f"x{i}": jnp.full((512, 256), n + i) for i in range(8)})
        while True:
            step += 1
            checkpoints.save(step, make(step), meta={"step": step})
            print(step, flush=True)
    """
    abstract = {f"x{i}": jax.ShapeDtypeStruct((512, 256), jnp.int32) for i in range(8)}
    last = 0
    for delay in (0.0, 0.013, 0.031):
        child = python(script, tmp_path, last)
        for line in child.stdout:  # save() of step n returned: n - 1 is committed
            if int(line) >= last + 3:
                break
        time.sleep(delay)
        child.kill()
        child.communicate()
        step, state, meta = Checkpoints(tmp_path, warn=pytest.fail).restore(abstract)
        assert step >= last + 2 and meta == {"step": step}
        for i in range(8):
            np.testing.assert_array_equal(state[f"x{i}"], step + i)
        last = step
    (tmp_path / f"{last + 9}.orbax-checkpoint-tmp").mkdir(exist_ok=True)  # as a kill leaves it
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        checkpoints.save(last + 1, {"x": jnp.zeros(1)})
    assert sorted(p.name for p in tmp_path.iterdir()) == [str(last), str(last + 1)]


MESH = """
    import json, sys, jax, jax.numpy as jnp, numpy as np, grain
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    folder, address, count, index, data, model = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
    if count > 1:
        jax.distributed.initialize(address, count, index)
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from opsd_jax.host.checkpoint import Checkpoints
    mesh = jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    values = {
        "w": np.arange(64, dtype=np.float32).reshape(8, 8),
        "b": np.linspace(0, 1, 8).astype(jnp.bfloat16),
    }
    specs = {"w": P("data", "model"), "b": P()}
    def place(name):
        sharding = NamedSharding(mesh, specs[name])
        return jax.make_array_from_callback(
            values[name].shape, sharding, lambda i: values[name][i])
    state = {name: place(name) for name in values}
    replicated = NamedSharding(mesh, P())
    state["key"] = jax.jit(lambda: jax.random.key(5), out_shardings=replicated)()
    position = iter(grain.MapDataset.source(range(9)).to_iter_dataset())
"""


@pytest.mark.slow
def test_two_processes_save_and_another_mesh_restores(tmp_path, free_port):
    save = """
        for _ in range(index + 1):
            next(position)
        with Checkpoints(folder) as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, state, position)
            checkpoints.wait()
            if index == 0:
                (checkpoints._directory / "2" / "data" / "process_1-of-2.json").unlink()
            jax.experimental.multihost_utils.sync_global_devices("removed")
            said = []
            checkpoints._warn = said.append
            fresh = iter(grain.MapDataset.source(range(9)).to_iter_dataset())
            step, again, _ = checkpoints.restore(state, fresh)
            assert step == 1 and next(fresh) == index + 1, step
            assert len(said) == (index == 0), said
            for shard in again["w"].addressable_shards:
                np.testing.assert_array_equal(shard.data, values["w"][shard.index])
            checkpoints.save(2, state, position)
    """
    load = """
        checkpoints = Checkpoints(folder, warn=sys.exit)
        step, again, _ = checkpoints.restore(state)
        assert step == 2
        for name in values:
            assert again[name].sharding == state[name].sharding
            np.testing.assert_array_equal(np.asarray(again[name]), values[name])
        assert again["key"] == state["key"]
        try:
            checkpoints.restore(state, position)
        except Exception as error:
            assert "2 processes" in str(error), error
        else:
            sys.exit("restored the positions of two processes into one")
    """
    script = textwrap.dedent(MESH)
    address = f"127.0.0.1:{free_port}"
    four = "--xla_force_host_platform_device_count=4"
    pair = [
        python(script + textwrap.dedent(save), tmp_path, address, 2, i, 2, 4, XLA_FLAGS=four)
        for i in (0, 1)
    ]
    for child in pair:
        _, errors = child.communicate(timeout=180)
        assert child.returncode == 0, errors[-2000:]
    assert (tmp_path / "2.bad").is_dir()
    eight = "--xla_force_host_platform_device_count=8"
    child = python(script + textwrap.dedent(load), tmp_path, address, 1, 0, 4, 2, XLA_FLAGS=eight)
    _, errors = child.communicate(timeout=180)
    assert child.returncode == 0, errors[-2000:]


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_the_record_is_plain_json(run):
    sealed = json.loads((run / "3" / "meta" / "metadata").read_text())
    assert sealed["record"]["leaves"]["params/embed"]["kind"] == "float32[8, 16]"
    assert sealed["record"]["meta"] == {"note": "at 3"}
