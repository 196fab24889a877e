# SPDX-License-Identifier: Apache-2.0
"""The guard: alarms for collapse and leakage, from the numbers a run writes anyway.

`alarms(config, history)` reads the lines of metrics.jsonl and says where a run went wrong, in
words. The training loop feeds the same `Guard` line by line; what it then does is
`guard.action`. Nothing here knows jax, so that the report can read a hundred runs.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from opsd_jax.errors import UserError
from opsd_jax.fields import Count, Positive, require
from opsd_jax.host.files import is_count, is_number, read_text, write_whole
from opsd_jax.host.stage import remove

ACTIONS = ("none", "warn", "stop", "restore")
VERDICT = "guard.json"
_AVERAGED = (
    "loss/divergence student/entropy teacher/entropy rollout/length_mean "
    "rollout/truncated_fraction rollout/reward_mean optim/grad_norm"
).split()
_SOLVED = 0.9


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When a run is called collapsed, and what then happens.

    Args:
      action: "none"; "warn" prints the reason once; "stop" also saves and ends the run;
        "restore" ends it and leaves the best evaluated checkpoint as the one that eval, generate
        and export take.
      window: training metrics are averages over so many logged steps; single steps are noisy.
      divergence_rise: alarm when the unclipped loss/divergence is so many times its minimum.
      divergence_floor: nats (or its unit) that it must have risen at least; less is noise.
      entropy_fall: alarm when student/entropy is under this share of where it should end (the
        teacher's entropy at the start, or its own where nothing teaches) and the problems are
        not solved: nine rollouts of ten right excuse any certainty.
      length_rise: alarm when rollout/length_mean is so many times that at the start.
      truncated_rise: alarm when rollout/truncated_fraction is so much above that at the start.
      num_standard_errors: alarm when held-out accuracy, of student or teacher, is so many
        standard errors (of the difference) below its best.

    Without a setting of its own: a gradient of exactly 0 in a whole window, problems not solved.
    """

    action: Annotated[str, ACTIONS] = "warn"
    window: Count = 5
    divergence_rise: Annotated[float, "> 1"] = 2.0
    divergence_floor: Positive = 0.01
    entropy_fall: Positive = 0.1
    length_rise: Annotated[float, "> 1"] = 2.0
    truncated_rise: Positive = 0.25
    num_standard_errors: Positive = 4.0

    def __post_init__(self):
        require("guard", self)


class Alarm(NamedTuple):
    """One thing that went wrong: when it was first seen, its short name, and the numbers."""

    step: int
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} at step {self.step}: {self.reason}"


def alarms(config: GuardConfig, history: Iterable[Mapping[str, Any]]) -> list[Alarm]:
    """Every alarm of a run, at the first step that sets it off.

    Args:
      config: thresholds; the action plays no part.
      history: the lines of metrics.jsonl in order; a metric may be missing, None or NaN.
    """
    return replayed(config, history).alarms


def replayed(config: GuardConfig, history: Iterable[Mapping[str, Any]]) -> Guard:
    """A guard that has seen a run."""
    guard = Guard(config)
    for line in history:
        guard.see(line)
    return guard


def is_watched(config: GuardConfig, history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a run was measured enough for any alarm: a whole window, an evaluation, a probe."""
    guard = replayed(config, history)
    leaks = any(number(line, "probe/teacher/leak") is not None for line in history)
    return bool(guard.first or guard.best or leaks)


class Guard:
    """`alarms`, one line at a time; each alarm rings once.

    Attributes:
      alarms: all that have rung.
    """

    def __init__(self, config: GuardConfig):
        self.config = config
        self.alarms: list[Alarm] = []
        self.now: dict[str, float] = {}  # windowed averages after the latest line
        self.first: dict[str, float] = {}  # ... of the first whole window
        self.lowest: dict[str, tuple[float, int]] = {}  # ... at their minimum, and its step
        self.best: dict[str, tuple[float, float, int]] = {}  # accuracy, error, step, by role
        self._recent: dict[str, collections.deque[float]] = {
            name: collections.deque(maxlen=config.window) for name in _AVERAGED
        }

    @property
    def ends_the_run(self) -> bool:
        return bool(self.alarms) and self.config.action in ("stop", "restore")

    def see(self, line: Mapping[str, Any]) -> list[Alarm]:
        """Takes the metrics of the next step, "step" among them; the alarms they set off."""
        self._average(line)
        rung = {alarm.name for alarm in self.alarms}
        found = []
        for name, check in _CHECKS.items():
            reason = None if name in rung else check(self, line)
            if reason is not None:
                found.append(Alarm(line["step"], name, reason))
        self.alarms += found
        return found

    def _average(self, line: Mapping[str, Any]) -> None:
        self.now.clear()
        for name, recent in self._recent.items():
            value = number(line, name)
            if value is None:
                continue
            recent.append(value)
            if len(recent) == self.config.window:
                mean = sum(recent) / len(recent)
                self.now[name] = mean
                self.first.setdefault(name, mean)
                if name not in self.lowest or mean < self.lowest[name][0]:
                    self.lowest[name] = mean, line["step"]


def number(line: Mapping[str, Any], name: str) -> float | None:
    """A finite metric of a line, or None."""
    value = line.get(name)
    return float(value) if is_number(value) else None


def divergence_rises(guard: Guard, line: Mapping[str, Any]) -> str | None:
    """Student and teacher drift apart again: a moving teacher falls, or the student wanders."""
    now = guard.now.get("loss/divergence")
    if now is None:
        return None
    lowest, step = guard.lowest["loss/divergence"]
    config = guard.config
    if now < config.divergence_rise * lowest or now - lowest < config.divergence_floor:
        return None
    return (
        f"loss/divergence (unclipped) is {now:.3g} per token again, after its minimum of "
        f"{lowest:.3g} at step {step}"
    )


def entropy_collapses(guard: Guard, line: Mapping[str, Any]) -> str | None:
    """The student has stopped exploring: it is far surer than the teacher ever was."""
    now = guard.now.get("student/entropy")
    if now is None or guard.now.get("rollout/reward_mean", 0.0) >= _SOLVED:
        return None
    whose = "teacher" if "teacher/entropy" in guard.first else "student"
    start = guard.first[f"{whose}/entropy"]
    if start <= 0 or now >= guard.config.entropy_fall * start:
        return None
    return f"student/entropy is {now:.3g} nats, {now / start:.0%} of the {whose}'s at the start"


def length_explodes(guard: Guard, line: Mapping[str, Any]) -> str | None:
    """Rollouts grow without end."""
    now = guard.now.get("rollout/length_mean")
    start = guard.first.get("rollout/length_mean", 0.0)
    if now is None or start <= 0 or now < guard.config.length_rise * start:
        return None
    return f"rollout/length_mean is {now:,.0f} tokens, {now / start:.1f} times that at the start"


def truncation_grows(guard: Guard, line: Mapping[str, Any]) -> str | None:
    """Rollouts run into the limit, so that the end of an answer is never trained."""
    now = guard.now.get("rollout/truncated_fraction")
    if now is None:
        return None
    start = guard.first["rollout/truncated_fraction"]
    if now < start + guard.config.truncated_rise:
        return None
    return f"{now:.0%} of the rollouts run into rollout.max_new_tokens, {start:.0%} at the start"


def nothing_is_learned(guard: Guard, line: Mapping[str, Any]) -> str | None:
    """No gradient at all: weights or advantages are 0, or a loss knows nothing of the student."""
    if guard.now.get("optim/grad_norm") != 0 or guard.now.get("rollout/reward_mean", 0) >= _SOLVED:
        return None
    return "optim/grad_norm is exactly 0: nothing that was sampled teaches anything"


def accuracy_falls(role: str) -> Callable[[Guard, Mapping[str, Any]], str | None]:
    """Held-out accuracy of a role is well below its best."""
    metric = f"eval/{role}/accuracy"

    def check(guard: Guard, line: Mapping[str, Any]) -> str | None:
        now, error = number(line, metric), number(line, f"{metric}_se")
        if now is None or error is None:
            return None
        if role not in guard.best or now > guard.best[role][0]:
            guard.best[role] = now, error, line["step"]
        best, best_error, step = guard.best[role]
        # Both evaluations ask the same problems; their errors are added as if they did not.
        if best - now <= guard.config.num_standard_errors * math.hypot(error, best_error):
            return None
        before = f"{best:.3f} ± {best_error:.3f} at step {step}"
        return f"{metric} is {now:.3f} ± {error:.3f}, after {before}"

    return check


def teacher_leaks(guard: Guard, line: Mapping[str, Any]) -> str | None:
    """After a wrong step the teacher jumps to the reference, which the student cannot see."""
    ok, leak = number(line, "probe/teacher/ok"), number(line, "probe/teacher/leak")
    if ok is None or leak is None or leak <= ok:
        return None
    return (
        f"after a wrong step the teacher gives the reference's next result {leak:.2f}, the right "
        f"continuation {ok:.2f}: the student would learn to guess"
    )


_CHECKS: dict[str, Callable[[Guard, Mapping[str, Any]], str | None]] = {
    "leakage": teacher_leaks,
    "teacher accuracy": accuracy_falls("teacher"),
    "divergence": divergence_rises,
    "student accuracy": accuracy_falls("student"),
    "entropy": entropy_collapses,
    "length": length_explodes,
    "truncation": truncation_grows,
    "gradient": nothing_is_learned,
}


def write_verdict(workdir: Path, found: list[Alarm], restore_step: int | None) -> None:
    """Records in workdir/guard.json why a run was ended and which step is to be taken."""
    verdict = {"alarms": [alarm._asdict() for alarm in found], "restore_step": restore_step}
    write_whole(workdir / VERDICT, json.dumps(verdict, indent=1) + "\n")


def forget_verdict(workdir: Path) -> None:
    """Called when the run goes on after all."""
    remove(workdir / VERDICT)


def restored_step(workdir: Path) -> int | None:
    """The checkpoint that the guard of a run chose; None if it chose none.

    Raises:
      UserError: guard.json says neither.
    """
    path = workdir / VERDICT
    if not path.exists():
        return None
    try:
        step = json.loads(read_text(path))["restore_step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        step = ""
    if step is None or is_count(step):
        return step
    raise UserError(f"{path} is damaged: remove it, or name a step")
