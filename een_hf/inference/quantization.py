"""Exported graphs in int8, quantized by ONNX Runtime.

Weights of matrix products are int8 with one scale for each column, embedding tables are uint8, and activations are
quantized to uint8 at run time, with one scale for each tensor. Weights use 7 of the 8 bits: with 8 bits, products
overflow on processors without int8 instructions, and the answers of a graph would differ there.

The examples of a batch share the scale of their activations, so that the answer for an example depends a little on the
other examples and on padding. Calibration and its guarantee apply to examples that run one at a time, without padding.
An input that is not finite gets a finite answer, and changes the other answers of its batch: check inputs before.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import ExportError, check_seed
from ..models import ExitConfigurationError, ExitPolicy


FORMATS = ("int8",)
REFERENCE = "last exit in float32"
UNCALIBRATED = (
    "The thresholds of the int8 graph were calibrated for the model in its own precision. The logits of the graph "
    "differ from the model's, so that examples may exit elsewhere, and no guarantee holds. Calibrate the graph: give "
    "--calibration_file with --max_risk or --target_cost (in Python: calibration)."
)


@dataclass
class GraphCalibration:
    """How the exit policy of an int8 graph is chosen: on rows that run one at a time, without labels.

    Answers of the graph are compared with those of the float32 model's last exit.

    Args:
        rows: rows, as for `predict`.
        tokenizer: tokenizer of the rows if they are texts, as for `predict`.
        target_cost: choose the policy that agrees most often at this average relative cost.
        max_risk: or choose the cheapest policy certified to answer differently on at most this share of new rows.
        risk_confidence: confidence of the certificate.
        exit_criterion: name of a criterion; default: that of the model's policy, else `confidence`.
        seed: seed of the split into rows that search and rows that certify.

    Raises:
        ExitConfigurationError: both or none of `target_cost` and `max_risk`, or a value out of range.

    Example:
        >>> from functools import partial
        >>> new = een_hf.GraphCalibration(texts, partial(tokenizer, truncation=True), max_risk=0.05)
        >>> een_hf.export_onnx(model, "model.onnx", quantize="int8", calibration=new)
    """

    rows: Iterable
    tokenizer: Callable | None = None
    target_cost: float | None = None
    max_risk: float | None = None
    risk_confidence: float = 0.9
    exit_criterion: str | None = None
    seed: int = 42

    def __post_init__(self):
        if (self.target_cost is None) == (self.max_risk is None):
            raise ExitConfigurationError("Calibration rows need a target: give either --target_cost or --max_risk.")
        for name in ("max_risk", "risk_confidence"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ExitConfigurationError(f"--{name} must lie between 0 and 1, not {value}.")
        check_seed(self.seed, bits=64)


@dataclass
class CalibratedGraph:
    """What calibration found for an int8 graph.

    Args:
        policy: policy of the graph; its guarantee, if any, applies to the graph as it was written.
        num_rows: number of calibration rows.
        relative_cost: average cost of the graph on these rows, as a share of the plain model's operations.
        exit_fractions: share of these rows at each exit.
        agreement: share of these rows that the graph answers as the float32 model's last exit; `None` for regression.
    """

    policy: ExitPolicy
    num_rows: int
    relative_cost: float
    exit_fractions: list[float]
    agreement: float | None


def check_quantization(quantize: str | None, dynamic: bool, calibrated: bool) -> None:
    """Raise an error for settings of an export that cannot be combined.

    Args:
        quantize: the format.
        dynamic: whether examples exit early.
        calibrated: whether there are calibration rows.

    Raises:
        ExitConfigurationError: an unknown format, or calibration rows for a graph that uses none.
    """
    if quantize not in (None, *FORMATS):
        raise ExitConfigurationError(f"--quantize {quantize!r} is not one of: {', '.join(FORMATS)}.")
    if calibrated and not quantize:
        raise ExitConfigurationError(
            "--calibration_file calibrates an int8 graph: give --quantize int8. A float32 graph answers as the model "
            "does, whose policy `een-hf calibrate` sets."
        )
    if calibrated and not dynamic:
        raise ExitConfigurationError("--calibration_file: a graph of all exits (--no_dynamic) has no policy.")


def quantize_graph(path: Path, thresholds: str) -> None:
    """Quantize a float32 graph to int8, including the branches of its `If` nodes.

    Args:
        path: the file, which is replaced.
        thresholds: name of an input whose default stays in float32.

    Raises:
        ExportError: ONNX Runtime left a stage in float32.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(path)
    # A decision reads its threshold by a `Gather`, as an embedding does: the thresholds would be quantized too.
    default = [tensor for tensor in graph.graph.initializer if tensor.name == thresholds]
    for tensor in default:
        graph.graph.initializer.remove(tensor)
    Path(f"{path}.data").unlink(missing_ok=True)
    with quiet_loggers():
        quantize_dynamic(
            graph,
            path,
            op_types_to_quantize=["Gather", "MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            extra_options={"EnableSubgraph": True},
        )
    graph = onnx.load(path)
    graph.graph.initializer.extend(default)
    stages = [[graph.graph]] + [
        [attribute.g for attribute in node.attribute] for node in graph.graph.node if node.op_type == "If"
    ]
    for branches in stages:
        if not any(node.op_type == "MatMulInteger" for branch in branches for node in branch.node):
            raise ExportError("ONNX Runtime left a stage of the graph in float32: nothing is written.")
    onnx.save(graph, path)


def graph_record(
    name: str, quantize: str, policy: ExitPolicy | None, found: CalibratedGraph | None
) -> dict[str, object]:
    """The content of the JSON file of a quantized graph.

    Args:
        name: name of the graph's file.
        quantize: the format.
        policy: policy of the graph.
        found: result of the calibration, if any.

    Returns:
        a dictionary of JSON values.
    """
    about = f"The policy and the guarantee are those of the {quantize} graph, not of the model from which it was made."
    calibration = None
    if found is not None:
        calibration = {"reference": REFERENCE, **asdict(found)}
        del calibration["policy"]
    return {
        "graph": name,
        "quantize": quantize,
        "about": UNCALIBRATED if policy and found is None else about,
        "exit_policy": policy and policy.to_dict(),
        "calibration": calibration,
    }


@contextmanager
def quiet_loggers() -> Iterator[None]:
    """Suppress warnings of the exporter and of the quantizer, which would also configure the root logger.

    Yields:
        once, while no logger shows messages below errors.
    """
    root, handler, disabled = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(handler)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.removeHandler(handler)
