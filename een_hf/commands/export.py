"""Write an early-exit model as one ONNX graph in which ONNX Runtime skips the layers after the exit.

een-hf export runs/mine --output model.onnx                every example exits by the model's policy
een-hf export runs/mine --output model.onnx --no_dynamic   every exit is evaluated
een-hf export runs/mine --output small.onnx --quantize int8 --calibration_file texts.csv --max_risk 0.05

Inputs, of any batch size and length: input_ids, attention_mask, token_type_ids (BERT), pixel_values (ViT).
Outputs: logits (batch, labels) and exit_index (batch), counted from 0; with --no_dynamic exit_logits (batch, exits,
labels).

Every example exits as in PyTorch, whatever the batch; the layers after its exit are not computed for it. A further
input, `thresholds` (exits), is optional: its default is the thresholds of the policy.

--quantize int8 makes the file four times smaller. The int8 graph answers and exits a little differently, so that it
needs a policy of its own: rows of --calibration_file, which need no labels, run through it one at a time and are
compared with the last exit of the model in float32. With --max_risk, answers differ on at most this share of new rows
like these, with the given confidence. Give rows that the model was not trained on. The policy and its guarantee are in
<output>.json too.

Policy, labels and exit layers are in the file's metadata. Before it is written, the answers of the float32 graph are
compared with PyTorch's on random inputs. Every criterion can be exported.
"""

from dataclasses import replace
from pathlib import Path

from ..hub import guarantee_in_words
from ..inference.loading import load_early_exit_model
from ..inference.onnx import check_output, export_onnx
from ..inference.quantization import FORMATS, GraphCalibration, check_quantization
from ..models import ExitConfigurationError
from ..models.criteria import find_criterion
from .flags import add_row_flags


def add_arguments(parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Folder or Hub name of an early-exit model.")
    parser.add_argument("--output", required=True, help="File to write, ending in .onnx.")
    parser.add_argument("--no_dynamic", action="store_true", help="Write a graph that evaluates every exit.")
    parser.add_argument("--quantize", choices=FORMATS, help="Weights of 8 bits. Default: float32.")
    rows = parser.add_argument_group("calibration of the int8 graph (no labels are read)")
    rows.add_argument("--calibration_file", help="Texts: csv, json, jsonl or parquet file; images: folder.")
    rows.add_argument("--target_cost", type=float, help="The policy that agrees most at this average relative cost.")
    rows.add_argument("--max_risk", type=float, help="The cheapest policy certified to differ on at most this share.")
    rows.add_argument(
        "--risk_confidence", type=float, default=0.9, help="Probability with which --max_risk holds. Default: 0.9."
    )
    rows.add_argument(
        "--exit_criterion",
        help="Score that decides whether an example exits. Default: that of the model's policy, else confidence.",
    )
    add_row_flags(rows)
    rows.add_argument("--seed", type=int, default=42, help="Seed of the choice of the rows that certify. Default: 42.")


def run(args) -> None:
    path = Path(args.output)
    check_output(path)
    check_quantization(args.quantize, not args.no_dynamic, calibrated=args.calibration_file is not None)
    calibration = None
    if args.calibration_file is not None:
        names = ("target_cost", "max_risk", "risk_confidence", "seed")
        calibration = GraphCalibration(
            [],
            exit_criterion=args.exit_criterion and find_criterion(args.exit_criterion),
            **{name: getattr(args, name) for name in names},
        )
    elif args.target_cost is not None or args.max_risk is not None:
        raise ExitConfigurationError(
            "--target_cost and --max_risk choose a policy of the int8 graph on rows: give --calibration_file too."
        )
    model = load_early_exit_model(args.model, device="cpu")
    if calibration is not None:
        calibration = replace(calibration, rows=_read_rows(args, model))
    found = export_onnx(model, path, not args.no_dynamic, quantize=args.quantize, calibration=calibration)
    size = sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists())
    policy = found.policy if found else model.get_exit_policy()
    what = "answers at every exit" if args.no_dynamic else f"exits by {policy.criterion}"
    print(f"Written: {path}, {size / 2**20:.1f} MiB, {what}; in float32 it agrees with PyTorch on random inputs.")
    if found:
        print(
            f"The {args.quantize} graph on {found.num_rows} calibration rows, one at a time: relative cost "
            f"{found.relative_cost:.4f}"
            + ("." if found.agreement is None else f", {found.agreement:.4f} answered as by the last exit in float32.")
        )
        if policy.guarantee:
            print(guarantee_in_words(policy.guarantee))


def _read_rows(args, model):
    """The calibration rows as the model reads them."""
    # Reading of files needs packages that an export without rows does not.
    from ..retrofitting.arguments import RowArguments
    from ..retrofitting.rows import TextRows, UnlabelledImages, refuse_training_rows
    from ..training.history import history_of

    class CalibrationRows(RowArguments):
        file_flag = dir_flag = "--calibration_file"

    text = model.main_input_name == "input_ids"
    names = ("model", "text_column_names", "max_seq_length", "skip_empty", "skip_corrupt")
    given = {name: getattr(args, name) for name in names}
    wanted = CalibrationRows(**given, **{"train_file" if text else "train_dir": args.calibration_file})
    refuse_training_rows(wanted, history_of(args.model, has_head=True))
    return (TextRows if text else UnlabelledImages)(wanted, model.config)
