"""Write an early-exit model as one ONNX graph in which ONNX Runtime skips the layers after the exit.

een-hf export runs/mine --output model.onnx                every example exits by the model's policy
een-hf export runs/mine --output model.onnx --no_dynamic   every exit is evaluated

Inputs, of any batch size and length: input_ids, attention_mask, token_type_ids (BERT), pixel_values (ViT).
Outputs: logits (batch, labels) and exit_index (batch), counted from 0; with --no_dynamic exit_logits (batch, exits,
labels).

Every example exits as in PyTorch, whatever the batch; the layers after its exit are not computed for it. A further
input, `thresholds` (exits), is optional: its default is the thresholds of the policy.

Policy, labels and exit layers are in the file's metadata. Before it is written, its answers are compared with
PyTorch's on random inputs. Every criterion can be exported.
"""

from pathlib import Path

from ..inference.loading import load_early_exit_model
from ..inference.onnx import check_output, export_onnx


def add_arguments(parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name of an early-exit model")
    parser.add_argument("--output", required=True, help="file to write, ending in .onnx")
    parser.add_argument("--no_dynamic", action="store_true", help="write a graph that evaluates every exit")


def run(args) -> None:
    path = Path(args.output)
    check_output(path)
    model = load_early_exit_model(args.model, device="cpu")
    export_onnx(model, path, dynamic=not args.no_dynamic)
    size = sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists())
    policy = "answers at every exit" if args.no_dynamic else f"exits by {model.config.exit_policy['criterion']}"
    print(f"Written: {path}, {size / 2**20:.1f} MiB, {policy}; ONNX Runtime and PyTorch agree on random inputs.")
