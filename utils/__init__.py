"""Everything that two scripts share. Importing it comes before loading PyTorch, and settles how its threads wait.

By default OpenMP's threads spin while they wait for work, which costs a step many times its own time as soon as another
process needs a core. OpenMP reads its environment while PyTorch is loaded; afterwards a value would change nothing.
"""

import os
import sys

if "torch" not in sys.modules and "GOMP_SPINCOUNT" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
