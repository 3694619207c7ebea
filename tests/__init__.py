"""Tests, and the programs beside them (`python -m tests.tools.study`)."""

import utils as utils  # before any of them loads PyTorch: see there
