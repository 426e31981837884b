"""The examples that a network works on, and how they become fewer: the only compaction code."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask


_MANY = 2**31  # more columns than there are


@dataclass
class Examples:
    """Examples between two layers, and all that travels with them; every tensor has the examples first.

    Args:
        hidden: (batch, length, hidden_size).
        attention_mask: (batch, length), 1 for tokens and 0 for padding; `None`: no padding.
        per_token: other tensors that layers need, (batch, length, ...), such as position ids.
        per_example: other tensors that layers or heads need, (batch, ...).
        logits: (batch, num_labels), what the exit before predicts.
        state: what the exit criterion remembers of the exits before.
        ids: (batch,), where the answers belong.
        padded: whether `attention_mask` is known to hold a zero; `None`: nobody has looked.
    """

    hidden: torch.Tensor
    attention_mask: torch.Tensor | None = None
    per_token: dict[str, torch.Tensor] = field(default_factory=dict)
    per_example: dict[str, torch.Tensor] = field(default_factory=dict)
    logits: torch.Tensor | None = None
    state: tuple[torch.Tensor, ...] = ()
    ids: torch.Tensor | None = None
    padded: bool | None = None
    # (batch, 2): the last column that is used, counted from 1, and `_MANY` minus how many are.
    _columns: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Examples":
        """The same examples with `function` applied to every tensor."""
        return replace(self, **{f.name: _map(getattr(self, f.name), function) for f in fields(self)})

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor, in an order that depends on which there are only."""
        found = []
        self.map(lambda tensor: found.append(tensor) or tensor)
        return found

    def select(self, indices: torch.Tensor) -> "Examples":
        """The examples at `indices` (int64), in that order."""
        return self.map(lambda tensor: tensor.index_select(0, indices))

    def trim(self, width: int | None = None, padded: bool | None = None) -> "Examples":
        """Cut the trailing columns that no example uses; a mask that then holds no zero is dropped.

        Args:
            width: number of columns that are used; with `padded`, whether some example uses fewer. Where they are not
                given, both are read from the mask.
        """
        if self.attention_mask is None:
            return self
        if width is None:
            _, width, padded = self.measure(torch.zeros_like(self.hidden[:, 0, 0], dtype=torch.bool))
        cut = {name: tensor[:, :width] for name, tensor in self.per_token.items()}
        mask = self.attention_mask[:, :width] if padded else None
        return replace(
            self, hidden=self.hidden[:, :width], attention_mask=mask, per_token=cut, padded=padded if padded else None
        )

    def measure(self, exits: torch.Tensor) -> tuple[int, int, bool]:
        """(examples that continue, columns that they use, whether some use fewer than that), in one read.

        Args:
            exits: (batch,) bool, the examples that exit; they do not make the others look longer or shorter.
        """
        length = self.hidden.shape[1]
        if self.attention_mask is None:
            return len(exits) - int(exits.sum()), length, False
        if self._columns is None:
            used = self.attention_mask != 0
            last = (used * torch.arange(1, length + 1, device=used.device)).amax(1)
            # An example of padding only attends to all of it.
            self._columns = torch.stack([last.masked_fill(last == 0, length), _MANY - used.sum(1)], 1)
        continues = ~exits
        largest = (self._columns * continues.unsqueeze(1)).amax(0)
        count, width, fewest = torch.cat([continues.sum(0, keepdim=True), largest]).tolist()
        return count, width, _MANY - fewest < width

    def continuing(self, exits: torch.Tensor) -> "Examples | None":
        """Those that do not exit, in their order, trimmed: these examples where all continue, `None` where none does.

        One read from the device.

        Args:
            exits: (batch,) bool.
        """
        if len(exits) == 1:
            return None if exits.item() else self
        if self.attention_mask is None:
            left, examples = (~exits).nonzero().squeeze(1), self
            count = len(left)
        else:
            count, width, padded = self.measure(exits)
            if 0 < count < len(exits):
                left, examples = (~exits).nonzero_static(size=count).squeeze(1), self.trim(width, padded)
        if count == len(exits):
            return self
        return examples.select(left) if count else None

    def unpadded(self) -> "Examples":
        """The same examples, without a mask that masks nothing; reads the mask once."""
        if self.attention_mask is None or self.attention_mask.dim() != 2 or self.padded is not None:
            return self
        padded = not bool((self.attention_mask != 0).all())
        return replace(self, attention_mask=self.attention_mask if padded else None, padded=padded or None)

    @staticmethod
    def join(parts: list["Examples"]) -> "Examples":
        """Stack examples of different length, the shorter padded on the right."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.hidden.shape[1] for part in parts)
        # No mask means no padding: that must be said once examples are padded, or stand beside some that are.
        if any(part.attention_mask is not None or part.hidden.shape[1] < width for part in parts):
            parts = [part._with_mask() for part in parts]

        def stack(tensors: list[torch.Tensor | None], per_token: bool = False) -> torch.Tensor | None:
            if tensors[0] is None:
                return None
            if per_token:
                tensors = [F.pad(t, (0, 0) * (t.dim() - 2) + (0, width - t.shape[1])) for t in tensors]
            return torch.cat(tensors)

        first = parts[0]
        return Examples(
            hidden=stack([part.hidden for part in parts], per_token=True),
            attention_mask=stack([part.attention_mask for part in parts], per_token=True),
            per_token={name: stack([p.per_token[name] for p in parts], per_token=True) for name in first.per_token},
            per_example={name: stack([part.per_example[name] for part in parts]) for name in first.per_example},
            logits=stack([part.logits for part in parts]),
            state=tuple(map(torch.cat, zip(*(part.state for part in parts), strict=True))),
            ids=stack([part.ids for part in parts]),
        )

    def _with_mask(self) -> "Examples":
        if self.attention_mask is not None:
            return self
        mask = torch.ones(self.hidden.shape[:2], dtype=torch.int64, device=self.hidden.device)
        return replace(self, attention_mask=mask)


def _map(value, function: Callable[[torch.Tensor], torch.Tensor]):
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: function(tensor) for name, tensor in value.items()}
    return tuple(map(function, value)) if isinstance(value, tuple) else value


def bidirectional_mask(config, examples: Examples, window: int | None = None) -> torch.Tensor | None:
    """What layers of the attention implementation in `config` read, made from the mask of the examples.

    Where the padding is known, nothing is read from the device.

    Args:
        config: of the model.
        examples: the examples.
        window: how many positions a token sees on each side; `None`: all.
    """
    mask, hidden = examples.attention_mask, examples.hidden
    known = mask is None or examples.padded
    if known and config._attn_implementation in ("eager", "sdpa"):
        allowed = None if mask is None else (mask != 0)[:, None, None]
        if window is not None and hidden.shape[1] > window + 1:
            positions = torch.arange(hidden.shape[1], device=hidden.device)
            near = (positions - positions[:, None]).abs() <= window
            allowed = near[None, None] if allowed is None else allowed & near
        if allowed is None or config._attn_implementation == "sdpa":
            return allowed
        # A softmax in float32 makes an infinity of the smallest float64, and of a token that sees nothing no number.
        smallest = max(torch.finfo(hidden.dtype).min, torch.finfo(torch.float32).min)
        return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill(~allowed, smallest)
    if mask is None and window is None:
        return None
    create = create_bidirectional_mask if window is None else create_bidirectional_sliding_window_mask
    return create(config=config, inputs_embeds=hidden, attention_mask=mask)
