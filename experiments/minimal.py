# SPDX-License-Identifier: Apache-2.0
"""On-policy self-distillation on one screen: `python experiments/minimal.py`, a minute on a CPU.

One device, all parameters trained, the full vocabulary. `opsd_jax.train_step` computes the same
(tests/experiments/test_minimal.py), and with a mesh, adapters, other divergences and methods.
"""

import jax
import jax.numpy as jnp
import optax

import opsd_jax


# minimal: begin
def opsd_step(model, optimizer, config, params, teacher_params, opt_state, batch, key):
    student, teacher = batch.student, batch.teacher  # the question; the question and its solution
    answer = opsd_jax.rollout(model, {"params": params}, student.ids, student.lengths, key, config)
    C = answer.ids.shape[1]

    def logps(params, context):
        """log p of all that may come next, at every token of the answer: [B, C, V]."""
        insert = jax.vmap(lambda row, ids, at: jax.lax.dynamic_update_slice(row, ids, (at,)))
        ids = insert(jnp.pad(context.ids, ((0, 0), (0, C))), answer.ids, context.lengths)
        logits = opsd_jax.forward(model, {"params": params}, ids)
        # The last token of the prompt predicts the first of the answer.
        cut = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at - 1, C))
        return jax.nn.log_softmax(cut(logits, context.lengths))

    def loss(params):
        """KL(teacher || student) = sum over V of p_T (log p_T - log p_S), mean over tokens."""
        log_s, log_t = logps(params, student), logps(teacher_params, teacher)
        kl = jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)
        return jnp.sum(kl * answer.mask) / jnp.sum(answer.mask)

    value, gradient = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value
    # minimal: end


def main(num_steps=100, B=32):
    """An untrained model learns what the same model says of a problem that was solved for it."""
    problems = opsd_jax.ChainArithmetic(num_problems=num_steps * B).load(None)
    tokenizer = opsd_jax.ChainTokenizer()
    contexts = opsd_jax.ContextConfig(
        student="{question}?", teacher="{question}|{solution}?", evaluation="{question}?"
    )
    shape = dict(num_heads=4, num_kv_heads=4, head_dim=16, mlp_dim=128)
    model = opsd_jax.Decoder(opsd_jax.ModelConfig(tokenizer.vocab_size, 2, 64, **shape))
    config = opsd_jax.RolloutConfig(18, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id)
    params = teacher = opsd_jax.random_variables(model, jax.random.key(0))["params"]
    optimizer = optax.adam(1e-3)
    opt_state, step = optimizer.init(params), jax.jit(opsd_step, static_argnums=(0, 1, 2))
    for n in range(num_steps):
        batch = opsd_jax.make_batch(contexts, tokenizer, problems[n * B : (n + 1) * B])
        varying = (params, teacher, opt_state, batch, jax.random.key(n))
        params, opt_state, kl = step(model, optimizer, config, *varying)
        if n % 10 == 0 or n == num_steps - 1:
            print(f"step {n:3}  divergence {kl:.5f} nats per token")


if __name__ == "__main__":
    main()
