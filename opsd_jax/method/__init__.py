# SPDX-License-Identifier: Apache-2.0
"""On-policy self-distillation, and what it is compared with: what one forks.

In reading order: train_step.py (sample, score, update: the whole step), batch.py (what both roles
are shown), completions.py (who writes), scoring.py (one completion under any context),
objective.py (distillation and likelihood), policy_gradient.py (GRPO and mixtures with it),
teacher.py (whose weights teach), reason_first.py (a teacher that writes an analysis first),
optimizer.py (AdamW and its schedule).
"""
