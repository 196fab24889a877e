# SPDX-License-Identifier: Apache-2.0
"""What each clip does to the gradient of the forward KL, on the testbed's own distributions.

    python experiments/benchmarks/clip_direction.py [--cache_dir=runs] [--num_problems=512]
        [--temperature=1.0] [--json]

The base model of the testbed (trained on the first call, about five minutes, and kept below
--cache_dir) answers held-out problems; the teacher is the same model with the reference in its
context. For every clip and threshold tau the gradient with respect to the student's logits is
compared with the gradient of the unclipped KL(teacher || student):

    cosine         of all tokens together, weighted by their gradients as an optimiser sees them
    token cosine   mean over tokens with an unclipped gradient above 1e-6; no gradient counts as 0
    size           norm over the norm of the unclipped gradient
    clipped        share of tokens where the clip acts
    negative       share of tokens with a loss below -1e-6, more than rounding
    teacher mass   mean teacher probability on entries that still pull the student
"""

import argparse
import json

import jax
import jax.numpy as jnp

from opsd_jax.divergence.losses import DivergenceConfig, logit_divergence

THRESHOLDS = (1.0, 0.3, 0.1, 0.05, 0.01, 1e-3, 1e-6)


def clip_directions(student_logits, teacher_logits, mask, temperature=1.0, thresholds=THRESHOLDS):
    """One dict per clip and threshold, the unclipped divergence first.

    Args:
      student_logits: [B, C, V].
      teacher_logits: [B, C, V].
      mask: [B, C] bool.
      temperature: of the loss.
      thresholds: values of tau in nats.
    """

    def measured(clip, threshold):
        config = DivergenceConfig(clip=clip, clip_threshold=threshold, temperature=temperature)

        def loss(student_logits):
            tokens = logit_divergence(config, student_logits, teacher_logits, None, mask)
            return jnp.sum(tokens.objective), tokens

        return jax.jit(jax.grad(loss, has_aux=True))(student_logits)

    true, _ = measured("none", 1.0)
    return [
        dict(clip=clip, threshold=threshold) | _compare(true, *measured(clip, threshold), mask)
        for clip in ("none", "entry", "token", "rescale")
        for threshold in (thresholds if clip != "none" else (1.0,))
    ]


def _compare(true, gradient, tokens, mask):
    def mean(values):
        return float(jnp.sum(jnp.where(mask, values, 0)) / jnp.sum(mask))

    sizes, true_sizes = (jnp.linalg.norm(x, axis=-1) for x in (gradient, true))
    counts = (true_sizes > 1e-6) & mask
    product = jnp.sum(gradient * true, axis=-1)
    cosines = jnp.where(counts, product / jnp.maximum(sizes * true_sizes, 1e-30), 0)
    size, true_size = jnp.linalg.norm(sizes), jnp.linalg.norm(true_sizes)
    return dict(
        cosine=float(jnp.sum(product) / jnp.maximum(size * true_size, 1e-30)),
        token_cosine=float(jnp.sum(cosines) / jnp.maximum(jnp.sum(counts), 1)),
        size=float(size / true_size),
        clipped=mean(tokens.clipped),
        negative=mean(tokens.objective < -1e-6),
        teacher_mass=mean(tokens.kept_teacher_mass),
        divergence=mean(tokens.divergence),
    )


def testbed_logits(cache_dir, num_problems):
    """Student and teacher logits [B, C, V] and the mask of the base's own completions."""
    from opsd_jax.method.scoring import completion_hidden
    from opsd_jax.model.decoder import Decoder
    from opsd_jax.model.head import head_logits, output_head
    from opsd_jax.sampling.config import RolloutConfig
    from opsd_jax.sampling.prompts import Context
    from opsd_jax.sampling.rollout import rollout
    from opsd_jax.testbed.problems import ChainArithmetic
    from opsd_jax.testbed.warm_start import TESTBED_MODEL, WarmStartConfig, load_or_train
    from opsd_jax.testbed.world import ChainTokenizer

    variables = {"params": load_or_train(WarmStartConfig(), TESTBED_MODEL, cache_dir).params}
    model, tokenizer = Decoder(TESTBED_MODEL), ChainTokenizer()
    source = ChainArithmetic(split="heldout", num_problems=num_problems).load(None)
    problems = [source[i] for i in range(len(source))]

    def context(texts):
        ids = jnp.array([tokenizer.encode(text) for text in texts], jnp.int32)
        return Context(ids, jnp.full(len(ids), ids.shape[1], jnp.int32))

    student = context([f"{p.question}?" for p in problems])
    teacher = context([f"{p.question}|{p.solution}?" for p in problems])
    config = RolloutConfig(18, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id)

    @jax.jit
    def run(variables):
        head = output_head(variables["params"], model.config)
        completion = rollout(
            model, variables, student.ids, student.lengths, jax.random.key(0), config
        )
        logits = (
            head_logits(head, completion_hidden(model, variables, prompt, completion))
            for prompt in (student, teacher)
        )
        return (*logits, completion.mask)

    return run(variables)


def markdown(rows):
    """The rows as a table."""
    columns = ["cosine", "token_cosine", "size", "clipped", "negative", "teacher_mass"]
    header = ["clip", "tau", *(column.replace("_", " ") for column in columns)]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        tau = "" if row["clip"] == "none" else f"{row['threshold']:g}"
        lines.append([row["clip"], tau, *(f"{row[column]:.2f}" for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache_dir", default="runs")
    parser.add_argument("--num_problems", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    args = parser.parse_args()
    logits = testbed_logits(args.cache_dir, args.num_problems)
    rows = clip_directions(*logits, temperature=args.temperature)
    if args.json:
        print("\n".join(map(json.dumps, rows)))
    else:
        tokens = int(jnp.sum(logits[-1]))
        print(f"{tokens} tokens, KL(teacher || student) {rows[0]['divergence']:.4f} nats per token")
        print(markdown(rows))


if __name__ == "__main__":
    main()
