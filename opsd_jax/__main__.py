# SPDX-License-Identifier: Apache-2.0
"""`python -m opsd_jax` is the console script `opsd`."""

import sys

from opsd_jax.main import main

sys.exit(main())
