# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax import divergence
from opsd_jax.divergence.config import CLIPS, COMPLETIONS
from opsd_jax.divergence.losses import DivergenceConfig, logit_divergence, token_divergence
from opsd_jax.divergence.rows import logit_gradient, prepare_rows
from opsd_jax.divergence.vocabulary import Vocabulary
from opsd_jax.errors import UserError
from opsd_jax.model.head import Head
from tests.divergence import oracle

V = 7
KLS = ("forward_kl", "reverse_kl", "mixed_kl", "jensen_shannon")
SUPPORTS = [("full", "renormalise")] + list(
    itertools.product(("teacher_top_k", "student_top_k", "union_top_k"), COMPLETIONS)
)


def hard_rows():
    """[8, V] student and teacher logits: random, peaked, equal, tied, with -inf, huge."""
    rng = np.random.default_rng(0)
    student = 1.5 * rng.normal(size=(8, V)).astype(np.float32)
    teacher = student + rng.normal(size=(8, V)).astype(np.float32)
    teacher[1] *= 6
    teacher[2] = student[2]
    student[3] = [2, 1, 1, 1, 0, 0, 2]
    teacher[3] = [0, 1, 1, 3, 0, 0, 1]
    student[4, [1, 5]] = teacher[4, [1, 5]] = -np.inf
    student[5] = [1e4, 9999, -1e4, 9998, 0, -1e4, 9997]
    teacher[5] = [9999, 1e4, -1e4, 9999.5, 5, 1e4, -1e4]
    student[6], teacher[6] = student[6] + 1e4, teacher[6] - 1e4
    return student, teacher


STUDENT, TEACHER = hard_rows()
IDS = np.array([0, 1, 2, 3, 4, 3, 6, 0], np.int32)


def choices(name, support, completion):
    for clip, temperature in itertools.product(CLIPS, (1.0, 1.7)):
        yield oracle.Choice(name, 0.3, clip, 0.06, temperature, support, 3, completion)


def assert_same(got, want, tolerance, what, scale=0.1):
    """Relative to the largest magnitude of a row, and to no less than `scale`."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    scale = np.maximum(scale, np.max(np.abs(want), axis=-1, keepdims=want.ndim > 0))
    np.testing.assert_array_less(np.abs(got - want) / scale, tolerance, err_msg=str(what))


def dense_with_gradient(config, student, teacher, ids):
    """Not jitted: hundreds of configurations would take minutes to compile."""

    def total(student):
        tokens = logit_divergence(config, student, teacher, ids)
        return tokens.objective.sum(), tokens

    (_, tokens), gradient = jax.value_and_grad(total, has_aux=True)(student)
    return jax.tree.map(np.asarray, tokens), np.asarray(gradient)


def closed_gradient(config, student, teacher, ids):
    vocabulary = Vocabulary(student.shape[-1])
    rows = prepare_rows(config, vocabulary, student, (teacher,), ids)
    return logit_gradient(config, vocabulary, rows)


def check_case(choice):
    config = DivergenceConfig(**dataclasses.asdict(choice))
    student, teacher = jnp.asarray(STUDENT), jnp.asarray(TEACHER)
    got, ad_gradient = dense_with_gradient(config, student, teacher, IDS)
    gradients = ad_gradient, np.asarray(closed_gradient(config, student, teacher, IDS))
    for n in range(len(IDS)):
        row = STUDENT[n], TEACHER[n], IDS[n]
        scale = max(0.1, oracle.magnitude(choice, *row))
        assert_same(got.objective[n], oracle.value(choice, *row), 1e-6, (choice, n), scale)
        want = oracle.gradient(choice, *row)
        for gradient in gradients:
            assert_same(gradient[n], want, 1e-5, (choice, n))
        for field, expected in oracle.report(choice, *row).items():
            assert_same(getattr(got, field)[n], expected, 1e-6, (field, choice, n), scale)


def is_quick(choice):
    """All clips and temperatures on the full vocabulary, two pairs on the other supports."""
    pairs = {("entry", 1.7), ("rescale", 1.0)}
    return choice.support == "full" or (choice.clip, choice.temperature) in pairs


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("support,completion", SUPPORTS)
def test_matches_the_oracle(name, support, completion):
    for choice in filter(is_quick, choices(name, support, completion)):
        check_case(choice)


@pytest.mark.slow
@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("support,completion", SUPPORTS)
def test_matches_the_oracle_in_every_combination(name, support, completion):
    for choice in itertools.filterfalse(is_quick, choices(name, support, completion)):
        check_case(choice)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_sampled_token_matches_the_oracle(temperature):
    check_case(oracle.Choice("sampled_token", temperature=temperature))


def test_entry_clip_gradient_has_the_closed_form():
    """(PT(A) pS - pT 1_A) / T with A = {v: term < tau}."""
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 5, 11)).astype(np.float32)
    tau, temperature = 0.02, 1.1
    config = DivergenceConfig(clip="entry", clip_threshold=tau, temperature=temperature)
    _, got = dense_with_gradient(config, student, teacher, np.zeros(5, np.int32))
    for n in range(5):
        p_s = oracle.probabilities(student[n], temperature)
        p_t = oracle.probabilities(teacher[n], temperature)
        unclipped = p_t * np.log(p_t / p_s) < tau
        assert 0 < unclipped.sum() < 11
        want = ((p_t * unclipped).sum() * p_s - p_t * unclipped) / temperature
        assert_same(got[n], want, 1e-5, n)


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("side", [0, 1])
def test_an_impossible_token_is_infinite_but_never_nan(name, side):
    logits = np.random.default_rng(2).normal(size=(2, 1, 5)).astype(np.float32)
    logits[side, 0, 2] = -np.inf
    config = DivergenceConfig(name)
    tokens, gradient = dense_with_gradient(config, *logits, np.zeros(1, np.int32))
    infinite = name == "mixed_kl" or (name, side) in {("forward_kl", 0), ("reverse_kl", 1)}
    assert np.isinf(tokens.divergence[0]) == infinite
    assert np.all(np.isfinite(gradient))
    assert np.all(np.isfinite(closed_gradient(config, *logits, np.zeros(1, np.int32))))


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("support", [("full", "renormalise"), ("teacher_top_k", "tail")])
@pytest.mark.parametrize("clip", CLIPS)
def test_nan_on_either_side_is_nan_and_not_perfect_agreement(name, support, clip):
    config = DivergenceConfig(name, clip=clip, support=support[0], completion=support[1], top_k=3)
    ids = np.zeros(2, np.int32)
    for side in (0, 1):
        logits = np.random.default_rng(2).normal(size=(2, 2, 5)).astype(np.float32)
        logits[side, 0, 2] = np.nan
        tokens, gradient = dense_with_gradient(config, *logits, ids)
        closed = closed_gradient(config, *logits, ids)
        for values in (tokens.objective, tokens.divergence, gradient, closed):
            assert np.all(np.isnan(values[0])) and np.all(np.isfinite(values[1]))


@pytest.mark.parametrize("implementation", ["dense", "fused"])
def test_a_teacher_that_says_nan_is_seen_through_the_heads(implementation):
    rng = np.random.default_rng(3)
    hidden, kernel = rng.normal(size=(1, 3, 4)).astype(np.float32), rng.normal(size=(9, 4))
    teacher = jnp.asarray(hidden).at[0, 1].set(jnp.nan)
    ids, mask = np.zeros((1, 3), np.int32), np.ones((1, 3), bool)
    config = DivergenceConfig(clip="entry", implementation=implementation)
    head = Head(jnp.asarray(kernel, jnp.float32))

    def total(hidden):
        tokens = token_divergence(config, hidden, head, teacher, head, ids, mask)
        return tokens.objective.sum(), tokens.objective

    gradient, objective = jax.grad(total, has_aux=True)(jnp.asarray(hidden))
    assert np.isnan(objective).tolist() == [[False, True, False]]
    assert np.isnan(gradient).all(-1).tolist() == [[False, True, False]]


@pytest.mark.parametrize("clip", ["token", "rescale"])
def test_an_infinite_divergence_is_clipped_to_the_threshold(clip):
    logits = np.random.default_rng(2).normal(size=(2, 1, 5)).astype(np.float32)
    logits[0, 0, 2] = -np.inf
    config = DivergenceConfig("forward_kl", clip=clip, clip_threshold=0.25)
    tokens, gradient = dense_with_gradient(config, *logits, np.zeros(1, np.int32))
    assert tokens.objective.tolist() == [0.25] and np.isinf(tokens.divergence[0])
    assert not np.any(gradient)
    assert not np.any(closed_gradient(config, *logits, np.zeros(1, np.int32)))


def test_users_own_divergence():
    """A function of the two log-probabilities, here the squared Hellinger distance."""

    def hellinger(student_logps, teacher_logps):
        return (jnp.exp(student_logps / 2) - jnp.exp(teacher_logps / 2)) ** 2

    config = DivergenceConfig(hellinger)
    tokens, gradient = dense_with_gradient(config, STUDENT, TEACHER, IDS)
    for n in range(len(IDS)):
        p_s, p_t = oracle.probabilities(STUDENT[n]), oracle.probabilities(TEACHER[n])
        assert_same(tokens.objective[n], 2 - 2 * np.sqrt(p_s * p_t).sum(), 2e-6, n)
    assert_same(closed_gradient(config, STUDENT, TEACHER, IDS), gradient, 1e-5, "closed")


@pytest.mark.parametrize("implementation", ["dense", "fused"])
@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(name=lambda s, t: jnp.sum(t - s, -1, keepdims=True)), "divergence.name.*, 1[)]"),
        (dict(name=lambda s, t: jnp.sum(t - s, -1)), "divergence.name.* not "),
        (dict(name=lambda s, t: 1.0), "divergence.name: @<lambda> must return shape .* not [(][)]"),
        (dict(weights=(lambda tokens, mask: mask[0],)), "weights.*[(]2, 3[)] or [(]2, 1[)], not"),
        (dict(target=lambda teachers: teachers[0][..., :1]), "divergence.target.*, 1[)]"),
    ],
)
def test_what_would_only_broadcast_is_refused(fields, words, implementation):
    """A sum over the vocabulary of one number per token would be that number times V."""
    student, teacher = np.ones((2, 2, 3, 4), np.float32)
    kernel, ids = np.ones((5, 4), np.float32), np.zeros((2, 3), np.int32)
    config = DivergenceConfig(**fields, implementation=implementation)
    with pytest.raises(UserError, match=words):
        token_divergence(config, student, Head(kernel), teacher, Head(kernel), ids, ids == 0)


def test_a_weight_of_rows_counts_for_each_of_their_tokens():
    config = DivergenceConfig(weights=(lambda tokens, mask: jnp.array([[0.0], [2.0]]),))
    student, teacher = np.random.default_rng(0).normal(size=(2, 2, 3, 5)).astype(np.float32)
    plain = logit_divergence(DivergenceConfig(), student, teacher).objective
    weighed = logit_divergence(config, student, teacher).objective
    np.testing.assert_array_equal(weighed, plain * np.array([[0], [2]]))


@pytest.mark.parametrize("name", KLS)
def test_no_gradient_reaches_the_teacher(name):
    def total(student, teacher):
        return logit_divergence(DivergenceConfig(name), student, teacher).objective.sum()

    student, teacher = jax.grad(total, argnums=(0, 1))(STUDENT[:2], TEACHER[:2])
    assert np.abs(student).max() > 1e-3 and not np.any(teacher)


def test_named_functions_are_the_configured_ones():
    """The public functions from logits, against the oracle; masked rows are zero."""
    mask = np.arange(len(IDS)) != 1
    cases = {
        "forward_kl": divergence.forward_kl(STUDENT, TEACHER, mask),
        "reverse_kl": divergence.reverse_kl(STUDENT, TEACHER, mask),
        "jensen_shannon": divergence.jensen_shannon(STUDENT, TEACHER, mask, beta=0.5),
        "sampled_token": divergence.sampled_token(STUDENT, TEACHER, IDS, mask),
    }
    for name, got in cases.items():
        for n, row in enumerate(zip(STUDENT, TEACHER, IDS, strict=True)):
            want = oracle.value(oracle.Choice(name), *row) if mask[n] else 0.0
            assert_same(got[n], want, 1e-6, (name, n))


def test_sampled_token_gradient_estimates_the_reverse_kl():
    """Averaged over ids with the student's probabilities it is the gradient of KL(S || T)."""
    student, teacher = STUDENT[:1], TEACHER[:1]
    p_s = oracle.probabilities(student[0])
    mean = np.zeros(V)
    for y in range(V):
        _, gradient = dense_with_gradient(
            DivergenceConfig("sampled_token"), student, teacher, np.array([y])
        )
        mean += p_s[y] * gradient[0]
    want = oracle.gradient(oracle.Choice("reverse_kl"), student[0], teacher[0])
    assert_same(mean, want, 1e-5, "mean")


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("sampler", ["older student", "teacher", "cooler", "penalised"])
def test_sampled_token_estimates_the_reverse_kl_whoever_samples(sampler, temperature):
    """Σ_y q(y) · gradient(y) = ∇ KL(S || T) at the loss temperature, for any q over all ids."""
    student, teacher = STUDENT[0], TEACHER[0]
    logits = {
        "older student": student + np.linspace(-1, 2, V),
        "teacher": teacher,
        "cooler": student / 0.6,
        "penalised": np.where(np.arange(V) < 3, student - 1.5, student),
    }[sampler]
    q, ids = oracle.probabilities(logits), np.arange(V)

    def total(student):
        rows = jnp.broadcast_to(student, (V, V))
        teachers = np.broadcast_to(teacher, (V, V))
        terms = divergence.sampled_token(
            rows, teachers, ids, sampled_logps=np.log(q), temperature=temperature
        )
        return jnp.sum(terms * q)

    choice = oracle.Choice("reverse_kl", temperature=temperature)
    want = oracle.gradient(choice, student, teacher)
    assert_same(jax.grad(total)(jnp.asarray(student)), want, 1e-5, (sampler, temperature))


@pytest.mark.parametrize("implementation", ["dense", "fused"])
def test_masked_rows_may_hold_nan(implementation):
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=(2, 2, 3, 4)).astype(np.float32)
    kernels = rng.normal(size=(2, 9, 4)).astype(np.float32)
    mask = np.array([[True, False, True], [False] * 3])
    student[~mask] = teacher[~mask] = np.nan

    config = DivergenceConfig(implementation=implementation)

    def total(hidden, kernel):
        tokens = token_divergence(
            config, hidden, Head(kernel), teacher, Head(kernels[1]), ids, mask
        )
        return tokens.objective.sum(), tokens

    ids = np.zeros((2, 3), np.int32)
    (_, tokens), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(student, kernels[0])
    for leaf in jax.tree.leaves(tokens):
        assert np.all(np.isfinite(leaf)) and not np.any(np.asarray(leaf)[~mask])
    assert np.all(np.isfinite(gradients[1])) and not np.any(np.asarray(gradients[0])[~mask])


@pytest.mark.parametrize(
    "fields,words",
    [
        (dict(name="forward"), "divergence.name"),
        (dict(name="jensen_shannon", beta=0.0), "forward_kl"),
        (dict(name="jensen_shannon", beta=1.0), "divergence.beta"),
        (dict(clip="entries"), "divergence.clip"),
        (dict(clip_threshold=0.0), "clip_threshold"),
        (dict(temperature=-1.0), "temperature"),
        (dict(support="top_k"), "divergence.support"),
        (dict(completion="tails"), "divergence.completion"),
        (dict(top_k=0), "top_k"),
        (dict(implementation="flash"), "implementation"),
        (dict(name="sampled_token", clip="entry"), "divergence.clip"),
        (dict(name=lambda logps: logps), "or a function of 2 arguments, not"),
        (dict(weights=(lambda tokens: tokens,)), "a tuple [(]a function of 2 arguments, ...[)]"),
    ],
)
def test_bad_configurations_say_what_to_change(fields, words):
    with pytest.raises(UserError, match=words):
        DivergenceConfig(**fields)


def test_mismatched_heads_and_oversized_k_are_user_errors():
    student, teacher = np.zeros((2, 3, 5)), np.zeros((2, 3, 6))
    with pytest.raises(UserError, match="5 entries and the teacher's 6"):
        divergence.forward_kl(student, teacher)
    with pytest.raises(UserError, match="top_k .50. exceeds the vocabulary .5."):
        divergence.forward_kl(student, student, support="teacher_top_k")
    with pytest.raises(UserError, match="divergence.target"):
        logit_divergence(DivergenceConfig(), student, (student, student))
