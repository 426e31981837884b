"""Make a fine-tuned classifier of text or images cheaper, without labels.

een-hf retrofit my-finetuned-bert --train_file texts.csv --max_risk 0.02 --output_dir cheaper
een-hf retrofit my-finetuned-vit --train_dir images/ --max_risk 0.02 --output_dir cheaper

Exits before the last layer learn what the model itself answers; a policy is certified on rows that they did not learn
from: with the given confidence, the answers differ from the model's on at most --max_risk of new rows like these. Give
rows that the model was not fine-tuned on: it is surer of those than of new ones. The model's own weights stay as they
are, to the bit.

The model reads every row once. What the exits read of it is kept in OUTPUT_DIR/features, in chunks: a run that was
interrupted goes on from there, and so does one with another risk, confidence, criterion or number of epochs. The
folder may be deleted afterwards.
"""

import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, PreTrainedConfig, set_seed
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..calibration import calibrate, rows_needed
from ..data.decoding import decode_image, whole_images
from ..data.samples import model_source
from ..data.sources import limit_rows, load_files
from ..data.task import DataError, TaskData
from ..data.text import TEXT, encode_text_data
from ..data.text_arguments import TextDataArguments
from ..data.text_rows import prepare_rows, text_columns
from ..data.transforms import EvaluationTransform
from ..errors import is_full_disk, loading
from ..evaluation import (
    cost_inputs,
    measure_seconds,
    relative_costs,
    relative_latencies,
    save_exit_logits,
    stock_model,
    text_functions,
)
from ..evaluation.results import LOGITS_NAME, _replacing
from ..hub import public_settings
from ..inference import pad_rows, predict
from ..models import ExitConfigurationError
from ..models.auto import model_class_of
from ..models.configuration_een import is_classifier
from ..models.exits import find_exit_head, find_pooling
from ..models.policies import find_criterion, get_criterion
from ..training.arguments import CalibrationArguments, CostUnit
from ..training.history import RUN_FILE, history_of, only_run_in, trained_on, write_run


RECORD_NAME, FEATURES_NAME = "retrofit.json", "features"
SINGLE_LABEL = "single_label_classification"


def add_arguments(parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name of a fine-tuned classifier")
    data = parser.add_argument_group("data (new to the model; no labels are read)")
    data.add_argument("--train_file", help="text: csv, json, jsonl or parquet file")
    data.add_argument("--train_dir", help="images: folder of image files, sub-folders included")
    data.add_argument("--skip_corrupt", action="store_true", help="leave out images that cannot be decoded")
    data.add_argument(
        "--text_column_names", nargs="+", help="one text column, or two for pairs; default: the only one"
    )
    data.add_argument("--skip_empty", action="store_true", help="leave out rows without text")
    data.add_argument("--tokenizer_name", help="folder or Hub name; default: the model's own")
    data.add_argument("--max_seq_length", type=int, default=128, help="texts are cut to this length; default: 128")
    data.add_argument("--max_train_samples", type=int, help="take only the first N rows")
    risk = parser.add_argument_group("risk")
    risk.add_argument("--max_risk", type=float, default=0.02, help="share of answers that may differ; default: 0.02")
    risk.add_argument("--risk", choices=["consistency"], default="consistency", help="the risk that needs no labels")
    risk.add_argument("--risk_confidence", type=float, default=0.9, help="of --max_risk; default: 0.9")
    risk.add_argument(
        "--exit_criterion",
        default="confidence",
        help="confidence (default), entropy, margin, patience, vote or package.module:Class",
    )
    risk.add_argument(
        "--calibration_share",
        type=float,
        help="share of the rows that certify instead of training exits; default: a third, or what the risk needs",
    )
    risk.add_argument(
        "--cost",
        choices=[unit.value for unit in CostUnit],
        default=CostUnit.OPERATIONS.value,
        help="of an exit: operations (default) or latency, measured here",
    )
    risk.add_argument(
        "--latency_batch_size", type=int, default=1, help="rows that run together where --cost latency measures"
    )
    exits = parser.add_argument_group("exits")
    exits.add_argument("--exit_layers", type=int, nargs="+", help="1-based layers with an exit; default: every layer")
    exits.add_argument(
        "--exit_pooling",
        help="what an exit reads: cls, mean, cls_mean or package.module:function; default: mean (text), cls_mean "
        "(images)",
    )
    exits.add_argument(
        "--exit_head", help="pooler, norm, norm_pooler or package.module:Class; default: the architecture's"
    )
    exits.add_argument("--num_train_epochs", type=int, default=20, help="of the exits, which is cheap; default: 20")
    exits.add_argument("--head_learning_rate", type=float, default=1e-3, help="AdamW, to zero; default: 0.001")
    exits.add_argument("--train_batch_size", type=int, default=32, help="rows per step of the exits; default: 32")
    where = parser.add_argument_group("running")
    where.add_argument("--output_dir", required=True, help="folder of the cheaper model")
    where.add_argument("--batch_size", type=int, default=32, help="rows per pass of the model; default: 32")
    where.add_argument("--no_cuda_graphs", action="store_true", help="on CUDA, time without captured programs")
    where.add_argument("--chunk_size", type=int, default=512, help="rows per file of features; default: 512")
    where.add_argument("--feature_dtype", choices=["float32", "float16"], default="float32", help="on disk")
    where.add_argument("--speed_samples", type=int, default=256, help="rows that are timed, 0 for none; default: 256")
    where.add_argument("--seed", type=int, default=42, help="of the exits and of the rows that certify; default: 42")


def run(args) -> None:
    check_arguments(args)
    with only_run_in(args.output_dir):
        _run(args)


def _run(args) -> None:
    set_seed(args.seed)
    model, history = load_model(args), history_of(args.model, has_head=True)
    if trained_on(args.train_file or args.train_dir, history):
        raise DataError(
            f"--train_file or --train_dir {args.train_file or args.train_dir}: MODEL was trained on these rows and is "
            "surer of them than of new ones, so they certify nothing: give others."
        )
    rows = (TextRows if args.train_file else ImageRows)(args, model.config)
    calibration_rows = split_rows(len(rows), args)
    folder = Path(args.output_dir)

    features, teacher_logits = compute_features(model, rows, args)
    training_rows = np.setdiff1d(np.arange(len(rows)), calibration_rows)
    train_heads(model, features[training_rows], teacher_logits[training_rows], args)
    exit_logits = logits_of_features(model, features[calibration_rows], teacher_logits[calibration_rows])
    costs, latency = relative_costs(model, **rows.cost_inputs(calibration_rows)), None
    if args.cost == CostUnit.LATENCY.value:
        settings = {"batch_size": args.latency_batch_size, "criterion": args.exit_criterion}
        costs, latency = relative_latencies(model, **settings, **rows.cost_inputs(calibration_rows))
    report = calibrate(
        exit_logits,
        None,
        costs,
        criterion=args.exit_criterion,
        max_risk=args.max_risk,
        risk=args.risk,
        risk_confidence=args.risk_confidence,
        seed=args.seed,
    )
    if report.policy is not None and report.relative_cost >= 1:
        message = f"No early exit: the policy that could be certified costs {report.relative_cost:.3f} of your model."
        report = replace(report, policy=None, message=message)
    model.set_exit_policy(report.policy)
    model.config.training_scheme = "retrofit"
    with _room_for(folder / SAFE_WEIGHTS_NAME):
        model.save_pretrained(folder)
        rows.processor.save_pretrained(folder)
    with _room_for(folder / LOGITS_NAME):
        save_exit_logits(folder, exit_logits, exit_logits[:, -1].argmax(-1), calibration_rows, "calibration")
    record = {
        "arguments": public_settings(vars(args)),
        "num_training_rows": len(training_rows),
        "num_calibration_rows": len(calibration_rows),
        "exit_layers": model.config.exit_layers,
        "relative_costs": costs,
        "exit_costs": costs.to_dict(),
        "cost_unit": args.cost,
        "latency": latency,
        "relative_cost": report.relative_cost,
        "exit_fractions": report.exit_fractions,
        "policy": report.policy and report.policy.to_dict(),
        "message": report.message,
        "seconds": {},
    }
    if report.policy is not None and args.speed_samples:
        functions = rows.speed_functions(model, calibration_rows[: args.speed_samples], args.batch_size)
        seconds = {name: float(np.median(times)) for name, times in measure_seconds(functions, repeats=3).items()}
        record["seconds"] = seconds
    with _room_for(folder / RUN_FILE):
        write_run(folder, vars(args), trained=True, finished=True, history=history)
    with _room_for(folder / RECORD_NAME), _replacing(folder / RECORD_NAME) as temporary:
        temporary.write_text(json.dumps(record, indent=2))
    print(report.message)
    print(f"Model, {'tokenizer' if args.train_file else 'image processor'} and {RECORD_NAME}: {folder}")
    print(summary(record))


def summary(record: dict) -> str:
    """The outcome in one line."""
    if record["policy"] is None:
        return f"Not cheaper, answers as your model: {record['message']}"
    guarantee = record["policy"]["guarantee"]
    line = f"Agrees with your model on at least {100 * (1 - guarantee['limit']):.4g} % "
    line += f"({100 * guarantee['confidence']:.4g} % sure); {1 / record['relative_cost']:.2f} x less "
    line += "time, measured" if record.get("latency") else "compute"
    seconds = record["seconds"]
    if seconds:
        line += f", {next(iter(seconds.values())) / seconds['exits on']:.2f} x less time here"
    return line


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
    """Raise ExitConfigurationError where the disk is too full for a file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_full_disk(error):
            raise
        raise ExitConfigurationError(
            f"{path} could not be written ({error}): make room below --output_dir, then give the same command again. "
            "It goes on from the features that are there."
        ) from error


# Checks


def check_arguments(args) -> None:
    """Raise ExitConfigurationError for flags that contradict each other or the folders."""
    if (args.train_file is None) == (args.train_dir is None):
        raise DataError("Give the rows: either --train_file (text) or --train_dir (images).")
    if args.skip_corrupt and args.train_dir is None:
        raise DataError("--skip_corrupt leaves out images: it belongs to --train_dir.")
    if args.skip_empty and args.train_file is None:
        raise DataError("--skip_empty leaves out texts: it belongs to --train_file.")
    CalibrationArguments(
        max_risk=args.max_risk, risk_confidence=args.risk_confidence, latency_batch_size=args.latency_batch_size
    )
    args.exit_criterion = find_criterion(args.exit_criterion)
    get_criterion(args.exit_criterion).check(SINGLE_LABEL)
    args.exit_pooling = args.exit_pooling and find_pooling(args.exit_pooling)
    args.exit_head = args.exit_head and find_exit_head(args.exit_head)
    for name in ("batch_size", "chunk_size", "num_train_epochs", "train_batch_size", "max_train_samples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ExitConfigurationError(f"--{name} must be at least 1, not {getattr(args, name)}.")
    if args.speed_samples < 0:
        raise ExitConfigurationError(f"--speed_samples must be 0 or more, not {args.speed_samples}.")
    if args.head_learning_rate <= 0:
        raise ExitConfigurationError(f"--head_learning_rate must be above 0, not {args.head_learning_rate}.")
    if args.calibration_share is not None and not 0 < args.calibration_share < 1:
        raise ExitConfigurationError(f"--calibration_share must lie between 0 and 1, not {args.calibration_share}.")
    folder = Path(args.output_dir)
    if folder.exists() and os.path.isdir(args.model) and folder.samefile(args.model):
        raise ExitConfigurationError(f"--output_dir {folder} is the model's own folder: give another.")
    ours = (folder / RECORD_NAME).exists() or (folder / FEATURES_NAME).is_dir()
    if (folder / "config.json").exists() and not ours:
        raise ExitConfigurationError(f"--output_dir {folder} holds a model of something else: give another.")


def load_model(args) -> PreTrainedModel:
    """The early-exit model on the fine-tuned one, in eval mode, without a policy.

    Raises:
        ExitConfigurationError: there is no such model, or it is none that can be retrofitted.
    """
    with loading(f"MODEL {args.model}"):
        found, _ = PreTrainedConfig.get_config_dict(model_source(args.model))
    model_class = model_class_of(found, f"MODEL {args.model}")
    if not is_classifier(found.get("architectures"), model_class.__name__):
        raise ExitConfigurationError(
            f"MODEL {args.model} has no classifier of sequences or images: its `architectures` in config.json are "
            f"{found.get('architectures')}. Give a fine-tuned one."
        )
    text = model_class.main_input_name == "input_ids"
    if text != (args.train_file is not None):
        flag, kind = ("--train_file", "text") if text else ("--train_dir", "images")
        raise ExitConfigurationError(f"MODEL {args.model} reads {kind}: give {flag}.")
    pooling = args.exit_pooling or model_class.config_class.default_exit_pooling
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the exits' heads are missing is as it should be
    try:
        with loading(f"MODEL {args.model}"):
            model = model_class.from_pretrained(
                model_source(args.model),
                exit_layers=args.exit_layers,
                exit_pooling=pooling,
                exit_head=args.exit_head,
                exit_policy=None,
            ).eval()
    finally:
        logging.set_verbosity(verbosity)
    model.cuda_graphs = not args.no_cuda_graphs
    config = model.config
    if model.is_new_head(model.num_exits - 1):
        raise ExitConfigurationError(
            f"MODEL {args.model} has no classifier of sequences or images: parameters of its last head are missing. "
            "Give a fine-tuned one."
        )
    missing = [name for name in sorted(model.newly_initialized) if not name.startswith("exit_heads.")]
    if missing:
        raise ExitConfigurationError(
            f"MODEL {args.model} lacks weights, for example {missing[0]}: what it answers would be random."
        )
    if config.num_labels < 2 or config.problem_type not in (None, SINGLE_LABEL):
        raise ExitConfigurationError(
            f"MODEL {args.model} is for {config.problem_type or 'regression'}; answers that agree are counted for "
            f"{SINGLE_LABEL}."
        )
    if config.exit_aggregation == "boosted":
        raise ExitConfigurationError(f"MODEL {args.model} is boosted: its exits cannot be trained one by one.")
    if model.num_exits == 1:
        raise ExitConfigurationError("--exit_layers names only the last layer: name earlier ones.")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def split_rows(num_rows: int, args) -> np.ndarray:
    """Seeded numbers of the rows that certify, sorted.

    Raises:
        DataError: too few rows to train exits and to certify the risk.
    """
    _, needed = rows_needed(args.max_risk, args.risk_confidence)
    share = args.calibration_share or 1 / 3
    wanted = round(share * num_rows) if args.calibration_share else max(round(share * num_rows), needed)
    if wanted < needed or num_rows - wanted < args.train_batch_size:
        raise DataError(
            f"{num_rows} rows are too few: --max_risk {args.max_risk:g} with --risk_confidence "
            f"{args.risk_confidence:g} takes at least {needed} rows that certify (here {wanted}), besides at least "
            f"{args.train_batch_size} that train exits. Give more rows, a larger --max_risk, or a lower "
            "--risk_confidence."
        )
    return np.sort(np.random.default_rng(args.seed).permutation(num_rows)[:wanted])


# Rows


class Rows(ABC):
    """Unlabelled rows as a model takes them.

    Attributes:
        processor: tokenizer or image processor, saved with the model.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict:
        """The model's inputs for one row, without a batch dimension."""

    @abstractmethod
    def fingerprint(self) -> list[bytes]:
        """What, if it changes, makes features useless."""

    @abstractmethod
    def cost_inputs(self, indices: np.ndarray) -> dict:
        """What `relative_costs` needs to know of these rows."""

    @abstractmethod
    def speed_functions(self, model, indices: np.ndarray, batch_size: int) -> dict:
        """Functions for `measure_seconds` that classify these rows: the stock model first, and `exits on`."""

    def by_length(self, indices: range) -> list[int]:
        """These rows in an order that pads little."""
        return list(indices)


class TextRows(Rows):
    def __init__(self, args, config):
        settings = TextDataArguments(
            train_file=args.train_file,
            text_column_names=args.text_column_names,
            tokenizer_name=args.tokenizer_name,
            max_seq_length=args.max_seq_length,
            max_train_samples=args.max_train_samples,
        )
        source = f"--train_file {args.train_file}"
        splits = load_files({"train": [args.train_file]}, source, None, text_columns=settings.text_column_names or ())
        columns = text_columns(settings, None, splits, "label", source)
        if len(columns) > 1 and settings.text_column_names is None:
            raise DataError(
                f"{source} has two columns of text, {' and '.join(columns)}, and one of them may be labels: name the "
                "one that is read, or both for pairs, by --text_column_names."
            )
        rows = limit_rows(splits["train"].select_columns(columns), args.max_train_samples)
        rows = prepare_rows(rows, columns, source, skip_empty=args.skip_empty)
        print(f"Columns read: {', '.join(columns)}")
        self.processor = TEXT.load_processor(model_source(args.model), settings, config)
        data = TaskData({"train": rows}, SINGLE_LABEL, None, columns, "", "", None, [])
        self.encoded = encode_text_data(data, self.processor, settings, max_length=config.max_input_length)["train"]
        self.texts = [rows[column] for column in columns]
        self.max_length = settings.max_seq_length
        self.lengths = [len(tokens) for tokens in self.encoded["input_ids"]]

    def __len__(self):
        return len(self.encoded)

    def __getitem__(self, index):
        return self.encoded[index]

    def fingerprint(self):
        return [np.asarray(tokens, dtype=np.int32).tobytes() for tokens in self.encoded["input_ids"]]

    def cost_inputs(self, indices):
        return cost_inputs(self.encoded.select(indices))

    def speed_functions(self, model, indices, batch_size):
        texts = [[column[int(row)] for row in indices] for column in self.texts]
        return text_functions(model, self.processor, texts, max_length=self.max_length, batch_size=batch_size)

    def by_length(self, indices):
        return sorted(indices, key=lambda row: -self.lengths[row])


class ImageRows(Rows):
    def __init__(self, args, config):
        if not os.path.isdir(args.train_dir):
            raise DataError(f"--train_dir {args.train_dir} is no folder.")
        known = Image.registered_extensions()
        found = sorted(path for path in Path(args.train_dir).rglob("*") if path.suffix.lower() in known)
        if not found:
            raise DataError(f"--train_dir {args.train_dir} holds no image files.")
        try:
            self.processor = AutoImageProcessor.from_pretrained(model_source(args.model), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise DataError(f"MODEL {args.model} has no image processor: {error}") from error
        self.transform = EvaluationTransform(self.processor, config.num_channels)
        paths = [str(path) for path in found[: args.max_train_samples]]
        rows = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image(decode=False))
        rows = whole_images(rows, "image", args.skip_corrupt, f"--train_dir {args.train_dir}")
        self.paths = [Path(image["path"]) for image in rows["image"]]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path = self.paths[index]
        image, problem = decode_image({"bytes": None, "path": path})
        if problem:
            raise DataError(f"{path} is corrupt since this run began ({problem}).")
        return {"pixel_values": self.transform(image)}

    def fingerprint(self):
        stats = [(path, path.stat()) for path in self.paths]
        files = [f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode() for path, stat in stats]
        return [self.processor.to_json_string().encode(), *files]

    def cost_inputs(self, indices):
        return cost_inputs([self[int(indices[0])]])

    def speed_functions(self, model, indices, batch_size):
        rows = [self[int(row)] for row in indices]
        stock = stock_model(model)

        @torch.inference_mode()
        def run_stock():
            for start in range(0, len(rows), batch_size):
                stock(**_batch(model, rows[start : start + batch_size]))

        return {"stock model": run_stock, "exits on": lambda: predict(model, rows, batch_size, progress=False)}


# Features


def compute_features(model, rows: Rows, args) -> tuple[np.ndarray, np.ndarray]:
    """What the exits read of every row, and what the model answers: in one pass, kept in chunks on disk.

    Returns:
        features (num_rows, num_exits - 1, width) in `--feature_dtype`, and the last exit's logits (num_rows,
        num_labels), float32.
    """
    config = model.config
    folder = Path(args.output_dir) / FEATURES_NAME / _fingerprint(model, rows, args)
    folder.mkdir(parents=True, exist_ok=True)
    shape = (len(rows), model.num_exits - 1, model.exit_head_modules(0)[0].width)
    features = np.empty(shape, dtype=args.feature_dtype)
    logits = np.empty((len(rows), config.num_labels), dtype=np.float32)
    with tqdm(total=len(rows), unit="row", desc="Reading rows") as bar:
        for number, start in enumerate(range(0, len(rows), args.chunk_size)):
            chunk = range(start, min(start + args.chunk_size, len(rows)))
            path = folder / f"chunk-{number:05d}.npz"
            found = _read_chunk(path, (len(chunk), *shape[1:]), args.feature_dtype)
            if found is None:
                found = _compute_chunk(model, rows, chunk, args)
                _check_finite(*found, start, args)
                with _room_for(path), _replacing(path) as temporary, temporary.open("wb") as file:
                    np.savez(file, features=found[0], logits=found[1])
                    file.flush()
                    os.fsync(file.fileno())
            features[start : chunk.stop], logits[start : chunk.stop] = found
            bar.update(len(chunk))
    return features, logits


def _fingerprint(model, rows: Rows, args) -> str:
    """A name for these features: it changes with the model, the rows and what is computed of them."""
    config, digest = model.config, hashlib.sha256()
    settings = [config.exit_layers, config.exit_pooling, config.last_exit_pooling, str(model.dtype)]
    settings += [args.chunk_size, args.feature_dtype, len(rows)]
    digest.update(json.dumps(settings).encode())
    for name, tensor in model.state_dict().items():
        if not name.startswith("exit_heads."):
            digest.update(name.encode() + tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    for part in rows.fingerprint():
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _check_finite(features: np.ndarray, logits: np.ndarray, start: int, args) -> None:
    """Refuse answers that exits cannot learn, and what they read where the disk's precision does not hold it."""
    for values, cause in (
        (logits, f"MODEL {args.model} answers with NaN or infinity: its weights, or their precision, do not do for"),
        (features, f"--feature_dtype {args.feature_dtype} does not hold what exits read: give float32 for"),
    ):
        broken = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))
        if len(broken):
            raise ExitConfigurationError(f"{cause} row {start + broken[0]} (counted from 0).")


def _read_chunk(path: Path, shape: tuple, dtype: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Features and logits of a chunk; `None` where it is not there or not whole."""
    try:
        with np.load(path, allow_pickle=False) as file:
            features, logits = file["features"], file["logits"]
    except Exception:  # a damaged archive raises nearly anything
        return None
    return (features, logits) if features.shape == shape and features.dtype == dtype else None


@torch.inference_mode()
def _compute_chunk(model, rows: Rows, chunk: range, args) -> tuple[np.ndarray, np.ndarray]:
    """Features (rows, num_exits - 1, width) and logits (rows, num_labels) of some rows."""
    order, features, logits = rows.by_length(chunk), [], []
    for start in range(0, len(order), args.batch_size):
        examples = model.embed(**_batch(model, [rows[row] for row in order[start : start + args.batch_size]]))
        examples = examples.unpadded()
        context, read = model.make_context(examples), []
        for index in range(model.num_exits - 1):
            hidden, _ = model.run_stage(index, examples, context)
            examples = replace(examples, hidden=hidden)
            read.append(model.exit_head_modules(index)[0].pool(hidden, examples.attention_mask))
        logits.append(model.run_stage(model.num_exits - 1, examples, context)[1].float().cpu())
        features.append(torch.stack(read, 1).float().cpu())
    back = np.argsort(order)
    dtype = getattr(torch, args.feature_dtype)
    return torch.cat(features).to(dtype).numpy()[back], torch.cat(logits).numpy()[back]


def _batch(model, rows: list[dict]) -> dict[str, torch.Tensor]:
    return {name: value.to(model.device) for name, value in pad_rows(rows, model.config).items()}


# Exits


def train_heads(model, features: np.ndarray, teacher_logits: np.ndarray, args) -> None:
    """Teach exits 1..K-1 the model's own probabilities: cross-entropy with them as soft labels, AdamW, cosine to zero.

    Args:
        model: an early-exit model; nothing but its exit heads changes.
        features: (num_rows, num_exits - 1, width), what the heads read.
        teacher_logits: (num_rows, num_labels).
        args: epochs, batch size, learning rate and seed.
    """
    set_seed(args.seed)
    heads, dtype = model.exit_heads, model.dtype
    heads.float().train()
    targets = torch.from_numpy(teacher_logits).softmax(-1)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=args.head_learning_rate)
    steps = math.ceil(len(features) / args.train_batch_size) * args.num_train_epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with tqdm(total=steps, unit="step", desc="Training exits") as bar:
        for _ in range(args.num_train_epochs):
            for rows in torch.randperm(len(features)).split(args.train_batch_size):
                inputs = torch.from_numpy(features[rows.numpy()]).to(model.device).float()
                logits = _head_logits(model, inputs)
                batch_targets = targets[rows].to(logits).unsqueeze(1)
                loss = -(batch_targets * logits.log_softmax(-1)).sum(-1).mean(0).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    heads.to(dtype).eval()


def _head_logits(model, features: torch.Tensor) -> torch.Tensor:
    """Logits (rows, num_exits - 1, num_labels) of the early exits, of features (rows, num_exits - 1, width)."""
    heads = (model.exit_head_modules(index)[0] for index in range(model.num_exits - 1))
    return torch.stack([head.classify(read) for head, read in zip(heads, features.unbind(1), strict=True)], 1)


@torch.inference_mode()
def logits_of_features(model, features: np.ndarray, teacher_logits: np.ndarray) -> np.ndarray:
    """Every exit's logits (num_rows, num_exits, num_labels), float32, from features and the last exit's logits."""
    parts = [
        _head_logits(model, torch.from_numpy(part).to(model.device, model.dtype)).float().cpu()
        for part in np.array_split(features, max(1, len(features) // 1024))
    ]
    return np.concatenate([torch.cat(parts).numpy(), teacher_logits[:, None]], 1)
