# SPDX-License-Identifier: Apache-2.0
"""The quickstart's little world: chained arithmetic that a laptop learns in minutes.

In reading order: world.py (the problems, what the base believes of them, the tokenizer),
problems.py (@ChainArithmetic(), problems for a run), corpus.py (what the base is taught from),
warm_start.py (how it is taught, and the gate that it must pass), probe.py (what a run measures of
it). Nothing else needs it: `rm -r opsd_jax/testbed opsd_jax/run/testbed_base.py` leaves a package
that trains other models on other problems.
"""
