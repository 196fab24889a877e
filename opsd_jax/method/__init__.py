# SPDX-License-Identifier: Apache-2.0
"""On-policy self-distillation, and what it is compared with: what one forks.

In reading order: train_step.py (sample, score, update: the whole step), batch.py (what both roles
are shown), completions.py (who writes), scoring.py (one completion under any context),
micro_batches.py (some rows at a time), objective.py (what is read of them), rows.py (which count,
and how much), token_view.py (what token weights and advantage shapes see), mix.py (distillation and
the other terms of a loss), policy_gradient.py and advantage_shapes.py (GRPO, and mixtures with the
teacher), teacher.py (whose weights teach), reason_first.py (a teacher that writes an analysis
first), optimizer.py.
"""
