"""Export of an early-exit model as one ONNX graph.

In the dynamic graph every stage after the first (its layers, its exit and the decision) is a branch of an `If`. It
gathers the rows that have not exited and writes their answers back; ONNX Runtime does not run it after all have. So
each row exits where it does in PyTorch, whatever the batch.
"""

import copy
import json
import os
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from ..errors import ExportError, loading
from ..extras import named_extras
from ..models import EarlyExitMixin, ExitConfigurationError, ExitPolicy
from ..models.criteria import decide
from ..models.policies import NEVER
from ..models.stages import Examples
from .quantization import (
    UNCALIBRATED,
    CalibratedGraph,
    GraphCalibration,
    check_quantization,
    graph_record,
    quantize_graph,
    quiet_loggers,
)
from .runner import input_names


logger = logging.get_logger(__name__)
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


class DynamicExits(nn.Module):
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
        # Where padding is not known, transformers makes the mask, with constants that fail in branches of torch 2.11.
        examples = replace(self.model.embed(**inputs), padded=True)
        beside = replace(examples, hidden=None)
        fixed = beside.tensors()  # what no stage changes
        found = self._stage(0, thresholds, examples)
        for number in range(1, len(self.exits)):
            kept = 2 if number == len(self.exits) - 1 else len(found)  # behind the last exit nothing but answers

            def run(thresholds, *operands, number=number, kept=kept):
                _, _, exits, *_ = before = operands[len(fixed) :]
                rows = self.continuing(exits)
                selected = iter([operand.index_select(0, rows) for operand in operands])
                examples = beside.map(lambda _: next(selected))
                logits, _, _, hidden, *state = selected
                examples = replace(examples, hidden=hidden, logits=logits, state=tuple(state))
                after = self._stage(number, thresholds, examples)
                return tuple(old.index_copy(0, rows, new) for old, new in zip(before, after[:kept], strict=False))

            def skip(thresholds, *operands, kept=kept):
                # A branch may not return an operand itself.
                return tuple(operand.clone() for operand in operands[len(fixed) :][:kept])

            found = torch.cond(found[2].all(), skip, run, (thresholds, *fixed, *found))
        return found[0], found[1]

    def continuing(self, exits: torch.Tensor) -> torch.Tensor:
        """The rows that continue.

        Args:
            exits: (batch,) bool, the rows that exit: not all of them.

        Returns:
            0-based numbers of the rows, int64.
        """
        rows = (~exits).nonzero().squeeze(1)
        torch._check(rows.shape[0] >= 1)
        return rows

    def _stage(self, number: int, thresholds: torch.Tensor, examples: Examples) -> tuple[torch.Tensor, ...]:
        """Logits, exit and whether it is taken, hidden states and the criterion's state, of each row after a stage."""
        exit_index, after = self.exits[number], self.exits[number - 1] if number else -1
        context = self.model.make_context(examples)
        hidden, logits = self.model.run_stage(exit_index, examples, context, examples.logits, after)
        temperature = self.temperatures[exit_index] if self.temperatures else None
        exits, state = decide(self.criterion, logits, examples.state, thresholds[exit_index], temperature)
        # A view of the logits, as a regression keeps it, may not be returned beside them.
        state = [tensor.clone() for tensor in state]
        return logits, torch.full_like(exits, exit_index, dtype=torch.int64), exits, hidden, *state


def _exits_of(model: EarlyExitMixin, policy: ExitPolicy) -> list[int]:
    """The exits of the graph: its caller may give other thresholds where the policy's are not `NEVER`."""
    thresholds = [threshold if threshold >= NEVER else -NEVER for threshold in policy.thresholds]
    return model.evaluated_exits(replace(policy, thresholds=thresholds))


def export_onnx(
    model: EarlyExitMixin,
    path: str | Path,
    dynamic: bool = True,
    *,
    quantize: str | None = None,
    calibration: GraphCalibration | None = None,
) -> CalibratedGraph | None:
    """Write an early-exit model as one ONNX graph, checked against PyTorch, in float32 or quantized to int8.

    Inputs of the graph: `pixel_values` (batch, channels, height, width), or those of `input_ids`, `attention_mask` and
    `token_type_ids` (batch, length), int64, that the model takes. Batch and length of texts may be of any size.

    Outputs of the dynamic graph: `logits` (batch, num_labels) and `exit_index` (batch,), int64, 0-based. Each row
    exits where it does in PyTorch, and the layers after its exit are not computed for it. A further input,
    `thresholds` (num_exits,), is optional; its default is the thresholds of the model's policy. Exits that the policy
    never uses are not in the graph.

    Output of the graph that is not dynamic: `exit_logits` (batch, num_exits, num_labels).

    Policy, labels, exit layers and aggregation are in the metadata of the file. Weights beyond 2 GB go to a second
    file, `<path>.data`. The model is not changed.

    An int8 graph takes a quarter of the space. Its logits differ from the model's, so that the thresholds,
    temperatures and guarantee of the model do not fit the graph: `calibration` finds a policy on the logits of the
    graph. Without it, the graph keeps the model's thresholds and temperatures but no guarantee, and a warning says so.
    `<path>.json` contains the policy of an int8 graph and the result of calibration.

    Args:
        model: an early-exit model.
        path: the file to write, ending in `.onnx`, in a folder that exists.
        dynamic: `True`: every row exits by the model's policy; `False`: every exit is evaluated.
        quantize: `int8`; by default the graph is in float32.
        calibration: for a dynamic graph in int8: rows, and the largest cost or risk.

    Returns:
        what calibration found, or `None` without calibration.

    Raises:
        ExitConfigurationError: the path cannot be written, the model has no policy or one exit, a package is missing,
            or `quantize` or `calibration` do not fit.
        ExportError: the answers of ONNX Runtime differ from those of PyTorch, or no policy of the int8 graph can be
            certified.

    Example:
        >>> een_hf.export_onnx(model, "model.onnx")
        >>> session = een_hf.inference.onnx.load_session("model.onnx")
        >>> logits, exit_index = session.run(None, dict(tokenizer(texts, return_tensors="np")))
        >>> from functools import partial
        >>> new = een_hf.GraphCalibration(texts, partial(tokenizer, truncation=True), max_risk=0.05)
        >>> print(een_hf.export_onnx(model, "small.onnx", quantize="int8", calibration=new).agreement)
    """
    path = Path(path)
    check_output(path)
    check_quantization(quantize, dynamic, calibrated=calibration is not None)
    policy = None
    if dynamic:
        if model.config.exit_policy is None and calibration is None:
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
    found = None
    # In the same folder, so that the checked files can be moved into place by renaming.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
        written = Path(folder) / path.name
        if calibration is not None:
            from .graph_calibration import GraphCalibrator  # needs packages that an export without it does not

            calibrator = GraphCalibrator(calibration, model)
            _write(model, None, written, quantize)
            policy = calibrator.choose(load_session(written))
        elif policy is not None and quantize:
            logger.warning(UNCALIBRATED)
            about = {**policy.calibrated_for, "no_guarantee": UNCALIBRATED}
            policy = replace(policy, guarantee=None, calibrated_for=about)
        _write(model, policy, written, quantize)
        if calibration is not None:
            found = calibrator.measure(load_session(written), policy)
            policy = found.policy
        _set_metadata(written, _metadata(model, policy, quantize))
        if quantize:
            record = graph_record(path.name, quantize, policy, found)
            Path(f"{written}.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
        else:
            path.with_name(f"{path.name}.json").unlink(missing_ok=True)  # of a graph that was here before
        for file in Path(folder).iterdir():
            os.replace(file, path.parent / file.name)
    return found


def _write(model: EarlyExitMixin, policy: ExitPolicy | None, path: Path, quantize: str | None) -> None:
    """Write a graph in float32, without a policy that of all exits, check it against the model, and quantize it."""
    _export(model, policy).save(path)
    _check(model, policy, path)
    if quantize:
        quantize_graph(path, THRESHOLDS)


def _set_metadata(path: Path, content: dict[str, str]) -> None:
    import onnx

    graph = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(graph, content)
    onnx.save(graph, path)


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
        graph = DynamicExits(model, policy)
        names.append(THRESHOLDS)
        arguments[THRESHOLDS] = torch.tensor(policy.thresholds, dtype=torch.float32)
        shapes[THRESHOLDS] = None
    with torch.no_grad(), quiet_loggers(), warnings.catch_warnings():
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


def _metadata(model: EarlyExitMixin, policy: ExitPolicy | None, quantize: str | None) -> dict[str, str]:
    config = model.config
    content = {
        "quantize": quantize,
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
    if "token_type_ids" in input_names(model) and config.type_vocab_size:
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
    scores = rule.scores(torch.cat(answers))
    between = replace(rule, thresholds=scores.quantile(0.45, 0, interpolation="midpoint").tolist())
    # As may the graph's own, in a batch of fewer rows.
    margin = TOLERANCE if policy.scorer.scores_probabilities else 0.0
    others = np.full(model.num_exits, NEVER, np.float32)
    others[exits] = between.thresholds
    for feed, exit_logits in zip(feeds, answers, strict=True):
        for chosen, given in ((rule, {}), (between, {THRESHOLDS: others})):
            logits, exit_index = session.run(None, feed | given)
            taken = chosen.exits_of(exit_logits)
            near = (chosen.scores(exit_logits) - torch.tensor(chosen.thresholds)).abs() < margin
            wanted = np.array(exits)[taken]
            if elsewhere := np.flatnonzero((exit_index != wanted) & ~near.any(1).numpy()).tolist():
                row = elsewhere[0]
                raise ExportError(
                    f"ONNX Runtime exits at exit {exit_index[row] + 1}, PyTorch at exit {wanted[row] + 1}: nothing is "
                    "written."
                )
            same = exit_index == wanted
            answered = exit_logits[torch.arange(len(taken)), taken].numpy()
            if not (np.abs(logits - answered)[same] <= TOLERANCE).all():
                raise ExportError("ONNX Runtime answers with the logits of another exit or row: nothing is written.")


def load_session(path: str | Path) -> "onnxruntime.InferenceSession":  # noqa: F821
    """A session of ONNX Runtime on the CPU, without its warning that thresholds may be given.

    Args:
        path: an exported graph.

    Returns:
        the session.

    Raises:
        ExitConfigurationError: there is no such file, or it is damaged.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with loading(f"The graph {path}"):
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
