# SPDX-License-Identifier: Apache-2.0
"""The fused implementation against the dense one, on one device and on a mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_jax import divergence
from opsd_jax.divergence import targets
from opsd_jax.divergence.losses import DivergenceConfig, token_divergence
from opsd_jax.divergence.token_weights import gap_sigmoid
from opsd_jax.model.head import Head
from tests.representatives import representatives

QUICK = {"xla_backend_optimization_level": 0}  # halves compile times, which are all there is
CASES = [
    dict(name="forward_kl", clip="entry", clip_threshold=0.05),
    dict(name="jensen_shannon", beta=0.3, temperature=1.3),
    dict(name="mixed_kl", beta=0.3, support="teacher_top_k"),
    dict(name="reverse_kl", clip="rescale", support="union_top_k", completion="tail"),
    dict(name="forward_kl", clip="token", support="teacher_top_k", temperature=0.7),
    dict(name="forward_kl", support="student_top_k", completion="truncate"),
    dict(name="sampled_token", temperature=1.1),
]


def words(fields):
    return "-".join(map(str, fields.values()))


def operands(B=4, C=3, D=5, E=7, V=13, seed=0, dtype=np.float32):
    """Student width D, teacher width E, different heads, ragged mask with one empty row."""
    rng = np.random.default_rng(seed)  # jax.random would compile anew for every shape

    def normal(dtype, *shape):
        return rng.normal(size=shape).astype(dtype)

    hidden, kernel = normal(dtype, B, C, D), normal(np.float32, V, D)
    teacher, teacher_kernel = normal(dtype, B, C, E), normal(np.float32, V, E)
    ids = rng.integers(0, V, (B, C)).astype(np.int32)
    mask = rng.random((B, C)) < 0.7
    mask[0] = False
    return hidden, kernel, teacher, teacher_kernel, ids, mask


def traced(config, inputs, cotangent, softcaps=(None, None), mesh=None, wrt=(0, 1)):
    """(hidden, kernel) -> fields and gradients of sum(cotangent * objective)."""
    _, _, teacher, teacher_kernel, ids, mask = inputs

    def loss(hidden, kernel):
        tokens = token_divergence(
            config,
            hidden,
            Head(kernel, softcaps[0]),
            teacher,
            Head(teacher_kernel, softcaps[1]),
            ids,
            mask,
            sampled_logps=-ids / 10.0,
            mesh=mesh,
        )
        return jnp.sum(tokens.objective * cotangent), tokens

    return jax.value_and_grad(loss, wrt, has_aux=True)


def run(config, inputs, *args, **kwargs):
    step = jax.jit(traced(config, inputs, *args, **kwargs), compiler_options=QUICK)
    (_, tokens), gradients = step(*inputs[:2])
    return tokens, gradients


def both(fields, inputs, cotangent, **kwargs):
    dense = DivergenceConfig(**fields)
    fused = DivergenceConfig(**fields, implementation="fused", token_block=10, vocab_block=4)
    return run(dense, inputs, cotangent, **kwargs), run(fused, inputs, cotangent, **kwargs)


def assert_close(got, want, tolerance=1e-6):
    """Largest error relative to the largest value of each array."""

    def check(got, want):
        assert got.dtype == want.dtype and got.shape == want.shape
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert np.abs(got - want).max() <= tolerance * max(1.0, np.abs(want).max())

    jax.tree.map(check, got, want)


@pytest.mark.parametrize(
    "fields", representatives(CASES, *CASES[:3]), ids=lambda f: "-".join(map(str, f.values()))
)
def test_fused_is_dense(fields):
    inputs = operands()
    mask = inputs[-1]
    want, got = both(fields | dict(top_k=4), inputs, mask / mask.sum(), softcaps=(6.0, None))
    assert_close(got, want)


@settings(max_examples=7, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(2, 12),
    st.sampled_from(CASES),
    st.booleans(),
    st.integers(0, 999),
)
def test_any_shape(B, C, V, fields, whole_support, seed):
    """T = 1, rows and vocabulary that blocks do not divide, k up to V, no token at all."""
    top_k = V if whole_support else 1 + seed % V
    inputs = operands(B, C, 3, 4, V, seed)
    want, got = both(fields | dict(top_k=top_k), inputs, inputs[-1] * 0.5)
    assert_close(got, want)


@pytest.mark.parametrize("weights", [(), (gap_sigmoid,)])
def test_cotangents_that_differ_from_token_to_token(weights):
    """The head gradient cannot be a scaled sum then, and must be recomputed."""
    inputs = operands()
    cotangent = jax.random.normal(jax.random.key(9), inputs[-1].shape)
    want, got = both(dict(clip="entry", weights=weights), inputs, cotangent)
    assert_close(got, want)


def test_several_teachers():
    hidden, kernel, teacher, teacher_kernel, ids, mask = operands()
    outs = []
    for implementation in ("dense", "fused"):
        config = DivergenceConfig(target=targets.contrast, implementation=implementation)
        outs.append(
            token_divergence(
                config,
                hidden,
                Head(kernel),
                (teacher, hidden + 1),
                (Head(teacher_kernel), Head(kernel)),
                ids,
                mask,
            )
        )
    assert_close(outs[1], outs[0])


def test_bfloat16_inputs_keep_float32_inside():
    """Same logits in, so values agree closely; gradients are rounded to bfloat16 on the way."""
    inputs = operands(dtype=jnp.bfloat16)
    mask = inputs[-1]
    (want, want_grads), (got, got_grads) = both({}, inputs, mask / mask.sum())
    assert got.objective.dtype == jnp.float32
    assert got_grads[0].dtype == jnp.bfloat16 and got_grads[1].dtype == jnp.float32
    assert_close(got, want)
    assert_close(got_grads, want_grads, 1e-2)


def test_a_frozen_head_costs_no_head_gradient():
    """Three products with the head instead of four, and no array of its size is made."""
    inputs = operands(B=2, C=4, V=97)
    config = DivergenceConfig(implementation="fused", token_block=4, vocab_block=97)

    def lower(wrt):
        return jax.jit(traced(config, inputs, 1.0, wrt=wrt)).lower(*inputs[:2])

    texts = {wrt: lower(wrt).as_text() for wrt in [(0,), (1,), (0, 1)]}
    products = {wrt: text.count("dot_general") for wrt, text in texts.items()}
    # With the head: the recomputation for unequal cotangents adds its own three.
    assert products == {(0,): 3, (1,): 3 + 3, (0, 1): 4 + 3}
    sums = [line for line in texts[(0,)].splitlines() if "stablehlo.add" in line]
    assert sums and not any("tensor<97x5xf32>" in line for line in sums)


def test_no_array_of_all_logits():
    """Temporaries do not grow with the number of tokens."""
    V, D = 4096, 8
    config = DivergenceConfig(clip="entry", implementation="fused", token_block=16)

    def temporaries(C):
        inputs = operands(2, C, D, D, V)
        lowered = jax.jit(traced(config, inputs, 1.0)).lower(*inputs[:2])
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(256) < temporaries(32) + 2**20 < 8 * 16 * V * 4 + V * D * 4 + 2**20


def test_a_block_of_logits_has_one_other_array_of_its_size():
    """The student's logits, which become their gradient, and the teacher's; else a few rows."""
    block, V = 64, 2**15
    config = DivergenceConfig(name="jensen_shannon", implementation="fused", token_block=block)
    inputs = operands(2, 64, 2, 2, V)
    compiled = jax.jit(traced(config, inputs, 1.0)).lower(*inputs[:2]).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * block * V * 4


def test_under_scan_and_remat():
    """Micro-batches add up to the gradient of the whole."""
    inputs = operands()
    hidden, kernel, teacher, teacher_kernel, ids, mask = inputs
    config = DivergenceConfig(implementation="fused", token_block=4)

    @jax.checkpoint
    def loss(kernel, rows):
        hidden, teacher, ids, mask = rows
        return token_divergence(
            config, hidden, Head(kernel), teacher, Head(teacher_kernel), ids, mask
        ).objective.sum()

    def add(total, rows):
        return total + jax.grad(loss)(kernel, rows), None

    split = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (hidden, teacher, ids, mask))
    total, _ = jax.jit(lambda: jax.lax.scan(add, jnp.zeros_like(kernel), split))()
    want = run(DivergenceConfig(), inputs, jnp.ones(mask.shape))[1][1]
    assert_close(total, want)


@functools.cache
def mesh_of(data, model):
    return jax.make_mesh((data, model), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize(
    "fields", representatives(CASES[:3], CASES[1]), ids=lambda f: "-".join(map(str, f.values()))
)
def test_split_over_a_mesh_is_one_device(fields):
    """V = 13 over 4 devices: padded; the second case has unequal cotangents too."""
    inputs = operands()
    fields = fields | dict(top_k=4, implementation="fused", token_block=4, vocab_block=3)
    cotangent = inputs[-1] * (jnp.arange(4)[:, None] if "beta" in fields else 1.0)
    want = run(DivergenceConfig(**fields), inputs, cotangent, softcaps=(6.0, None))
    mesh = mesh_of(2, 4)
    with jax.set_mesh(mesh):
        got = run(DivergenceConfig(**fields), inputs, cotangent, softcaps=(6.0, None))
    assert_close(got, want)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_target_leaves_no_nan_in_the_padding_of_a_split_vocabulary(alpha):
    """At the ends the barycentre is one of its teachers, whom the dense loss reads alone."""
    hidden, kernel, teacher, teacher_kernel, ids, mask = operands()
    heads = (Head(teacher_kernel), Head(kernel))
    target = functools.partial(targets.barycentre, alpha=alpha)
    fused = DivergenceConfig(target=target, implementation="fused")
    both_teachers = (teacher, hidden + 1)
    got = token_divergence(
        fused, hidden, Head(kernel), both_teachers, heads, ids, mask, mesh=mesh_of(2, 4)
    )
    alone = int(alpha)
    want = token_divergence(
        DivergenceConfig(), hidden, Head(kernel), both_teachers[alone], heads[alone], ids, mask
    )
    assert_close(got, want)


def test_mesh_argument_and_rows_that_do_not_divide():
    inputs = operands(B=3, V=16)
    config = DivergenceConfig(implementation="fused")
    want = run(config, inputs, 1.0)
    for mesh in (mesh_of(2, 4), mesh_of(8, 1), mesh_of(1, 8)):
        assert_close(run(config, inputs, 1.0, mesh=mesh), want)


def test_logits_are_never_gathered():
    """Collectives move per-token numbers, hidden gradients and nothing of the vocabulary."""
    B, C, D, V = 4, 5, 6, 256
    hidden, kernel, teacher, teacher_kernel, ids, mask = operands(B, C, D, D, V)
    mesh = mesh_of(1, 8)
    rows, split = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axis))
        for axis in (None, "model")
    )

    def loss(hidden, kernel, teacher_kernel):
        return divergence.fused(
            hidden, Head(kernel), teacher, Head(teacher_kernel), ids, mask, mesh=mesh
        ).objective.sum()

    step = jax.jit(
        jax.grad(loss, (0, 1)), in_shardings=(rows, split, split), out_shardings=(rows, split)
    )
    text = step.lower(hidden, kernel, teacher_kernel).compile().as_text()
    moved = [
        line.split(" = ")[1]
        for line in text.splitlines()
        if any(f" {op}(" in line for op in ("all-gather", "all-reduce", "all-to-all"))
    ]
    assert moved and not any("all-gather" in line for line in moved)
    shapes = [re.findall(r"\[([\d,]*)\]", line.split("all-reduce(")[0]) for line in moved]
    sizes = [int(n) for row in shapes for shape in row for n in shape.split(",") if n]
    assert max(sizes) < V // 8


@pytest.mark.parametrize("platform, rows", [("cpu", 128), ("gpu", 1024), ("tpu", 1024)])
def test_a_block_is_that_of_the_device_it_is_compiled_for(platform, rows):
    """As `opsd plan` compiles it, on a machine that has a CPU alone."""
    inputs = operands(2, 1024, V=8)
    device = jax.sharding.AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        config = DivergenceConfig(implementation="fused")
        text = str(jax.make_jaxpr(traced(config, inputs, 1.0))(*inputs[:2]))
    found = {int(n) for n in re.findall(r"f32\[(\d+),8\]", text)} - {8}
    assert max(found) == rows and (2 in found) == (platform == "cpu")
