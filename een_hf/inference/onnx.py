"""Export of an early-exit model as one ONNX graph.

In the dynamic graph every stage after the first (its layers, its exit and the decision) is a branch of an `If`, which
ONNX Runtime does not run after the batch has exited. All rows of a batch exit together, at the first exit where the
scores of all rows reach the threshold; a batch of one row exits where it does in PyTorch.
"""

import copy
import inspect
import json
import os
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import ExportError
from ..extras import named_extras
from ..models import EarlyExitMixin, ExitConfigurationError, ExitPolicy
from ..models.policies import NEVER
from ..models.stages import Examples


TOLERANCE = 1e-4
THRESHOLDS = "thresholds"


class _AllExits(nn.Module):
    """The graph of all exits: from model inputs to exit_logits (batch, num_exits, num_labels)."""

    output_names = ["exit_logits"]

    def __init__(self, model: EarlyExitMixin):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return torch.stack(self.model.run_all(self.model.embed(**inputs)), 1)


class FirstSureExit(nn.Module):
    """The dynamic graph: from inputs and thresholds (num_exits,) to logits (batch, num_labels), exit_index (batch,).

    Args:
        model: an early-exit model.
        policy: its exit policy.
    """

    output_names = ["logits", "exit_index"]

    def __init__(self, model: EarlyExitMixin, policy: ExitPolicy):
        super().__init__()
        self.model, self.temperatures, self.criterion = model, policy.temperatures, policy.scorer
        self.exits = _exits_of(model, policy)

    def forward(self, inputs, thresholds):
        examples = self.model.embed(**inputs)
        read, layout = tree_flatten(
            (examples.attention_mask, examples.per_token, examples.per_example, self.model.make_context(examples))
        )
        # A branch takes each tensor once.
        tensors = list({id(leaf): leaf for leaf in read if isinstance(leaf, torch.Tensor)}.values())
        places = [next((n for n, t in enumerate(tensors) if t is leaf), None) for leaf in read]

        def stage(index, thresholds, tensors, hidden, previous, state):
            """Hidden states, logits and the criterion's state after a stage, then whether the whole batch exits."""
            leaves = [leaf if n is None else tensors[n] for leaf, n in zip(read, places, strict=True)]
            *fields, context = tree_unflatten(leaves, layout)
            exit_index, after = self.exits[index], self.exits[index - 1] if index else -1
            hidden, logits = self.model.run_stage(exit_index, Examples(hidden, *fields), context, previous, after)
            temperature = self.temperatures[exit_index] if self.temperatures else None
            scores, state = self.criterion.score(logits, state, temperature)
            # A view of the logits, as a regression keeps it, may not be returned beside them.
            state = (tensor.clone() for tensor in state)
            return hidden, logits, *state, (scores >= thresholds[exit_index]).all()

        *kept, done = stage(0, thresholds, tensors, examples.hidden, None, ())
        decisions = [done]
        for index in range(1, len(self.exits)):

            def run(thresholds, done, *operands, index=index):
                tensors_of_layers, (hidden, logits, *state) = operands[: len(tensors)], operands[len(tensors) :]
                return stage(index, thresholds, tensors_of_layers, hidden, logits, tuple(state))

            def skip(thresholds, done, *operands):
                # A branch may not return an operand itself.
                return tuple(operand.clone() for operand in (*operands[len(tensors) :], done))

            *kept, done = torch.cond(done, skip, run, (thresholds, done, *tensors, *kept))
            decisions.append(done)
        if len(decisions) == 1:
            exit_index = torch.zeros_like(done, dtype=torch.int64)
        else:
            exit_index = sum((~done).long() for done in decisions[:-1])
        if len(self.exits) < self.model.num_exits:
            exit_index = torch.tensor(self.exits)[exit_index]
        return kept[1], exit_index.expand(kept[1].shape[0])


def _exits_of(model: EarlyExitMixin, policy: ExitPolicy) -> list[int]:
    """The exits of the graph: its caller may give other thresholds where the policy's are not `NEVER`."""
    thresholds = [threshold if threshold >= NEVER else -NEVER for threshold in policy.thresholds]
    return model.evaluated_exits(replace(policy, thresholds=thresholds))


def export_onnx(model: EarlyExitMixin, path: str | Path, dynamic: bool = True) -> None:
    """Write an early-exit model as one ONNX graph in float32, after checking it against PyTorch.

    Inputs of the graph: `pixel_values` (batch, channels, height, width), or those of `input_ids`, `attention_mask` and
    `token_type_ids` (batch, length), int64, that the model takes. Batch and length of texts may be of any size.

    Outputs of the dynamic graph: `logits` (batch, num_labels) and `exit_index` (batch,), int64, 0-based. The whole
    batch exits at the first exit where the scores of all rows reach the threshold: `exit_index` is the same for all
    rows, and all `logits` are from that exit. A further input, `thresholds` (num_exits,), is optional; its default is
    the thresholds of the model's policy. Exits that the policy never uses are not in the graph.

    Output of the graph that is not dynamic: `exit_logits` (batch, num_exits, num_labels).

    Policy, labels, exit layers and aggregation are in the metadata of the file. Weights beyond 2 GB go to a second
    file, `<path>.data`. The model is not changed.

    Args:
        model: an early-exit model.
        path: the file to write, ending in `.onnx`, in a folder that exists.
        dynamic: `True`: the batch exits by the model's policy; `False`: every exit is evaluated.

    Raises:
        ExitConfigurationError: the path cannot be written, the model has no policy or one exit, or a package is
            missing.
        ExportError: the answers of ONNX Runtime differ from those of PyTorch.

    Example:
        >>> een_hf.export_onnx(model, "model.onnx")
        >>> session = een_hf.inference.onnx.load_session("model.onnx")
        >>> logits, exit_index = session.run(None, dict(tokenizer(texts, return_tensors="np")))
    """
    path = Path(path)
    check_output(path)
    config, policy = model.config, None
    if dynamic:
        if config.exit_policy is None:
            raise ExitConfigurationError(
                "The model has no exit policy: set one with `een-hf calibrate RUN --target_cost 0.5 "
                "--save`, or give --no_dynamic for a graph of all exits."
            )
        if model.num_exits == 1:
            raise ExitConfigurationError("The model has one exit, nothing can be skipped: give --no_dynamic.")
        policy = model.get_exit_policy()
    model = copy.deepcopy(model).float().cpu().eval()
    # Its mask is finite, so that rows that consist of padding only do not become NaN.
    model.set_attn_implementation("eager")
    program = _export(model, policy)
    program.model.metadata_props.update(_metadata(model, policy))
    # In the same folder, so that the checked files can be moved into place by renaming.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
        written = Path(folder) / path.name
        program.save(written)
        del program
        _check(model, policy, written)
        for file in Path(folder).iterdir():
            os.replace(file, path.parent / file.name)


def check_output(path: Path) -> None:
    """Check that a graph can be written.

    Args:
        path: the file to write.

    Raises:
        ExitConfigurationError: `path` does not end in `.onnx` or its folder does not exist, or a package is missing.
    """
    if path.suffix != ".onnx":
        raise ExitConfigurationError(f"--output {path} must end in .onnx, for example {path.with_suffix('.onnx')}.")
    if not path.parent.is_dir():
        raise ExitConfigurationError(f"--output {path}: the folder {path.parent} does not exist; make it first.")
    if path.is_dir():
        raise ExitConfigurationError(f"--output {path} is a folder; name a file.")
    with named_extras():
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401


def _export(model: EarlyExitMixin, policy: ExitPolicy | None) -> "torch.onnx.ONNXProgram":
    inputs = _random_inputs(model, num_rows=3)
    axes = {0: torch.export.Dim("batch")}
    if "input_ids" in inputs:
        axes[1] = torch.export.Dim("length", max=model.config.max_input_length)
    # One dict instead of keywords: releases of torch disagree on how the shapes of keywords are named.
    graph, arguments, shapes = _AllExits(model), {"inputs": inputs}, {"inputs": dict.fromkeys(inputs, axes)}
    names = [*inputs]
    if policy is not None:
        graph = FirstSureExit(model, policy)
        names.append(THRESHOLDS)
        arguments[THRESHOLDS] = torch.tensor(policy.thresholds, dtype=torch.float32)
        shapes[THRESHOLDS] = None
    with torch.no_grad(), warnings.catch_warnings():
        # Two inputs share an axis name on purpose.
        warnings.filterwarnings("ignore", message=".*axis name.*")
        program = torch.onnx.export(
            graph.eval(),
            kwargs=arguments,
            dynamic_shapes=shapes,
            input_names=names,
            output_names=graph.output_names,
            dynamo=True,
            verbose=False,
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # they hold tracebacks with the paths of this machine
    if policy is not None:
        import onnx_ir

        # An input that is also an initializer is optional: this is its default.
        value = next(value for value in program.model.graph.inputs if value.name == THRESHOLDS)
        value.const_value = onnx_ir.tensor(arguments[THRESHOLDS].numpy(), name=THRESHOLDS)
        program.model.graph.register_initializer(value)
    return program


def _metadata(model: EarlyExitMixin, policy: ExitPolicy | None) -> dict[str, str]:
    config = model.config
    content = {
        "exit_layers": config.exit_layers,
        "exit_aggregation": config.exit_aggregation,
        "exit_policy": policy and policy.to_dict(),
        "labels": [config.id2label[index] for index in range(config.num_labels)],
        "problem_type": config.problem_type,
    }
    return {name: json.dumps(value) for name, value in content.items()}


def _random_inputs(model: EarlyExitMixin, num_rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random pixels, or random tokens with rows of different lengths."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(num_rows, config.num_channels, height, width, generator=generator)}
    length = min(13 + seed, config.max_input_length or 13 + seed)
    shape = (num_rows, length)
    ends = torch.randint(1, length + 1, (num_rows, 1), generator=generator)
    ends[0] = length
    inputs = {
        "input_ids": torch.randint(config.vocab_size, shape, generator=generator),
        "attention_mask": (torch.arange(length) < ends).long(),
    }
    if "token_type_ids" in inspect.signature(model.forward).parameters and config.type_vocab_size:
        inputs["token_type_ids"] = torch.randint(config.type_vocab_size, shape, generator=generator)
    return inputs


@torch.no_grad()
def _check(model: EarlyExitMixin, policy: ExitPolicy | None, path: Path) -> None:
    """Compare the file's logits at every exit, and where it exits, with the model's.

    Raises:
        ExportError: logits differ by more than `TOLERANCE`, or a batch exits elsewhere.
    """
    session = load_session(path)
    every = range(model.num_exits)
    exits = [*every] if policy is None else _exits_of(model, policy)
    forced = [[-NEVER if index == exit_index else NEVER for index in every] for exit_index in exits]
    feeds, answers = [], []
    for seed, num_rows in enumerate((5, 1, 1, 1, 1, 2)):
        inputs = _random_inputs(model, num_rows, seed)
        feeds.append({name: tensor.numpy() for name, tensor in inputs.items()})
        if policy is None:
            found = session.run(None, feeds[-1])[0]
        else:
            runs = [session.run(["logits"], {**feeds[-1], THRESHOLDS: np.float32(row)})[0] for row in forced]
            found = np.stack(runs, 1)
        answers.append(torch.from_numpy(found))
        wanted = model(**inputs, early_exit=False).exit_logits
        difference = float((answers[-1] - wanted[:, exits]).abs().max())
        if not difference <= TOLERANCE:
            raise ExportError(
                f"ONNX Runtime's logits differ from PyTorch's by {difference:.2g}, more than {TOLERANCE:g}: "
                "nothing is written."
            )
    if policy is None:
        return
    # Decisions are computed from the graph's own logits: PyTorch's may round to the other side of a threshold.
    rule = replace(
        policy,
        thresholds=[policy.thresholds[index] for index in exits],
        temperatures=policy.temperatures and [policy.temperatures[index] for index in exits],
    )
    lowest = np.stack([rule.scores(exit_logits).amin(0).numpy() for exit_logits in answers])
    between = replace(rule, thresholds=np.median(lowest, 0).tolist())
    others = np.full(model.num_exits, NEVER, np.float32)
    others[exits] = between.thresholds
    for feed, exit_logits in zip(feeds, answers, strict=True):
        for chosen, given in ((rule, {}), (between, {THRESHOLDS: others})):
            found, wanted = session.run(["exit_index"], feed | given)[0], exits[whole_batch_exit(chosen, exit_logits)]
            if (found != wanted).any():
                raise ExportError(
                    f"ONNX Runtime exits at exit {found[0] + 1}, PyTorch at exit {wanted + 1}: nothing is written."
                )


def whole_batch_exit(policy: ExitPolicy, exit_logits: torch.Tensor) -> int:
    """The first exit at which all rows of a batch exit.

    Args:
        policy: the exit policy.
        exit_logits: (batch, num_exits, num_labels).

    Returns:
        0-based exit; the last one if the rows do not agree on an earlier one.
    """
    reached = (policy.scores(exit_logits) >= torch.tensor(policy.thresholds)).all(0)
    reached[-1] = True
    return int(reached.int().argmax())


def load_session(path: str | Path) -> "onnxruntime.InferenceSession":  # noqa: F821
    """A session of ONNX Runtime on the CPU, without its warning that thresholds may be given.

    Args:
        path: an exported graph.

    Returns:
        the session.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
