"""Make a fine-tuned classifier of texts or images cheaper, without labels.

een-hf retrofit my-finetuned-bert --train_file texts.csv --max_risk 0.02 --output_dir cheaper
een-hf retrofit my-finetuned-vit --train_dir images/ --max_risk 0.02 --output_dir cheaper

Exits before the last layer learn to predict what the model itself predicts. Then a policy is certified on other rows:
with the given confidence, the answers differ from the model's on at most --max_risk of new rows of the same kind. Give
rows that the model was not fine-tuned on, since it is more confident on those than on new rows. The weights of the
model do not change.

The model runs once on every row. The inputs of the exits are stored in OUTPUT_DIR/features, in chunks: a run that was
interrupted continues from there, and so does one with another risk, confidence, criterion or number of epochs. The
folder may be deleted afterwards.
"""

from ..retrofitting import RetrofitArguments, retrofit
from ..retrofitting.arguments import RECORD_FILE
from ..training.arguments import CalibrationArguments, ModelArguments
from .flags import add_flags, add_row_flags


def add_arguments(parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Folder or Hub name of a fine-tuned classifier.")
    data = parser.add_argument_group("data (new to the model; no labels are read)")
    data.add_argument("--train_file", help="Texts: csv, json, jsonl or parquet file.")
    data.add_argument("--train_dir", help="Images: folder of image files, including sub-folders.")
    add_row_flags(data)
    data.add_argument("--tokenizer_name", help="Folder or Hub name. Default: the model's own.")
    data.add_argument("--max_train_samples", type=int, help="Use only the first N rows.")
    risk = parser.add_argument_group("risk")
    add_flags(risk, CalibrationArguments, ["max_risk"], max_risk=RetrofitArguments.max_risk)
    risk.add_argument("--risk", choices=["consistency"], default="consistency", help="The risk that needs no labels.")
    add_flags(risk, CalibrationArguments, ["risk_confidence", "exit_criterion"])
    risk.add_argument(
        "--calibration_share",
        type=float,
        help="Share of the rows that certify the policy instead of training exits. Default: a third, or what the risk "
        "needs.",
    )
    add_flags(risk, CalibrationArguments, ["cost", "latency_batch_size"])
    exits = parser.add_argument_group("exits")
    add_flags(exits, ModelArguments, ["exit_layers", "exit_pooling", "exit_head"])
    exits.add_argument("--num_train_epochs", type=int, default=20, help="Epochs of the exits. Default: 20.")
    exits.add_argument(
        "--head_learning_rate", type=float, default=1e-3, help="Learning rate (AdamW, cosine to zero). Default: 0.001."
    )
    exits.add_argument("--train_batch_size", type=int, default=32, help="Rows per step of the exits. Default: 32.")
    where = parser.add_argument_group("running")
    where.add_argument("--output_dir", required=True, help="Folder of the cheaper model.")
    where.add_argument("--batch_size", type=int, default=32, help="Rows per pass of the model. Default: 32.")
    where.add_argument("--no_cuda_graphs", action="store_true", help="On CUDA, measure without captured programs.")
    where.add_argument("--chunk_size", type=int, default=512, help="Rows per file of features. Default: 512.")
    where.add_argument(
        "--feature_dtype", choices=["float32", "float16"], default="float32", help="Precision of the features on disk."
    )
    where.add_argument(
        "--speed_samples", type=int, default=256, help="Rows whose time is measured; 0: none. Default: 256."
    )
    where.add_argument(
        "--seed",
        type=int,
        default=42,
        help="Seed of training and of the choice of the rows that certify. Default: 42.",
    )


def run(args) -> None:
    report = retrofit(**vars(args))
    if report.columns:
        print(f"Columns read: {', '.join(report.columns)}")
    print(report.message)
    processor = "tokenizer" if report.columns else "image processor"
    print(f"Model, {processor} and {RECORD_FILE}: {report.args.output_dir}")
    print(report.summary)
