"""What a CUDA graph is to Python, on a CPU: the operations of one call, run again on the tensors of that call."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from een_hf.inference import engine, programs, slots
from een_hf.serving import stages


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, result))
        return result


class RecordedGraph:
    """Takes the place of `programs.capture`, which runs a function before it captures it."""

    def __init__(self, function, pool, stream):
        function()
        function()
        with _Recorder() as recorder:
            function()
        self.calls = recorder.calls

    def replay(self):
        for operator, args, kwargs, written in self.calls:
            results = operator(*args, **kwargs)
            if isinstance(results, torch.Tensor):
                results, written = [results], [written]
            for made, kept, said in zip(results or (), written or (), operator._schema.returns, strict=False):
                if isinstance(made, torch.Tensor) and said.alias_info is None:
                    kept.copy_(made)


def record_graphs(monkeypatch) -> None:
    """Let slots run by recorded graphs: what Python decides, and the tensors that it uses, are those of the record."""
    monkeypatch.setattr(slots, "capture", RecordedGraph)
    monkeypatch.setattr(slots, "seconds_of", lambda function, graphs: programs.seconds_of(function, None))
    for module in (engine, stages):
        monkeypatch.setattr(module, "graphs_on", lambda device: None if device.type == "cuda" else ("pool", "stream"))
