#!/usr/bin/env python
"""Time of the peer `earlyon` (PyPI) and of een_hf on a ViT-B/16 each, exits after layers 4 and 10, random weights.

Batch 1: both exit at the same exit; the ratio to each one's own plain model and of one to the other. Batches: a share
of the rows is confident at the first exit, the others at none; the peer's batch exits as a whole, in een_hf row by
row.

    pip install earlyon
    python benchmarks/peer.py --threads 2
"""

import argparse
import sys
import warnings
from importlib.metadata import version

import numpy as np
import torch
from common import add_results_argument, summarize, write_results
from torchvision.models import vit_b_16

from een_hf import EarlyExitViTConfig, EarlyExitViTForImageClassification
from een_hf.evaluation import measure_seconds, stock_model
from een_hf.models.policies import NEVER


EXIT_LAYERS = [4, 10, 12]


def ratio(seconds: dict, numerator: str, denominator: str) -> float:
    return float(np.median(np.divide(seconds[numerator], seconds[denominator])))


def row_of(seconds: dict, **what) -> dict:
    row = {**what, "peer / its plain model": ratio(seconds, "peer", "peer plain")}
    row["een_hf / its plain model"] = ratio(seconds, "een_hf", "een_hf plain")
    row["een_hf / peer"] = ratio(seconds, "een_hf", "peer")
    return {**row, **{name: summarize(values) for name, values in seconds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch_size", type=int, default=8)
    add_results_argument(parser)
    args = parser.parse_args()
    try:
        from earlyon.models.vit_ee import vit_b_16_ee
    except ImportError:
        sys.exit("This benchmark compares with a package that is not installed: pip install earlyon")
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    peer = vit_b_16_ee(100, pretrained=False).eval()
    peer_plain = vit_b_16(num_classes=100).eval()
    own = EarlyExitViTForImageClassification(EarlyExitViTConfig(num_labels=100, exit_layers=EXIT_LAYERS)).eval()
    own_plain = stock_model(own)
    image, batch = torch.randn(1, 3, 224, 224), torch.randn(args.batch_size, 3, 224, 224)

    rows = []
    with torch.inference_mode():
        for exit_index in range(3):
            peer.config.confidence_thresholds = [0.0 if k == exit_index else 1.0 for k in range(2)]
            own.set_exit_policy(
                {
                    "criterion": "confidence",
                    "thresholds": [-NEVER if k == exit_index else NEVER for k in range(3)],
                }
            )
            functions = {
                "peer": lambda: peer(image),
                "een_hf": lambda: own(pixel_values=image),
                "peer plain": lambda: peer_plain(image),
                "een_hf plain": lambda: own_plain(pixel_values=image),
            }
            seconds = measure_seconds(functions, args.repeats)
            rows.append(row_of(seconds, batch_size=1, layer=EXIT_LAYERS[exit_index], share_exiting_first=""))
        for share in (0.5, 1.0):
            scores = own(pixel_values=batch, early_exit=False).exit_logits.softmax(-1).amax(-1)[:, 0]
            exiting = round(share * args.batch_size)
            own.set_exit_policy(
                {
                    "criterion": "confidence",
                    "thresholds": [scores.sort(descending=True).values[exiting - 1].item(), NEVER, 0],
                }
            )
            # One row that is not confident keeps the peer's batch; if all are confident, it exits at the first exit.
            peer.config.confidence_thresholds = [0.0, 1.0] if share == 1 else [1.0, 1.0]
            functions = {
                "peer": lambda: peer.forward_inference_batched(batch),
                "een_hf": lambda: own(pixel_values=batch),
                "peer plain": lambda: peer_plain(batch),
                "een_hf plain": lambda: own_plain(pixel_values=batch),
            }
            seconds = measure_seconds(functions, max(3, args.repeats // 3))
            rows.append(row_of(seconds, batch_size=args.batch_size, layer="", share_exiting_first=share))
    for row in rows:
        row["peer version"] = version("earlyon")
        print({name: value for name, value in row.items() if not isinstance(value, dict)})
    write_results(args.results, "peer", rows)


if __name__ == "__main__":
    main()
