# SPDX-License-Identifier: Apache-2.0
"""`opsd plan` from a gin file to a table; where no plugin is needed, devices are virtual CPUs."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from opsd_jax.errors import UserError
from opsd_jax.host.chips import Peak
from opsd_jax.main import main
from opsd_jax.model.config import REMATS
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.sharding import num_bytes
from opsd_jax.plan import command, step
from opsd_jax.plan.command import Plan, choice, make_plan, plan_command, report, variants
from opsd_jax.plan.estimate import Seconds, executed_flops, offload_seconds, step_seconds
from opsd_jax.plan.step import Widths, parts_of, shape_of
from opsd_jax.plan.targets import Target
from opsd_jax.run.config import load_experiment
from opsd_jax.run.flops import forward_flops, step_flops
from tests.plan.test_targets import INSTALLED

RECIPE = str(Path(__file__).parents[2] / "experiments/paper/qwen3_1p7b.gin")
SHAPE = dict(
    architectures=["Qwen3ForCausalLM"],
    model_type="qwen3",
    head_dim=64,
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_hidden_layers=2,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=True,
    vocab_size=512,
)
SMALL = (
    "rollout.max_new_tokens = 17",
    "train.batch_size = 8",
    "train.num_micro_batches = 2",
    "train.dtype = 'float32'",
)
WIDTHS = Widths(8, 16)


@pytest.fixture
def config_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return str(tmp_path / "config.json")


def experiment_of(*bindings):
    return load_experiment([RECIPE], [*SMALL, *bindings])[0]


def here(number=4) -> Target:
    return Target(f"h100:{number}", jax.devices()[:number], 2**30, 1)


def test_the_frozen_base_has_the_dtype_it_is_loaded_as(config_json):
    """Weights of a LoRA run are bfloat16 as the gin file says, adapters and moments float32."""
    config = shape_of(experiment_of(), config_json)
    state = parts_of(experiment_of("mesh.model = 2"), config, jax.devices()[:4]).abstract
    assert {leaf.dtype for leaf in jax.tree.leaves(state.frozen)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    full = parts_of(experiment_of("train.lora = None"), config, jax.devices()[:4]).abstract
    assert {leaf.dtype for leaf in jax.tree.leaves(full.trainable)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_a_plan_counts_memory_work_and_exchange(config_json, monkeypatch):
    """On virtual CPUs: arguments to the byte, exchanges along both axes, a floor with any peak."""
    experiment = experiment_of("mesh.model = 2")
    monkeypatch.setattr(command, "peak_of", lambda device: Peak(1e12, 1e11))
    plan = make_plan(experiment, shape_of(experiment, config_json), here(), WIDTHS)
    state = jax.tree.leaves(plan.parts.abstract)

    def on_one_chip(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return 8
        local = leaf.sharding.shard_shape(leaf.shape)
        return int(jnp.prod(jnp.array(local, int))) * leaf.dtype.itemsize

    batch = (8 // 2) * (8 + 16 + 2) * 4
    assert plan.arguments == pytest.approx(sum(map(on_one_chip, state)) + batch, abs=64)
    assert plan.temporaries > 0 and plan.fits(here()) and plan.kernels is None
    axes = {axis for each in plan.found for axis in each.axes}
    assert axes == {"data", "model"} and {each.scope for each in plan.found} >= {
        "rollout",
        "update",
    }
    assert plan.seconds.rollout > 0 and plan.seconds.update > 0
    lines = "\n".join(report(plan, here(), WIDTHS))
    assert "fits" in lines and "chip-hours" in lines and "along model" in lines


def test_recomputation_is_named(config_json):
    experiment = experiment_of()
    config = shape_of(experiment, config_json)
    lengths = command.padded_lengths(experiment, WIDTHS)
    recomputed = []
    for remat in (False, "keep_projections", True):
        train = dataclasses.replace(experiment.train, remat=remat)
        changed = dataclasses.replace(experiment, train=train)
        parts = parts_of(changed, config, jax.devices()[:4])
        done, needed = executed_flops(parts, lengths), step_flops(parts.method, lengths)
        assert done[0] == needed[0]
        recomputed.append(done[1] - needed[1])
    assert 0 == recomputed[0] < recomputed[1] < recomputed[2]
    # Attention by hand: n (n + 1) / 2 pairs of a row, 4 N H each, in every layer.
    n = WIDTHS.student + 17
    assert recomputed[1] == 8 * n * (n + 1) / 2 * 4 * 4 * 64 * 2


def test_a_search_tries_what_divides(config_json):
    experiment = experiment_of()
    config = shape_of(experiment, config_json)
    tried = list(variants(experiment, config, here()))
    found = {(each.mesh.model, each.train.num_micro_batches, each.mesh.sequence) for each in tried}
    # Two key heads allow mesh.model 1 and 2; 8 rows on 4 chips allow 1 and 2 micro-batches, and
    # more where the chips share a text.
    assert found == {
        *((1, 1, 1), (1, 2, 1), (1, 4, 2), (1, 8, 4)),
        *((2, 1, 1), (2, 2, 1), (2, 4, 1), (2, 8, 2)),
    }
    assert len(tried) == 8 * 4
    assert {each.train.remat for each in tried} == {True, *REMATS, False}
    for each in tried:
        if each.train.remat is True:
            mesh = parts_of(each, config, jax.devices()[:4]).mesh  # refused by nothing
            assert dict(mesh.shape).get("sequence", 1) == each.mesh.sequence
    three = dataclasses.replace(experiment.mesh, sequence=4)  # as it is, at least
    tried = variants(dataclasses.replace(experiment, mesh=three), config, here())
    assert {(each.mesh.model, each.mesh.sequence) for each in tried} == {(1, 4)}
    # On two hosts also two replicas, and with two devices to a matrix each has one place for rows.
    cards = [SimpleNamespace(platform="cuda")] * 4
    meshes = [each.mesh for each in variants(experiment, config, Target("", cards, 2**30, 2))]
    assert {(m.replica, m.data, m.sequence, m.model) for m in meshes} == {
        *((1, 4, 1, 1), (1, 2, 2, 1), (1, 1, 4, 1), (1, 2, 1, 2), (1, 1, 2, 2)),
        *((2, 2, 1, 1), (2, 1, 2, 1), (2, 1, 1, 2)),
    }


def test_the_views_of_a_teacher_are_counted(config_json):
    """Each is read as the teacher's own context is."""
    experiment = experiment_of()
    more = experiment_of(
        "contexts.views = ('problem_boxed', 'question')", "divergence.target = @target_mean"
    )
    config = shape_of(experiment, config_json)
    lengths = [command.padded_lengths(each, WIDTHS) for each in (experiment, more)]
    assert [len(each.views) for each in lengths] == [0, 2]
    parts = [parts_of(each, config, jax.devices()[:4]) for each in (experiment, more)]
    (_, one), (_, three) = map(executed_flops, parts, lengths)
    assert three - one == pytest.approx(2 * forward_flops(config, *lengths[0][1:3], adapters=False))


@pytest.mark.parametrize("devices, times", [(1, 4), (4, 1)])
def test_the_floor_has_a_groups_prompt_once_where_a_device_has_the_group(
    config_json, devices, times
):
    """8 rows in groups of 4: a device of four holds two rows, whose prompts it reads."""
    whole, groups = experiment_of(), experiment_of("train.group_size = 4")
    config = shape_of(whole, config_json)
    lengths = command.padded_lengths(whole, WIDTHS)
    found = []
    for each in (whole, groups):
        parts = parts_of(each, config, jax.devices()[:devices])
        parts = parts._replace(model=Decoder(dataclasses.replace(config, remat=REMATS[-1])))
        seconds = step_seconds(parts, lengths, Peak(1e9, 1e30), [], lambda one: 1.0, None, None)
        found.append((seconds.rollout * devices * 1e9, offload_seconds(parts, lengths, 1.0)))
    prefill = forward_flops(parts.method.model.config, lengths.student, 0 * lengths.student)
    saved = prefill * (1 - 1 / times)
    assert found[0][0] - found[1][0] == pytest.approx(saved, abs=1e-6 * prefill)
    prompts, answers = (float(x.sum()) for x in (lengths.student, lengths.completion))
    ratio = (prompts / times + answers) / (prompts + answers)
    assert found[1][1] == pytest.approx(ratio * found[0][1])


def test_what_is_offloaded_takes_its_time(config_json):
    """Of 8 rows of 25 tokens on four devices: q, k, v, o, gate and up, there and back."""
    experiment = experiment_of()
    parts = parts_of(experiment, shape_of(experiment, config_json), jax.devices()[:4])
    lengths = command.padded_lengths(experiment, WIDTHS)
    assert offload_seconds(parts, lengths, 1e9) == 0
    moved = dataclasses.replace(parts.model.config, remat="offload_projections")
    parts = parts._replace(model=Decoder(moved))
    width = 256 + 2 * 128 + 128 + 2 * 256
    assert offload_seconds(parts, lengths, 1e9) == 2 * (2 * 25 * 2 * width * 4) / 1e9
    assert offload_seconds(parts, lengths, None) == 0


def test_what_costs_an_unknown_time_is_not_chosen_before_its_equal(config_json):
    experiment = experiment_of()
    parts = parts_of(experiment, shape_of(experiment, config_json), jax.devices()[:4])
    plans = []
    for remat, size in (("offload_projections", 2**20), ("keep_projections", 2**21)):
        train = dataclasses.replace(experiment.train, remat=remat)
        changed = dataclasses.replace(experiment, train=train)
        plans.append(Plan(changed, parts, arguments=size, seconds=Seconds(1.0, 1.0)))
    assert "train.remat = 'keep_projections'" in choice(plans, here())


@pytest.mark.parametrize(
    "words, told",
    [
        ("Used 20.13G of 15.75G hbm. Exceeded hbm capacity by 4.4G.", "20.13G of 15.75G"),
        ("temporaries (26.47G) exceeds available HBM (15.75G).", "26.47G of 15.75G"),
        ("out of memory", "RESOURCE_EXHAUSTED: out of memory"),
    ],
)
def test_what_a_compiler_refuses_is_told_in_its_numbers(words, told, config_json, monkeypatch):
    def compile():
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {words}\nand much more")

    lowered = SimpleNamespace(compile=compile)
    monkeypatch.setattr(step, "on_mesh", lambda *_: lambda *_: lowered)
    experiment = experiment_of()
    plan = make_plan(experiment, shape_of(experiment, config_json), here(), WIDTHS)
    assert plan.refused == told


def test_nothing_fits_is_said(config_json):
    experiment = experiment_of()
    parts = parts_of(experiment, shape_of(experiment, config_json), jax.devices()[:4])
    refused = Plan(experiment, parts, refused="20.1G of 15.7G")
    assert "None of them fits" in choice([refused], here())
    assert "does not fit: 20.1G of 15.7G" in "\n".join(report(refused, here(), WIDTHS))
    full = Plan(experiment, parts, arguments=2**30)
    assert not full.fits(here()) and "does NOT fit" in "\n".join(report(full, here(), WIDTHS))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--target=v5x:2"], "--target must be one of"),
        (["--target=h100:1", "--student_tokens=0"], "--student_tokens"),
        (["--target=h100:1", "--model_config=./nowhere.json"], "nowhere.json"),
        (["--target=h100:1", f"--model_config={RECIPE}"], "no config.json; give --model_config"),
    ],
)
def test_wrong_flags_are_told_in_a_sentence(flags, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.chdir(tmp_path)
    if not message.startswith("--target"):
        monkeypatch.setattr(command, "find_target", lambda text: here())
    assert main(["plan", f"--gin_file={RECIPE}", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_the_axes_that_leave_a_host_are_the_outer_ones(config_json):
    """Two hosts of two cards: what lies along each axis is neighbours first."""

    def crossing_of(*bindings):
        experiment = experiment_of(*bindings)
        config = shape_of(experiment, config_json)
        parts = parts_of(experiment, config, jax.devices()[:4])
        card = SimpleNamespace(platform="cuda")
        return command.crossing(Plan(experiment, parts), Target("h100:2x2", [card] * 4, 2**30, 2))

    assert crossing_of() == {"data"}
    assert crossing_of("mesh.model = 2") == {"data"}
    assert crossing_of("mesh.replica = 2") == {"replica"}
    assert crossing_of("mesh.replica = 2", "mesh.model = 2") == {"replica"}


@pytest.mark.slow
@pytest.mark.parametrize("devices, form", [(4, "train.lora = None"), (8, "mesh.model = 2")])
def test_replicas_exchange_gradients_and_numbers_alone(devices, form, config_json):
    """In the compiled step, weights are gathered and activations moved within a replica."""
    experiment = experiment_of("mesh.replica = 2", form)
    plan = make_plan(experiment, shape_of(experiment, config_json), here(devices), WIDTHS)
    crossing = [each for each in plan.found if "replica" in each.axes]
    # A number a row, for medians; whether every row is done; the sums that metrics are made of.
    arrays = [each for each in crossing if each.num_bytes > 8 * experiment.train.batch_size]
    assert {(each.kind, each.scope) for each in arrays} == {("all-reduce", "update")}
    trained = num_bytes(plan.parts.abstract.trainable) / plan.parts.mesh.shape["model"]
    summed = sum(each.num_bytes * each.times for each in arrays)
    # Once a micro-batch; a matrix whose parts were summed within a replica, by parts.
    most = experiment.train.num_micro_batches * trained
    assert most / plan.parts.mesh.shape["data"] <= summed <= 1.01 * most
    gathered = sum(e.num_bytes for e in plan.found if (e.kind, e.axes) == ("all-gather", ("data",)))
    assert gathered > num_bytes(plan.parts.abstract.student) / plan.parts.mesh.shape["model"]


def test_devices_that_do_not_fill_the_mesh_are_refused(config_json):
    config = shape_of(experiment_of(), config_json)
    with pytest.raises(UserError, match="must equal the number of devices, 4"):
        parts_of(experiment_of("mesh.data = 3"), config, jax.devices()[:4])


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["model", "sequence"])
@pytest.mark.parametrize(
    "target, extra",
    [
        pytest.param(
            "v5e:2x2",
            ("rollout.attention = 'pallas'",),
            marks=pytest.mark.skipif(not INSTALLED["tpu"], reason="no plan-tpu extra"),
        ),
        pytest.param(
            "h100:4",
            (),
            marks=pytest.mark.skipif(not INSTALLED["cuda"], reason="no plan-cuda extra"),
        ),
    ],
)
def test_the_compilers_of_chips_take_the_step(target, extra, axis, config_json, capsys):
    """The whole step with every kernel, for chips that are not here."""
    bindings = [*SMALL, "train.dtype = 'bfloat16'", f"mesh.{axis} = 2", *extra]
    plan_command([RECIPE], bindings, target, config_json, 128, 256)
    out = capsys.readouterr().out
    assert "fits" in out and f"along {axis}" in out and "floor" in out
    assert ("kernels" in out) == target.startswith("h100")
