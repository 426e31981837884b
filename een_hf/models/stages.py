"""`Examples`: the examples between two layers, and compaction, the removal of those that have exited."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask


_MANY = 2**31  # larger than any number of columns


@dataclass
class Examples:
    """The examples between two layers, with all tensors that belong to them; the first dimension is the example.

    Args:
        hidden: hidden states (batch, length, hidden_size).
        attention_mask: (batch, length), 1 for tokens and 0 for padding; `None`: no padding.
        per_token: other tensors that layers need, (batch, length, ...), such as position ids.
        per_example: other tensors that layers or heads need, (batch, ...).
        logits: (batch, num_labels), the prediction of the exit before.
        state: the state of the exit criterion after the exit before.
        ids: (batch,), the place of each example in the batch of answers.
        padded: whether `attention_mask` contains a zero; `None`: not known.
    """

    hidden: torch.Tensor
    attention_mask: torch.Tensor | None = None
    per_token: dict[str, torch.Tensor] = field(default_factory=dict)
    per_example: dict[str, torch.Tensor] = field(default_factory=dict)
    logits: torch.Tensor | None = None
    state: tuple[torch.Tensor, ...] = ()
    ids: torch.Tensor | None = None
    padded: bool | None = None
    # (batch, 2): the last column that is used, counted from 1, and `_MANY` minus the number of columns that are used.
    _columns: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Examples":
        """The same examples with `function` applied to every tensor."""
        return Examples(*[_map(getattr(self, name), function) for name in _FIELDS])

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor, always in the same order."""
        found = []
        self.map(lambda tensor: found.append(tensor) or tensor)
        return found

    def select(self, indices: torch.Tensor) -> "Examples":
        """The examples at `indices` (int64), in that order."""
        return self.map(lambda tensor: tensor.index_select(0, indices))

    def trim(self, width: int | None = None, padded: bool | None = None) -> "Examples":
        """Remove the trailing columns that no example uses, and the mask if it then contains no zero.

        Args:
            width: number of columns that are used; `None`: `width` and `padded` are read from the mask.
            padded: whether some example uses fewer columns.

        Returns:
            the examples without these columns.
        """
        if width is None:
            if self.attention_mask is None:
                return self
            _, width, padded = self.measure(torch.zeros_like(self.hidden[:, 0, 0], dtype=torch.bool))
        cut = {name: tensor[:, :width] for name, tensor in self.per_token.items()}
        mask = self.attention_mask[:, :width] if padded else None
        return replace(
            self, hidden=self.hidden[:, :width], attention_mask=mask, per_token=cut, padded=padded if padded else None
        )

    def measure(self, exits: torch.Tensor) -> tuple[int, int, bool]:
        """Measure the examples that continue, in one read from the device.

        Args:
            exits: (batch,) bool, the examples that exit; they are not measured.

        Returns:
            number of examples that continue, number of columns that they use, and whether some use fewer columns.
        """
        length = self.hidden.shape[1]
        if self.attention_mask is None:
            return len(exits) - int(exits.sum()), length, False
        if self._columns is None:
            used = self.attention_mask != 0
            last = (used * torch.arange(1, length + 1, device=used.device)).amax(1)
            # An example that is all padding attends to all of it.
            self._columns = torch.stack([last.masked_fill(last == 0, length), _MANY - used.sum(1)], 1)
        continues = ~exits
        largest = (self._columns * continues.unsqueeze(1)).amax(0)
        count, width, fewest = torch.cat([continues.sum(0, keepdim=True), largest]).tolist()
        return count, width, _MANY - fewest < width

    def continuing(self, exits: torch.Tensor) -> "Examples | None":
        """The examples that do not exit, in their order, trimmed. Needs one read from the device.

        Args:
            exits: (batch,) bool, the examples that exit.

        Returns:
            the examples that continue; `self` if all do, `None` if none does.
        """
        if len(exits) == 1:
            return None if exits.item() else self
        if self.attention_mask is None:
            indices, examples = (~exits).nonzero().squeeze(1), self
            count = len(indices)
        else:
            count, width, padded = self.measure(exits)
            if 0 < count < len(exits):
                indices, examples = (~exits).nonzero_static(size=count).squeeze(1), self.trim(width, padded)
        if count == len(exits):
            return self
        return examples.select(indices) if count else None

    def unpadded(self) -> "Examples":
        """The same examples, without the mask if it contains no zero; reads the mask once."""
        if self.attention_mask is None or self.attention_mask.dim() != 2 or self.padded is not None:
            return self
        padded = not bool((self.attention_mask != 0).all())
        return replace(self, attention_mask=self.attention_mask if padded else None, padded=padded or None)


_FIELDS = [f.name for f in fields(Examples)]


def _map(value, function: Callable[[torch.Tensor], torch.Tensor]):
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: function(tensor) for name, tensor in value.items()}
    return tuple(map(function, value)) if isinstance(value, tuple) else value


def bidirectional_mask(config, examples: Examples, window: int | None = None) -> torch.Tensor | None:
    """The attention mask in the form that the attention implementation in `config` needs.

    If it is known whether examples are padded, nothing is read from the device.

    Args:
        config: config of the model.
        examples: the examples.
        window: number of positions that a token attends to on each side; `None`: all.

    Returns:
        the mask; `None`: every token attends to all.
    """
    mask, hidden = examples.attention_mask, examples.hidden
    known = mask is None or examples.padded
    if known and config._attn_implementation in ("eager", "sdpa"):
        allowed = None if mask is None else (mask != 0)[:, None, None]
        # An exported graph, which is for any length, has the window always.
        if window is not None and (torch.compiler.is_exporting() or hidden.shape[1] > window + 1):
            positions = torch.arange(hidden.shape[1], device=hidden.device)
            near = (positions - positions[:, None]).abs() <= window
            allowed = near[None, None] if allowed is None else allowed & near
        if allowed is None or config._attn_implementation == "sdpa":
            return allowed
        # Softmax in float32 would turn the smallest float64 into -inf, and a row of -inf into NaN.
        smallest = max(torch.finfo(hidden.dtype).min, torch.finfo(torch.float32).min)
        return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill(~allowed, smallest)
    if mask is None and window is None:
        return None
    create = create_bidirectional_mask if window is None else create_bidirectional_sliding_window_mask
    return create(config=config, inputs_embeds=hidden, attention_mask=mask)
