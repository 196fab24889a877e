# SPDX-License-Identifier: Apache-2.0
"""From prompts to completions: one batch inside jit, or continuous batching over many prompts.

In reading order: config.py (`RolloutConfig`), prompts.py (`Context`, `Completion`), rollout.py
(prefill and decode, a batch at a time), tokens.py (temperature, filters, penalties, one draw),
random_keys.py (which key a draw uses), decoding_form.py (the weights as decoding reads them).
Continuous batching, for evaluation: slots.py (on the host), slot_programs.py (what is compiled).
"""
