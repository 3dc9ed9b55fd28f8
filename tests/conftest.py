"""What every test shares: one thread, and Hypothesis profiles by HYPOTHESIS_PROFILE.

dev (default) is quick, ci is reproducible, nightly runs 100,000 examples.
"""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

# Reductions are summed in another order with more threads, and two test processes on a
# small machine slow each other down.
torch.set_num_threads(1)

COMMON = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("dev", COMMON, max_examples=50)
settings.register_profile(
    "ci", COMMON, max_examples=100, derandomize=True, print_blob=True
)
settings.register_profile("nightly", COMMON, max_examples=100_000, print_blob=True)
DEFAULT = "ci" if os.environ.get("CI") else "dev"
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", DEFAULT))
