"""The words for shapes. Axes are TransformerLens's own (`pos d_model d_mlp head_index`), plus ours:
`row` is one run in a batch, `sample` one draw of noise, `keep` the positions whose logits are read.
"""

from collections.abc import Callable

from jaxtyping import Bool, Float, Int
from torch import Tensor

Act = Float[Tensor, "row pos d_model"]
Tokens = Int[Tensor, "row pos"]
Where = Bool[Tensor, "row pos"]
Noise = Float[Tensor, "sample subject_pos d_model"]
Logits = Float[Tensor, "row keep d_vocab"]

Hook = Callable[..., Tensor]
Hooks = list[tuple[str, Hook]]
"""TransformerLens's own `fwd_hooks`: (hook name, function) pairs, run in list order."""
