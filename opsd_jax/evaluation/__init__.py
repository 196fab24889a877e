# SPDX-License-Identifier: Apache-2.0
"""How good a policy is, and many runs side by side.

In reading order:
  evaluate      samples held-out problems in every role and has them graded
  generations   the graded completions, kept while an evaluation runs and gone on from
  statistics    accuracy, pass@k, maj@n, with errors over problems
  compare       two evaluations of the same problems: a paired bootstrap
  runs          workdirs read back: metrics, groups of seeds, tokens to an accuracy
  plot, report  the same as curves and as one html page
  summary       one run's before and after, on a few lines
  inline        what a notebook shows of all these
  forecast      what a teacher can teach, from one look at it before training
"""
