"""Everything that two scripts share. Importing it comes before loading PyTorch, and settles how its threads wait."""

import os
import sys

# What OpenMP's threads do while they wait for work. By default they spin, which costs a step many times its own time
# as soon as another process needs a core.
WAIT_POLICY = ("OMP_WAIT_POLICY", "PASSIVE")
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

# OpenMP reads its environment when PyTorch loads it, so a later value would do nothing but be wrong in the log.
if "torch" not in sys.modules and not any(name in os.environ for name in WAIT_VARIABLES):
    os.environ[WAIT_POLICY[0]] = WAIT_POLICY[1]
