# SPDX-License-Identifier: Apache-2.0
"""Compiled programs are read right: against programs whose loops and exchanges are known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from opsd_jax.plan.program import Program, num_bytes, scope_of, spanned_axes

SHAPE = {"data": 2, "model": 4}


def mesh() -> Mesh:
    grid = np.array(jax.devices()[:8]).reshape(tuple(SHAPE.values()))
    return Mesh(grid, tuple(SHAPE), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("axes", [("data",), ("model",), ("data", "model")])
def test_a_sum_over_an_axis_is_found_with_its_bytes(axes):
    """Five sums of 16 floats over the named axes, in a loop."""

    everywhere = PartitionSpec()

    @partial(jax.shard_map, mesh=mesh(), in_specs=everywhere, out_specs=everywhere, check_vma=False)
    def function(x):
        # A sum over places that hold one value each is of varying values, or it would be folded.
        mine = jax.lax.axis_index(("data", "model")).astype(jnp.float32)

        def body(_, x):
            return jnp.sin(jax.lax.psum(jnp.tanh(x + mine), axes) * mine)

        return jax.lax.fori_loop(0, 5, body, x)

    text = jax.jit(function).lower(jax.ShapeDtypeStruct((16,), jnp.float32)).compile().as_text()
    found = Program.parse(text).collectives(partial(spanned_axes, shape=SHAPE))
    assert [(each.kind, each.axes) for each in found] == [("all-reduce", axes)]
    assert [each.num_bytes * each.times for each in found] == [5 * 16 * 4]


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("model",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("replica_groups=[2,4]<=[8]", ("model",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=[1,8]<=[8]", ("data", "model")),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("model",)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ("data",)),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", ("model",)),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", ("data",)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,4,1,5,2,6,3,7) {'a'}", ("model",)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ("model",)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ("data",)),
        ("replica_groups={}", ("data", "model")),
        ("source_target_pairs={{0,4},{4,0}}", ("data",)),
        ("source_target_pairs={{0,0},{1,2},{2,1}}", ("model",)),
    ],
)
def test_groups_of_devices_are_axes_of_the_mesh(groups, axes):
    assert spanned_axes(f"%x = f32[2] all-reduce(%y), channel_id=1, {groups}, a=b", SHAPE) == axes


def test_what_a_kernel_says_of_itself_ends_no_computation():
    """A TPU's splash attention has an attribute of several lines, one of which begins with }."""
    text = """HloModule m

ENTRY %main (x: f32[16]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  %kernel = f32[16]{0} custom-call(%x), frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(step)/update/pallas_call"}
  ROOT %sum = f32[16]{0} all-reduce(%kernel), replica_groups={{0,1}}, to_apply=%add
}
"""
    found = Program.parse(text).collectives(partial(spanned_axes, shape={"data": 2}))
    assert [(each.kind, each.num_bytes) for each in found] == [("all-reduce", 64)]


def test_bytes_of_results():
    assert num_bytes("f32[3,4]{1,0}") == 48
    assert num_bytes("(bf16[2,8]{1,0}, bf16[4,8]{1,0:T(8,128)})") == 96
    assert num_bytes("(bf16[2,8]{1,0}, bf16[4,8]{1,0})", last=True) == 64
    assert num_bytes("pred[]") == 1 and num_bytes("s4[7,2]") == 7 and num_bytes("token[]") == 0
    assert num_bytes("f8e4m3fn[16]") == 16


TEXT = """HloModule jit_step

%layer (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %a = f32[4]{0} fusion(%x), kind=kLoop, calls=%inside
  ROOT %b = f32[4]{0} custom-call(%a), custom_call_target="gemm"
}

%token (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %c = f32[4]{0} fusion(%x), kind=kLoop, calls=%inside
  ROOT %w = f32[4]{0} while(%c), condition=%ends, body=%layer, KNOWN_28
}

%segment (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %u = f32[4]{0} fusion(%x), kind=kLoop, calls=%inside
  ROOT %w = f32[4]{0} while(%u), condition=%counted, body=%token
}

%counted (c: s32[]) -> pred[] {
  %limit = s32[]{:T(128)} constant(8)
  %c = s32[]{:T(128)} parameter(0)
  ROOT %less = pred[]{:T(512)} compare(%c, %limit), direction=LT
}

%ends (c: s32[]) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %c = s32[] parameter(0)
  %less = pred[] compare(%c, %limit), direction=LT
  ROOT %both = pred[] and(%less, %less)
}

%block (x: f32[4]) -> f32[4] {
  ROOT %s = f32[4]{0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %r = f32[4]{0} while(%p), condition=%ends, body=%segment, metadata={op_name="jit(f)/rollout/w"}
  %e = f32[4]{0} while(%r), condition=%ends, body=%block, metadata={op_name="jit(f)/update/w"}
  ROOT %g = f32[4]{0} fusion(%e), kind=kLoop, calls=%inside
}
""".replace("KNOWN_28", 'backend_config={"known_trip_count":{"n":"28"}}')


def test_kernels_of_a_token_are_those_of_all_its_layers():
    program = Program.parse(TEXT)
    assert program.kernels_per_token() == 1 + 28 * 2
    # Three segments of eight tokens, and one kernel outside of each loop; two blocks.
    told = program.with_trips([3], blocks=2)
    assert told.kernels("main") == 3 * (1 + 8 * 57) + 2 * 1 + 1
    (found,) = told.collectives(partial(spanned_axes, shape=SHAPE))
    assert (found.times, found.scope, found.axes, found.num_bytes) == (2, "update", ("model",), 16)


def test_an_exchange_that_goes_on_through_several_fusions_counts_once():
    """As a TPU's does, between its start and its end."""
    gather = "all-gather(%x), channel_id=7, replica_groups={{0,4},{1,5},{2,6},{3,7}}"
    text = f"""HloModule jit_step

%begin (x: bf16[4]) -> bf16[8] {{
  ROOT %g = bf16[8]{{0}} {gather}
}}

%go_on (x: bf16[4]) -> bf16[8] {{
  %y = bf16[8]{{0}} fusion(%x), calls=%deeper
  ROOT %g = bf16[8]{{0}} {gather}
}}

ENTRY %main (p: bf16[4]) -> bf16[8] {{
  %a = (bf16[4]{{0}}, bf16[8]{{0}}) fusion(%p), kind=kCustom, calls=%begin
  %b = (bf16[4]{{0}}, bf16[8]{{0}}) fusion(%a), kind=kOutput, calls=%go_on
  ROOT %c = bf16[8]{{0}} {gather.replace("7,", "8,", 1)}
}}
"""
    found = Program.parse(text).collectives(partial(spanned_axes, shape=SHAPE))
    assert [(each.axes, each.num_bytes, each.times) for each in found] == [(("data",), 16, 1)] * 2


def test_a_program_without_a_rollout_decodes_no_token():
    assert Program.parse(TEXT.replace("rollout", "something")).kernels_per_token() is None


def test_scopes_are_whole_words_of_a_name():
    assert scope_of('metadata={op_name="jit(train_step)/rollout/while/body/add"}') == "rollout"
    assert scope_of('metadata={op_name="jit(train_step)/update/transpose(jvp(x))"}') == "update"
    assert scope_of('metadata={op_name="jit(f)/dynamic_update_slice"}') == ""
    assert scope_of("no name") == ""
