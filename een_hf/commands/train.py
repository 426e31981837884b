"""Fine-tune a model with exits, evaluate every exit and choose an exit policy.

een-hf train text recipes/bbc_news_minilm_joint.yaml
een-hf train text --model_name_or_path bert-base-uncased --task_name mrpc --do_train --do_eval --output_dir out
een-hf train images --model_name_or_path google/vit-base-patch16-224 --dataset_name cifar100 --do_train --do_eval \\
    --output_dir out

The same as run_glue_een.py (text) and run_cifar_een.py (images). A first argument that ends in .yaml, .yml or .json is
a recipe; flags after it override it. een-hf train text --help shows the flags, --help_all also those of transformers'
TrainingArguments.
"""

import argparse
import sys

from ..data.images import IMAGES
from ..data.task import Modality
from ..data.text import TEXT
from ..errors import one_line_errors
from ..runs import parse_arguments, run_experiment


MODALITIES = {"text": TEXT, "images": IMAGES}


def add_arguments(parser) -> None:
    parser.add_argument("modality", choices=MODALITIES, help="What the model reads.")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="A recipe, or flags of the run.")


def run(args) -> None:
    modality = MODALITIES[args.modality]
    run_experiment(modality, parse_arguments(modality, args.flags, prog=f"een-hf train {args.modality}"))


def main(modality: Modality, argv: list[str] | None = None) -> None:
    """Entry point of the scripts: what is wrong ends the process with one line."""
    with one_line_errors():
        run_experiment(modality, parse_arguments(modality, sys.argv[1:] if argv is None else argv))
