# SPDX-License-Identifier: Apache-2.0
"""A batch made by hand, and the losses of experiments/methods on it in float64 NumPy.

Three rows: one complete, one that ran into the length limit, one for which no teacher context could
be built. Everything is written from the formulas in the files' headers and shares no code with the
package. What a loss treats as constant for differentiation (token weights, supports, advantages) is
taken at the case's own logits; the gradient is by central differences in float64.

Alphabet: B rows, C tokens of a completion, V ids, N logits to try.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

B, C, V = 3, 4, 80
_RNG = np.random.default_rng(7)


def _logits(*shape, spread=1.5):
    return (spread * _RNG.normal(size=(*shape, V))).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """Logits [B, C, V] float32 of each policy in each context, and what was sampled, [B, C].

    student: of the student; teacher: in the teacher's context; views: in two further ones; plain:
    of the teacher in the student's context, which is the initial policy; old_logps: of the ids
    under the policy that sampled, at temperature 1; sampled_logps: as sampled; rewards: [B].
    """

    student: np.ndarray
    teacher: np.ndarray
    views: tuple[np.ndarray, ...]
    plain: np.ndarray
    ids: np.ndarray
    mask: np.ndarray
    stopped: np.ndarray
    has_context: np.ndarray
    old_logps: np.ndarray
    sampled_logps: np.ndarray
    rewards: np.ndarray

    @property
    def context_mask(self):
        """[B, C], the tokens of rows that have a teacher context."""
        return self.mask & self.has_context[:, None]


def make_case() -> Case:
    student = _logits(B, C)
    near = student + _logits(B, C, spread=0.7)
    ids = _RNG.integers(0, V, (B, C)).astype(np.int32)
    mask = np.arange(C) < np.array([3, 4, 2])[:, None]
    old = at(log_softmax(student + _logits(B, C, spread=0.2)), ids)
    # Ratios from .45 to 3.3: some above 2.
    sampled = at(log_softmax(student), ids) + _RNG.uniform(-1.2, 0.8, (B, C))
    return Case(
        student=student,
        teacher=near,
        views=(near + _logits(B, C, spread=0.7), near + _logits(B, C, spread=0.7)),
        plain=near + _logits(B, C, spread=0.4),
        ids=ids,
        mask=mask,
        stopped=np.array([True, False, True]),
        has_context=np.array([True, True, False]),
        old_logps=np.where(mask, old, 0).astype(np.float32),
        sampled_logps=np.where(mask, sampled, 0).astype(np.float32),
        rewards=np.array([1.0, 0.0, 0.25], np.float32),
    )


# ------------------------------------------------- of one token or many, over the last axis


def log_softmax(z, temperature=1.0):
    z = np.asarray(z, np.float64) / temperature
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def at(logps, ids):
    return np.take_along_axis(logps, np.asarray(ids)[..., None], -1)[..., 0]


def entropy(z):
    logps = log_softmax(z)
    return -(np.exp(logps) * logps).sum(-1)


def forward_kl(s, t, most=np.inf):
    """KL(teacher || student) with every summand at most `most`."""
    return np.minimum(np.exp(t) * (t - s), most).sum(-1)


def reverse_kl(s, t):
    return (np.exp(s) * (s - t)).sum(-1)


def jensen_shannon(s, t):
    m = np.log((np.exp(s) + np.exp(t)) / 2)
    return (forward_kl(m, t) + forward_kl(m, s)) / 2


def with_tail(logps, index):
    """Log-probabilities of the ids of an index [K], and that of all the others together."""
    others = np.delete(np.exp(logps), index, axis=-1).sum(-1, keepdims=True)
    return np.concatenate([np.take(logps, index, axis=-1), np.log(others)], axis=-1)


def largest(logps, k):
    return np.argsort(-logps, kind="stable")[:k]


# ------------------------------------------------- weights of tokens, [B, C]


def token_mean(mask):
    return mask / mask.sum()


def sequence_mean(mask):
    lengths = mask.sum(1, keepdims=True)
    return np.where(mask, 1 / np.maximum(lengths * (lengths > 0).sum(), 1), 0)


def importance(case, most, temperature=1.0):
    """pS(y) / p_sampled(y), at most `most`."""
    ratio = np.exp(at(log_softmax(case.student, temperature), case.ids) - case.sampled_logps)
    assert most == np.inf or (ratio[case.context_mask] > most).any()
    return np.minimum(ratio, most)


# ------------------------------------------------- the methods


@dataclasses.dataclass(frozen=True)
class Term:
    """sum over tokens of weights(case) · loss(case, b, t)(logits [N, V]) -> [N]."""

    weights: Callable
    loss: Callable


def on_context(case):
    return token_mean(case.context_mask)


def opsd(case, b, t):
    return lambda z: forward_kl(log_softmax(z, 1.1), log_softmax(case.teacher[b, t], 1.1), 0.05)


def clipped(case, b, t):
    return lambda z: forward_kl(log_softmax(z), log_softmax(case.teacher[b, t]), 0.05)


def pw_weights(case):
    T = case.mask.sum(1, keepdims=True)
    w = 0.25 + 0.75 / (1 + np.exp(-(np.arange(C) / T - 0.3) / 0.1))
    return sequence_mean(case.context_mask) * w


def sdft(case, b, t):
    teacher = log_softmax(case.teacher[b, t])
    index = largest(teacher, 10)
    return lambda z: reverse_kl(with_tail(log_softmax(z), index), with_tail(teacher, index))


def opsdc(case, b, t):
    return lambda z: reverse_kl(log_softmax(z), log_softmax(case.teacher[b, t]))


def demopsd(case, b, t):
    first, plain = log_softmax(case.teacher[b, t]), log_softmax(case.plain[b, t])
    alpha = 0.15 * 2 * (1 / (1 + np.exp(-50 * jensen_shannon(first, plain))) - 0.5)
    target = log_softmax((1 - alpha) * first + alpha * plain)
    index = largest(log_softmax(case.student[b, t]), 10)
    return lambda z: reverse_kl(with_tail(log_softmax(z), index), with_tail(target, index))


def opsrd_weights(case):
    gate = np.zeros((B, C))
    for b in range(B):
        T = int(case.mask[b].sum())
        kept = np.argsort(-entropy(case.student[b, :T]), kind="stable")[: -(-T // 2)]
        gate[b, kept] = 1
    return on_context(case) * gate


def exopd(case, b, t):
    """−(lambda E[log pT / pref] − KL(student || ref)): KL(student || q) up to a constant."""
    gain = log_softmax(case.teacher[b, t]) - log_softmax(case.plain[b, t])
    target = log_softmax(log_softmax(case.plain[b, t]) + 1.25 * gain)
    return lambda z: reverse_kl(log_softmax(z), target)


def sd_zero(case, b, t):
    index = largest(log_softmax(case.teacher[b, t]), 64)
    teacher = log_softmax(case.teacher[b, t][index])

    def loss(z):
        student = log_softmax(np.take(z, index, axis=-1))
        return (forward_kl(student, teacher) + reverse_kl(student, teacher)) / 2

    return loss


def contrast(case, b, t):
    right, wrong = log_softmax(case.teacher[b, t]), log_softmax(case.views[0][b, t])
    assert (wrong < -5).any() and (wrong > -5).any()
    target = log_softmax(1.5 * right - 0.5 * np.maximum(wrong, -5))
    index = largest(target, 10)
    return lambda z: forward_kl(with_tail(log_softmax(z), index), with_tail(target, index))


def gkd(case, b, t):
    return lambda z: jensen_shannon(log_softmax(z), log_softmax(case.teacher[b, t]))


def tinker_opd(case, b, t):
    y = case.ids[b, t]
    gap = log_softmax(case.teacher[b, t])[y] - log_softmax(case.student[b, t])[y]
    return lambda z: -gap * log_softmax(z)[..., y]


def clipped_importance(case):
    return on_context(case) * importance(case, 2.0)


METHODS: dict[str, tuple[Term, ...]] = {
    "opsd": (Term(on_context, opsd),),
    "sdft": (Term(clipped_importance, sdft),),
    "opsdc": (Term(on_context, opsdc),),
    "pw_opsd": (Term(pw_weights, clipped),),
    "demopsd": (Term(clipped_importance, demopsd),),
    "opsrd": (Term(opsrd_weights, clipped),),
    "exopd": (Term(on_context, exopd),),
    "contrast": (Term(on_context, contrast),),
    "gkd": (Term(on_context, gkd),),
    "sd_zero": (Term(on_context, sd_zero),),
    "tinker_opd": (Term(lambda case: on_context(case) * importance(case, np.inf), tinker_opd),),
}

NUM_VIEWS = {"contrast": 1}  # of the teacher, besides its own context


def loss_and_gradient(terms: tuple[Term, ...], case: Case, step: float = 1e-6):
    """The loss, and its gradient [B, C, V] in the student's logits."""
    total, gradient = 0.0, np.zeros((B, C, V))
    for term in terms:
        weights = term.weights(case)
        for b, t in zip(*np.nonzero(weights), strict=True):
            loss = term.loss(case, b, t)
            z = case.student[b, t].astype(np.float64)
            up, down = loss(z + step * np.eye(V)), loss(z - step * np.eye(V))
            total += weights[b, t] * loss(z[None])[0]
            gradient[b, t] += weights[b, t] * (up - down) / (2 * step)
    return total, gradient
