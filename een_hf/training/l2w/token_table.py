"""Restricts the embedding table to the rows of a batch's tokens during a look-ahead."""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import nn

from . import devices


def _keys(ids: torch.Tensor, padding: int | None) -> torch.Tensor:
    """`ids`, changed so that the padding is the smallest."""
    return ids if padding is None else ids.masked_fill(ids == padding, -1)


def _distinct(ids: torch.Tensor, padding: int | None) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """The distinct `ids`: their keys in order, the ids themselves, and the place of the padding.

    Their number is known only on the CPU. On other devices the result has a fixed length: it always contains the
    padding, and the last id is repeated at the end.
    """
    keys = _keys(ids, padding)
    if devices.on_host(ids):
        keys = keys.unique()
        place = 0 if padding is not None and keys[0] == -1 else None
    else:
        if padding is not None:
            keys = torch.cat([keys.new_full((1,), -1), keys])
        ordered = keys.sort().values
        places = (ordered.diff() != 0).cumsum(0)
        keys = ordered[-1:].repeat(len(ordered)).scatter_(0, places, ordered[1:])
        keys[:1] = ordered[:1]
        place = None if padding is None else 0
    return keys, keys if padding is None else keys.masked_fill(keys == -1, padding), place


@contextmanager
def used_tokens(batches: Sequence[dict], network: nn.Module, optimizer: torch.optim.Optimizer):
    """Reduce the embedding table, and its state in the optimizer, to the rows of the tokens in `batches`.

    The whole table is restored at the end, also after an error. A table that is shared with another module is not
    reduced.
    """
    ids = [batch["input_ids"].flatten() for batch in batches if batch.get("input_ids") is not None]
    ids = torch.cat(ids) if ids else None
    table = None if ids is None else network.get_input_embeddings()
    whole = table.weight if type(table) is nn.Embedding else None
    shared = sum(parameter is whole for _, parameter in network.named_parameters(remove_duplicate=False)) != 1
    if shared or (not devices.on_host(ids) and ids.numel() >= len(whole)):
        yield
        return
    padding = table.padding_idx
    keys, tokens, place = _distinct(ids, padding)
    few = nn.Parameter(whole.detach()[tokens], requires_grad=whole.requires_grad)
    state = optimizer.state.get(whole, {}).items()
    state = {name: entry[tokens] if name != "step" and entry is not None else entry for name, entry in state}
    places = [
        (group["params"], n) for group in optimizer.param_groups for n, p in enumerate(group["params"]) if p is whole
    ]
    hook = table.register_forward_pre_hook(lambda _, args: (torch.searchsorted(keys, _keys(args[0], padding)),))
    try:
        table.weight, table.padding_idx = few, place
        for parameters, n in places:
            parameters[n] = few
        if state:
            optimizer.state[few] = state
        yield
    finally:
        hook.remove()
        table.weight, table.padding_idx = whole, padding
        for parameters, n in places:
            parameters[n] = whole
        optimizer.state.pop(few, None)
