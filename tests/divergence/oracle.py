# SPDX-License-Identifier: Apache-2.0
"""The loss of one token in float64 NumPy, entry by entry, with finite-difference gradients.

Written from the formulas, sharing no code with the package. `frozen` holds what the loss treats as
constant for differentiation (support, advantage, rescaling factor), taken at the base point.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass
class Choice:
    name: str = "forward_kl"
    beta: float = 0.5
    clip: str = "none"
    clip_threshold: float = 0.05
    temperature: float = 1.0
    support: str = "full"
    top_k: int = 3
    completion: str = "renormalise"


def probabilities(logits, temperature=1.0):
    z = np.asarray(logits, np.float64) / temperature
    p = np.exp(z - z.max())
    return p / p.sum()


def log_probabilities(logits, temperature=1.0):
    z = np.asarray(logits, np.float64) / temperature
    z = z - z.max()
    return z - math.log(np.exp(z).sum())


def xlogy(p, log_ratio):
    return 0.0 if p == 0 else p * log_ratio


def top_k(logits, k):
    return sorted(range(len(logits)), key=lambda v: (-logits[v], v))[:k]


def support(choice, student, teacher):
    if choice.support == "full":
        return list(range(len(student)))
    chosen = []
    if choice.support in ("teacher_top_k", "union_top_k"):
        chosen += top_k(teacher, choice.top_k)
    if choice.support in ("student_top_k", "union_top_k"):
        chosen += [v for v in top_k(student, choice.top_k) if v not in chosen]
    return chosen


def on_support(choice, logits, chosen):
    logps = log_probabilities(logits, choice.temperature)
    kept = logps[chosen]
    if choice.support == "full" or choice.completion == "truncate":
        return kept
    if choice.completion == "renormalise":
        top = kept.max()
        return kept - top - math.log(np.exp(kept - top).sum())
    rest = np.array([logps[v] for v in range(len(logits)) if v not in chosen] or [-np.inf])
    top = rest.max()
    tail = -np.inf if top == -np.inf else top + math.log(np.exp(rest - top).sum())
    return np.append(kept, tail)


def term(choice, s, t):
    ps, pt = math.exp(s), math.exp(t)
    if choice.name == "forward_kl":
        return xlogy(pt, t - s)
    if choice.name == "reverse_kl":
        return xlogy(ps, s - t)
    if choice.name == "mixed_kl":
        return choice.beta * xlogy(pt, t - s) + (1 - choice.beta) * xlogy(ps, s - t)
    m = choice.beta * pt + (1 - choice.beta) * ps
    log_m = math.log(m) if m > 0 else -np.inf
    return choice.beta * xlogy(pt, t - log_m) + (1 - choice.beta) * xlogy(ps, s - log_m)


def all_terms(choice, student, teacher, chosen):
    s = on_support(choice, student, chosen)
    t = on_support(choice, teacher, chosen)
    with np.errstate(invalid="ignore"):
        return np.array([term(choice, a, b) for a, b in zip(s, t, strict=True)]), np.exp(t)


def freeze(choice, student, teacher, y=0):
    if choice.name == "sampled_token":
        s = log_probabilities(student, choice.temperature)[y]
        return log_probabilities(teacher, choice.temperature)[y] - s
    chosen = support(choice, student, teacher)
    total = all_terms(choice, student, teacher, chosen)[0].sum()
    return chosen, min(1.0, choice.clip_threshold / total) if total > 0 else 1.0


def objective(choice, student, teacher, frozen, y=0):
    if choice.name == "sampled_token":
        return -frozen * log_probabilities(student, choice.temperature)[y]
    chosen, scale = frozen
    terms, _ = all_terms(choice, student, teacher, chosen)
    if choice.clip == "entry":
        return np.minimum(terms, choice.clip_threshold).sum()
    if choice.clip == "token":
        return min(terms.sum(), choice.clip_threshold)
    return terms.sum() * (scale if choice.clip == "rescale" else 1.0)


def value(choice, student, teacher, y=0):
    return objective(choice, student, teacher, freeze(choice, student, teacher, y), y)


def magnitude(choice, student, teacher, y=0):
    """Sum of the sizes of the terms: what the rounding of their sum is relative to."""
    if choice.name == "sampled_token":
        return abs(value(choice, student, teacher, y))
    chosen = support(choice, student, teacher)
    return np.abs(all_terms(choice, student, teacher, chosen)[0]).sum()


def gradient(choice, student, teacher, y=0, step=1e-5):
    """Central differences of `objective` in the student's logits; 0 at logits of -inf."""
    frozen = freeze(choice, student, teacher, y)
    student = np.asarray(student, np.float64)
    out = np.zeros_like(student)
    for v in np.flatnonzero(np.isfinite(student)):
        up, down = student.copy(), student.copy()
        up[v] += step
        down[v] -= step
        high = objective(choice, up, teacher, frozen, y)
        out[v] = (high - objective(choice, down, teacher, frozen, y)) / (2 * step)
    return out


def report(choice, student, teacher, y=0):
    """The diagnostics of one token, by `TokenDivergence` field name."""
    at_temperature = log_probabilities(np.asarray(student, np.float64) / choice.temperature)
    s, t = log_probabilities(student), log_probabilities(teacher)
    name = "reverse_kl" if choice.name == "sampled_token" else choice.name
    whole = dataclasses.replace(choice, name=name, support="full", clip="none")
    full = list(range(len(student)))
    out = dict(
        divergence=all_terms(whole, student, teacher, full)[0].sum(),
        student_entropy=-sum(xlogy(math.exp(x), x) for x in s),
        teacher_entropy=-sum(xlogy(math.exp(x), x) for x in t),
        student_logps=s[y],
        teacher_logps=t[y],
        student_loss_logps=at_temperature[y],
        argmax_agreement=float(bool(set(np.flatnonzero(s == s.max())) & set(best(t)))),
        clipped=0.0,
        kept_teacher_mass=1.0,
        student_support_mass=1.0,
    )
    if choice.name == "sampled_token":
        return out
    chosen = support(choice, student, teacher)
    terms, mass = all_terms(choice, student, teacher, chosen)
    if choice.support != "full":
        both = [log_probabilities(x, choice.temperature)[chosen] for x in (student, teacher)]
        out["student_support_mass"], teacher_mass = (np.exp(x).sum() for x in both)
        if choice.completion == "renormalise":
            mass = mass * teacher_mass
    out["kept_teacher_mass"] = mass.sum()
    over = terms >= choice.clip_threshold
    if choice.clip == "entry":
        out["clipped"] = float(over.any())
        out["kept_teacher_mass"] = mass[~over].sum()
    elif choice.clip != "none":
        out["clipped"] = float(terms.sum() >= choice.clip_threshold)
        if choice.clip == "token" and out["clipped"]:
            out["kept_teacher_mass"] = 0.0
    return out


def best(logps):
    return np.flatnonzero(logps == logps.max())
