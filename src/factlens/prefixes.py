"""Keys and values of earlier positions, handed to a model whose batch grows while it runs.

A fork at position i attends to the corrupted run's keys and values before i. TransformerLens keeps such prefixes in
two shapes (a Hugging Face `Cache` for the bridge, its own list of entries for `HookedTransformer`); both are answered
here from one `KeyValues`, so the engine need not know which it runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from transformers.cache_utils import Cache

Owner = Callable[[int, int], Tensor]
"""(layer, rows now) -> for each row, the row of the base pass whose prefix it attends to."""


@dataclass
class KeyValues:
    """Keys and values per layer: recorded in a base pass, prepended in the passes that reuse it.

    `start` is the number of earlier positions to prepend; 0 while recording. Only the first `record` rows of a layer
    are recorded. `axis` of the positions differs between the two model classes and is filled in by the adapter.
    """

    start: int = 0
    record: int = 0
    owner: Owner | None = None
    stored: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    prepended: list[int] = field(default_factory=list)
    """The layers at which a prefix was prepended, one entry each time; shared with every `reuse`."""

    def update(self, layer: int, keys: Tensor, values: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Record, or prepend, at one layer; positions lie along `axis`."""
        if self.record:
            self.stored[layer] = (keys[: self.record].clone(), values[: self.record].clone())
            return keys, values
        if not self.start or self.owner is None:
            return keys, values
        self.prepended.append(layer)
        # A model may be spread over devices, and each layer's prefix lies where the layer is.
        owner = self.owner(layer, keys.shape[0]).to(keys.device)
        past_keys, past_values = (
            stored.narrow(axis, 0, self.start).index_select(0, owner)
            for stored in self.stored[layer]
        )
        return torch.cat([past_keys, keys], dim=axis), torch.cat([past_values, values], dim=axis)

    def reuse(self, start: int, owner: Owner) -> "KeyValues":
        """The same recording, to be prepended from position `start` on."""
        return KeyValues(start=start, owner=owner, stored=self.stored, prepended=self.prepended)


class HuggingFacePrefix(Cache):
    """`KeyValues` as the `past_key_values` of a Hugging Face model; positions are axis 2."""

    is_compileable = False

    def __init__(self, keys: KeyValues) -> None:
        super().__init__(layers=[])
        self.keys = keys

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        return self.keys.update(layer_idx, key_states, value_states, axis=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.keys.start

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.keys.start

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.keys.start + query_length, 0

    def __len__(self) -> int:
        return 0

    @property
    def is_sliding(self) -> list[bool]:
        return [False]


@dataclass
class LensEntry:
    """One layer of `LensPrefix`."""

    keys: KeyValues
    layer: int

    @cached_property
    def past_keys(self) -> Tensor:
        """Only its length along axis 1 is read: where the new positions start."""
        return torch.empty(1, self.keys.start, 0)

    def append(self, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
        return self.keys.update(self.layer, new_keys, new_values, axis=1)


class LensPrefix:
    """`KeyValues` as the `past_kv_cache` of a `HookedTransformer`; positions are axis 1."""

    def __init__(self, keys: KeyValues, n_layers: int) -> None:
        self.entries = [LensEntry(keys, layer) for layer in range(n_layers)]

    def __getitem__(self, layer: int) -> LensEntry:
        return self.entries[layer]
