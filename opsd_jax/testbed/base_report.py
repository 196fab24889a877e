# SPDX-License-Identifier: Apache-2.0
"""What the base model of the testbed is judged by before anything is distilled from it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BaseReport:
    """What the gate looks at, all on held-out problems.

    Attributes:
      student, student_greedy: accuracy of the student context, sampled at temperature 1 and greedy.
      teacher: sampled accuracy with the reference in context.
      student_ok, student_leak, teacher_ok, teacher_leak: wrong-prefix probe (probe.py).
      weak, strong: mean probability of the right result of weak and strong facts.
      answer, answer_ok: as teacher and teacher_ok with a right answer in the student's own
        notation as context; None where that is not taught.
      feedback, feedback_ok: belief in the results of weak facts that the context says, and
        the probe with the line that went wrong as context; None where that is not taught.
    """

    student: float
    student_greedy: float
    teacher: float
    student_ok: float
    student_leak: float
    teacher_ok: float
    teacher_leak: float
    weak: float
    strong: float
    answer: float | None = None
    answer_ok: float | None = None
    feedback: float | None = None
    feedback_ok: float | None = None

    def failures(self) -> list[str]:
        """The conditions of the gate that are not met, in words; empty when it is passed."""
        conditions = {
            f"student accuracy {self.student:.3f} is not in 0.45-0.57": 0.45
            <= self.student
            <= 0.57,
            f"student greedy accuracy {self.student_greedy:.3f} is above 0.50": (
                self.student_greedy <= 0.50
            ),
            f"teacher accuracy {self.teacher:.3f} is below 0.95": self.teacher >= 0.95,
        }
        if self.answer is not None:
            text = f"accuracy {self.answer:.3f} with a right answer is below 0.95"
            conditions[text] = self.answer >= 0.95
        if self.feedback is not None:
            text = f"belief {self.feedback:.3f} in weak facts after feedback is below 0.95"
            conditions[text] = self.feedback >= 0.95
        probes = {
            "teacher": self.teacher_ok,
            "teacher with an answer": self.answer_ok,
            "teacher with feedback": self.feedback_ok,
        }
        for who, ok in probes.items():
            if ok is not None:
                text = f"after a wrong step {who} ({ok:.3f}) and student ({self.student_ok:.3f}) "
                conditions[text + "differ by more than 0.03"] = abs(ok - self.student_ok) <= 0.03
        return [text for text, met in conditions.items() if not met]

    def summary(self) -> str:
        more = "" if self.answer is None else f", with an answer {self.answer:.3f}"
        more += "" if self.feedback is None else f", weak with feedback {self.feedback:.2f}"
        return (
            f"student {self.student:.3f} (greedy {self.student_greedy:.3f}), "
            f"teacher {self.teacher:.3f}, after a wrong step ok/leak: "
            f"student {self.student_ok:.2f}/{self.student_leak:.2f}, "
            f"teacher {self.teacher_ok:.2f}/{self.teacher_leak:.2f}, "
            f"facts weak/strong {self.weak:.2f}/{self.strong:.2f}{more}"
        )
