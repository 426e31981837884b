"""Divide the train split of a labelled data set into parts, as in federated learning.

een-hf partition --dataset_name cifar100 --num_partitions 1000 --scheme dir --alpha 0.1 --balance \\
    --output_dir dataset/cifar100_noniid1000
een-hf partition --train_file labelled.csv --num_partitions 10 --scheme iid --output_dir parts

iid: rows at random. dir: each part draws its shares of the classes from a Dirichlet distribution. pat: each part has a
few classes. Sizes vary unless --balance is given. Every row is in exactly one part, in OUT/train/<part> or
OUT/valid/<part>; the test split is not used. OUT/partition.json describes the parts, OUT/partition.png is a plot of
them. The same seed gives the same parts.
"""

import numpy as np

from ..data.labels import LABEL_COLUMNS
from ..data.partition import FORMATS, SCHEMES, partition_dataset


def add_arguments(parser) -> None:
    parser.add_argument(
        "--dataset_name",
        help="cifar100, cifar10, Hub name, local folder of parquet files or of one folder of images per class, or an "
        "installed sample: digits, bbc_news.",
    )
    parser.add_argument("--dataset_config_name", help="Configuration of --dataset_name.")
    parser.add_argument("--train_file", help="Instead of --dataset_name: rows as csv, json, jsonl or parquet.")
    parser.add_argument("--train_dir", help="Instead of --dataset_name: images, one folder per class.")
    parser.add_argument(
        "--label_column_name", help=f"Column of the labels. Default: the first of {', '.join(LABEL_COLUMNS)}."
    )
    parser.add_argument(
        "--input_column_names",
        nargs="+",
        help="For --format npz: one image column, or one or two text columns. Default: the only ones.",
    )
    parser.add_argument("--num_partitions", type=int, required=True, help="Number of parts.")
    parser.add_argument("--scheme", choices=SCHEMES, required=True, help="How rows are assigned to parts.")
    parser.add_argument(
        "--alpha", type=float, help="For --scheme dir: the smaller, the fewer classes a part has. Default: 0.1."
    )
    parser.add_argument(
        "--classes_per_partition", type=int, help="For --scheme pat: classes of each part. Default: 2."
    )
    parser.add_argument(
        "--balance", action="store_true", help="Parts of equal size; with pat only if the classes have equal size."
    )
    parser.add_argument(
        "--min_size", type=int, help="Fewest rows of a part. Default: as many as are needed for one validation row."
    )
    parser.add_argument(
        "--valid_fraction", type=float, default=0.25, help="Validation share of each part; 0: none. Default: 0.25."
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="parquet", help="All columns (default), or NumPy arrays x and y."
    )
    parser.add_argument("--seed", type=int, default=42, help="Seed of all random draws. Default: 42.")
    parser.add_argument("--output_dir", required=True, help="A folder that is empty or does not exist.")
    parser.add_argument("--cache_dir", help="Folder for downloads.")
    parser.add_argument("--token", help="Token for private Hub repositories.")


def run(args) -> None:
    about = partition_dataset(**vars(args))
    counts = np.array(about["label_counts"])
    sizes, classes = counts.sum(axis=1), (counts > 0).sum(axis=1)
    print(f"{sizes.sum()} rows of {counts.shape[1]} classes in {len(sizes)} parts: {args.output_dir}")
    for what, numbers in (("rows", sizes), ("classes", classes)):
        print(f"{what} per part: {numbers.min()} to {numbers.max()}, median {np.median(numbers):g}")
    print(f"Train on one: --partition_dir {args.output_dir} --partition_id 0 (to {len(sizes) - 1}, or all)")
