"""The test kit of the family, for its own packages and for backends of others.

`plugin` holds pytest options, markers and the ``device`` fixture (``-p attn_core.testing.plugin``),
`budget` the error budget, `inputs` tensors with hostile strides and surroundings, `strategies`
hypothesis strategies, `compilation` ahead-of-time compilation without a GPU, `hopper` an emulator
of Gluon kernels on a CPU, `repeats` a check of calls that are repeated, and `conformance` the suite
every backend must pass. Importing this package needs neither pytest nor hypothesis.
"""

from attn_core.testing.budget import assert_within_budget
from attn_core.testing.inputs import (
    embedded,
    poison_new_allocations,
    poisoned,
    random_tensor,
    seed_from,
)

__all__ = [
    "assert_within_budget",
    "embedded",
    "poison_new_allocations",
    "poisoned",
    "random_tensor",
    "seed_from",
]
