"""Triangle attention under the names and with the arguments of other packages.

One module a package, named after it: `trifast`, `cuequivariance`, `deepspeed`, `megafold` and
`protenix`. Import from there, or let `install_as` put ours in the place of theirs, so that a
program that imports the other package runs unchanged.
"""

from attn_triangle.compat.cuequivariance import mask_to_kv_lengths
from attn_triangle.compat.deepspeed import DS4Sci_EvoformerAttention
from attn_triangle.compat.installing import Installed, install_as
from attn_triangle.compat.megafold import TritonEvoformer
from attn_triangle.compat.protenix import TriAttentionFunction

__all__ = [
    "DS4Sci_EvoformerAttention",
    "Installed",
    "TriAttentionFunction",
    "TritonEvoformer",
    "install_as",
    "mask_to_kv_lengths",
]
