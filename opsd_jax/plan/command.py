# SPDX-License-Identifier: Apache-2.0
"""`opsd plan`: does an experiment fit chips that are not here, and how long is a step at least?"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from opsd_jax.errors import UserError
from opsd_jax.host.chips import peak_of
from opsd_jax.model.config import REMATS, ModelConfig
from opsd_jax.model.sharding import axis_size, rows_axis
from opsd_jax.plan.estimate import (
    BETWEEN_HOSTS,
    LINKS,
    REACHED,
    TO_HOST,
    Seconds,
    executed_flops,
    step_seconds,
)
from opsd_jax.plan.program import Collective, Program, spanned_axes
from opsd_jax.plan.step import (
    TooLarge,
    Widths,
    abstract_batch,
    compile_step,
    parts_of,
    shape_of,
)
from opsd_jax.plan.targets import GIB, Target, find_target
from opsd_jax.run.assembly import Assembly
from opsd_jax.run.config import load_experiment
from opsd_jax.run.experiment import Experiment
from opsd_jax.run.flops import Lengths, step_flops
from opsd_jax.sampling.rollout import even_segments, stages, worthwhile

HEADROOM = 0.92  # of a card's memory; see `fits`


class Plan(NamedTuple):
    """What the compiler made of a step on one chip.

    arguments, temporaries: bytes, of state and batch, and of everything else; refused: why it does
    not fit, in the compiler's words; kernels: launches for a decoded token, on GPUs;
    found: what the chips exchange; seconds: the floor; compile_s: how long this took.
    """

    experiment: Experiment
    parts: Assembly
    arguments: int = 0
    temporaries: int = 0
    refused: str = ""
    kernels: float | None = None
    found: tuple[Collective, ...] = ()
    seconds: Seconds | None = None
    compile_s: float = 0.0

    def fits(self, target: Target) -> bool:
        """A TPU's compiler refuses what does not fit; a card leaves a part to the driver and NCCL,
        and JAX takes 3/4 of it unless XLA_PYTHON_CLIENT_MEM_FRACTION=.92."""
        return not self.refused and self.memory <= HEADROOM * target.memory_bytes

    @property
    def memory(self) -> int:
        return self.arguments + self.temporaries


def make_plan(experiment: Experiment, config: ModelConfig, target: Target, widths: Widths) -> Plan:
    """Compiles the step of an experiment for a target.

    Raises:
      UserError: the experiment and the target do not go together.
    """
    parts = parts_of(experiment, config, target.devices)
    start = time.monotonic()
    try:
        compiled = compile_step(parts, abstract_batch(experiment, parts.mesh, widths))
    except TooLarge as error:
        return Plan(experiment, parts, refused=str(error), compile_s=time.monotonic() - start)
    memory = compiled.memory_analysis()
    rollout = parts.method.rollout
    number, length = even_segments(rollout)
    ends = worthwhile(stages(widths.student, number, length), rollout)
    block = experiment.divergence.rows_of_logits(on_cpu=False)
    chips = axis_size(parts.mesh, rows_axis(parts.mesh))
    rows = experiment.train.batch_size / experiment.train.num_micro_batches / chips
    blocks = math.ceil(rows * rollout.max_new_tokens / block)
    program = Program.parse(compiled.as_text()).with_trips(np.diff([0, *ends]).tolist(), blocks)
    mesh = dict(parts.mesh.shape)
    found = tuple(program.collectives(lambda line: spanned_axes(line, mesh)))
    on_gpu = target.devices[0].platform in ("gpu", "cuda")
    plan = Plan(
        experiment,
        parts,
        memory.argument_size_in_bytes,
        # Outputs that do not take an argument's place are alive besides it.
        memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        kernels=program.kernels_per_token() if on_gpu else None,
        found=found,
        compile_s=time.monotonic() - start,
    )
    return plan._replace(seconds=floor_of(plan, target, widths))


def padded_lengths(experiment: Experiment, widths: Widths) -> Lengths:
    """Every row as long as it can be."""
    size = experiment.train.batch_size
    student, teacher = (np.full(size, n) for n in widths)
    completion = np.full(size, experiment.rollout.max_new_tokens)
    contexts = experiment.training_contexts
    views = (teacher,) * len(contexts.views)
    own = tuple(map(contexts.is_after, contexts.teachers))
    return Lengths(student, teacher, completion, views, own)


def floor_of(plan: Plan, target: Target, widths: Widths) -> Seconds | None:
    """None where a peak or a formula is not known."""
    peak = peak_of(target.devices[0])
    if peak is None:
        return None
    chip = chip_of(target)
    outside = crossing(plan, target)

    def link(each: Collective) -> float:
        return BETWEEN_HOSTS if outside & set(each.axes) else LINKS[chip]

    lengths, to_host = padded_lengths(plan.experiment, widths), TO_HOST.get(chip)
    return step_seconds(plan.parts, lengths, peak, plan.found, link, plan.kernels, to_host)


def networks(target: Target) -> int:
    """Groups of chips between which the link is slow: hosts, but a slice of TPUs is one."""
    return 1 if target.devices[0].platform == "tpu" else target.hosts


def crossing(plan: Plan, target: Target) -> set[str]:
    """The mesh axes along which devices are on several hosts."""
    # Devices lie in the order of the hosts, the outermost axis first.
    inside, axes = len(target.devices) // networks(target), set()
    stride = 1
    for name, size in reversed(plan.parts.mesh.shape.items()):
        stride *= size
        if size > 1 and (stride > inside or inside % stride):
            axes.add(name)
    return axes


def chip_of(target: Target) -> str:
    return target.name.split(":")[0]


def plan_command(
    gin_files: Sequence[str],
    gin_bindings: Sequence[str],
    target: str,
    model_config: str | None = None,
    student_tokens: int | None = None,
    teacher_tokens: int | None = None,
    search: bool = False,
) -> None:
    """Prints the plan of an experiment, or with `search` a table of several.

    Raises:
      UserError: an unknown target, a compiler that is not installed, an experiment that does not
        go with it.
    """
    experiment, _ = load_experiment(list(gin_files), list(gin_bindings))
    if experiment.teacher.model is not None:
        raise UserError("a teacher that is another model (teacher.model) cannot be planned yet")
    found = find_target(target)
    config = shape_of(experiment, model_config)
    contexts = experiment.contexts
    widths = Widths(
        student_tokens or min(512, contexts.student_max_tokens),
        teacher_tokens or min(2048, contexts.teacher_max_tokens),
    )
    print(headline(experiment, config, found, widths), flush=True)
    if not search:
        print("\n".join(report(make_plan(experiment, config, found, widths), found, widths)))
        return
    print("\n| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    plans = []
    for variant in variants(experiment, config, found):
        plans.append(make_plan(variant, config, found, widths))
        print(row(plans[-1], found), flush=True)
    print("\n" + choice(plans, found))


def headline(experiment: Experiment, config: ModelConfig, target: Target, widths: Widths) -> str:
    return (
        f"{experiment.train.batch_size} rows, prompts of {widths.student} (student) and "
        f"{widths.teacher} (teacher) tokens, {experiment.rollout.max_new_tokens} new ones; "
        f"{config.num_layers} layers of width {config.embed_dim}; {target.name}: "
        f"{len(target.devices)} x {target.devices[0].device_kind}, "
        f"{target.memory_bytes / GIB:.1f} GiB each"
    )


def report(plan: Plan, target: Target, widths: Widths) -> list[str]:
    """The plan in lines: memory, work, exchange, seconds."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan.parts.mesh.shape.items())
    lines = [f"mesh              {mesh}, compiled in {plan.compile_s:.0f} s"]
    if plan.refused:
        return [*lines, f"memory            does not fit: {plan.refused}"]
    lines.append(
        f"memory            {plan.memory / GIB:.2f} GiB a chip: weights, moments and batch "
        f"{plan.arguments / GIB:.2f}, temporaries {plan.temporaries / GIB:.2f}: "
        + ("fits" if plan.fits(target) else "does NOT fit")
    )
    lengths = padded_lengths(plan.experiment, widths)
    needed, done = step_flops(plan.parts.method, lengths), executed_flops(plan.parts, lengths)
    if needed and done:
        chips = plan.parts.mesh.size
        lines.append(
            f"work              {sum(done) / chips / 1e12:.1f} TFLOPs a chip (rollout "
            f"{done[0] / chips / 1e12:.1f}, update {done[1] / chips / 1e12:.1f}), of which "
            f"{sum(needed) / sum(done):.0%} are the mathematics' and the rest recomputed (remat)"
        )
    if plan.kernels is not None:
        lines.append(f"a decoded token   {plan.kernels:,.0f} kernels")
    lines += [
        f"exchanged         {num / GIB:.2f} GiB a chip and step along {axes} in the {scope}"
        for (scope, axes), num in exchanged(plan.found).items()
    ]
    return lines + estimates(plan)


def exchanged(found: Sequence[Collective]) -> dict[tuple[str, str], float]:
    """(half of the step, mesh axes) -> bytes of one chip, most first."""
    total: dict[tuple[str, str], float] = defaultdict(float)
    for each in found:
        key = (each.scope or "rest of the step", " and ".join(each.axes) or "one place")
        total[key] += each.num_bytes * each.times
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def estimates(plan: Plan) -> list[str]:
    """The floor, and what may be expected."""
    if plan.seconds is None:
        return []
    expected, chips = plan.seconds.step / REACHED, plan.parts.mesh.size
    return [
        f"floor             {plan.seconds.step:.2f} s a step: rollout {plan.seconds.rollout:.2f}, "
        f"update {plan.seconds.update:.2f} (roofline: nothing can be faster)",
        f"estimate          {expected:.1f} s a step at {REACHED:.0%} of the roofline; 100 steps: "
        f"{expected * 100 / 3600 * chips:.2f} chip-hours (an estimate, measured nowhere)",
    ]


COLUMNS = (
    *("mesh.replica", "mesh.sequence", "mesh.model", "micro-batches", "remat"),
    *("GiB a chip", "fits", "floor s", "compiled in s"),
)


def row(plan: Plan, target: Target) -> str:
    """One line of the table of a search."""
    train = plan.experiment.train
    mesh = plan.parts.mesh.shape
    cells = [
        mesh.get("replica", 1),
        mesh.get("sequence", 1),
        mesh["model"],
        train.num_micro_batches,
        train.remat,
        plan.refused or f"{plan.memory / GIB:.2f}",
        "yes" if plan.fits(target) else "no",
        f"{plan.seconds.step:.2f}" if plan.seconds else "",
        f"{plan.compile_s:.0f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def variants(experiment: Experiment, config: ModelConfig, target: Target) -> Iterator[Experiment]:
    """mesh.replica (1, or the hosts) x mesh.model x micro-batches x remat, as far as they divide
    batch, heads and chips; mesh.sequence is raised where so many micro-batches need it."""
    train, chips = experiment.train, len(target.devices)
    meshes = itertools.product(sorted({1, networks(target)}), (1, 2, 4, 8), (1, 2, 4, 8))
    for replica, model, number in meshes:
        if config.num_kv_heads % model or chips % (replica * model):
            continue
        if train.batch_size % (chips // model):  # in the rollout all but `model` splits rows
            continue
        sequence = experiment.mesh.sequence
        while sequence <= chips and train.batch_size % (number * (chips // model // sequence) or 1):
            sequence *= 2
        rows = chips // model // sequence  # parts of a micro-batch
        if rows * model * sequence != chips or rows % replica:
            continue
        if sequence > 1 and config.num_heads % (sequence * model):
            continue
        mesh = dataclasses.replace(
            experiment.mesh, data=rows // replica, model=model, replica=replica, sequence=sequence
        )
        for remat in (True, *REMATS, False):
            changed = dataclasses.replace(train, num_micro_batches=number, remat=remat)
            yield dataclasses.replace(experiment, train=changed, mesh=mesh)


def choice(plans: Sequence[Plan], target: Target) -> str:
    """The fastest that fits, as bindings."""
    fitting = [plan for plan in plans if plan.fits(target)]
    if not fitting:
        return "None of them fits: take more chips, adapters (train.lora), or shorter texts."

    def cost(plan: Plan) -> tuple[float, bool, int]:
        # Where the way to the host is not known, it is still one.
        offloads = plan.experiment.train.remat == "offload_projections"
        return plan.seconds.step if plan.seconds else 0.0, offloads, plan.memory

    best = min(fitting, key=cost)
    train, mesh = best.experiment.train, best.parts.mesh.shape
    more = [f"mesh.{axis} = {mesh[axis]}, " for axis in ("replica", "sequence") if axis in mesh]
    return (
        f"Least floor that fits: {''.join(more)}mesh.model = {mesh['model']}, "
        f"train.num_micro_batches = {train.num_micro_batches}, train.remat = {train.remat!r}"
    )
