"""Whole copies of models whose parameters are divided among processes (FSDP2)."""

import copy

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from .models import EarlyExitMixin


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of every parameter only."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Let each process hold its part alone again, after a forward pass without a backward pass."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()


def whole_shapes(model: EarlyExitMixin) -> EarlyExitMixin:
    """A copy of a sharded model whose tensors have shape and dtype but no storage."""
    whole_class = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    with torch.device("meta"):
        return whole_class(copy.deepcopy(model.config)).to(model.dtype)


def whole_copy(model: EarlyExitMixin) -> EarlyExitMixin:
    """A copy of a sharded model, in eval mode, with all parameters; every process must ask for it.

    Shards are exchanged at every layer, so that all processes must run it. Where examples exit they do not.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    whole = whole_shapes(model)
    buffers = {name for name, _ in whole.named_buffers()} - state.keys()  # those that are not saved
    whole.load_state_dict(state, assign=True)
    of_name = dict(model.named_buffers())
    for name in buffers:
        owner, _, last = name.rpartition(".")
        setattr(whole.get_submodule(owner), last, of_name[name].clone())
    whole.cuda_graphs = model.cuda_graphs
    return whole.eval()
