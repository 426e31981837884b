#!/usr/bin/env python
"""Share of a training step that waits for images: loading, decoding and augmenting against a small ViT's step.

A ViT-S with four exits trains on CIFAR-100 at `--image_size` with RandAugment, Mixup and random erasing, with each
number of workers in turn; the first steps are left out.

    python benchmarks/loading.py --dataset_name cifar100 --threads 1
"""

import argparse
import time

import numpy as np
import torch
from common import add_results_argument, summarize, write_results
from torch.utils.data import DataLoader

from een_hf import EarlyExitViTConfig, EarlyExitViTForImageClassification
from een_hf.data.image_arguments import ImageDataArguments
from een_hf.data.images import IMAGES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="cifar100")
    parser.add_argument("--image_size", type=int, default=112)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--threads", type=int, default=1)
    add_results_argument(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    warm_up = 3
    data_args = ImageDataArguments(
        dataset_name=args.dataset_name,
        auto_augment="rand-m9-mstd0.5-inc1",
        mixup=0.2,
        random_erase=0.25,
        max_train_samples=(args.steps + warm_up + 1) * args.batch_size,
    )
    data = IMAGES.load_data(data_args, splits_needed=["train"], seed=0)
    shape = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": data.num_labels}
    names = {"id2label": dict(enumerate(data.label_names)), "label2id": {n: i for i, n in enumerate(data.label_names)}}
    config = EarlyExitViTConfig(**shape, **names, image_size=args.image_size, exit_layers=[3, 6, 9, 12])
    model = EarlyExitViTForImageClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    processor = IMAGES.load_processor(None, data_args, config)
    rows = IMAGES.encode_data(data, processor, data_args, config)["train"]
    rows = IMAGES.augment(rows, processor, data_args, config, 0)
    collator = IMAGES.make_collator(processor, data_args, config)

    results = []
    for workers in args.workers:
        batches = iter(DataLoader(rows, args.batch_size, collate_fn=collator, num_workers=workers))
        waiting, stepping = [], []
        for _ in range(warm_up + args.steps):
            start = time.perf_counter()
            batch = next(batches)
            loaded = time.perf_counter()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            waiting.append(loaded - start)
            stepping.append(time.perf_counter() - loaded)
        waiting, stepping = waiting[warm_up:], stepping[warm_up:]
        row = {"workers": workers, "batch_size": args.batch_size, "image_size": args.image_size}
        row["waiting / step"] = float(np.sum(waiting) / (np.sum(waiting) + np.sum(stepping)))
        results.append({**row, "wait": summarize(waiting), "step": summarize(stepping)})
        print({name: value for name, value in row.items()})
    write_results(args.results, "loading", results)


if __name__ == "__main__":
    main()
