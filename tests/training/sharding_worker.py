"""Train with parameters sharded by FSDP2; run by `test_sharding.py` in one process, whole, and in two, on the CPU.

accelerate shards on accelerators only. Told that the processes have some, it shards on the CPU too, by the same code.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from factory import NO_DROPOUT, QUIET, tiny_stock_model
from torch.distributed.tensor import DTensor
from training.distributed_worker import GLOBAL_BATCH, collate, make_rows

from een_hf import AutoEarlyExitModel
from een_hf.training import EarlyExitTrainingArguments, get_scheme


FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}}


def make_trainer(folder: Path, stock: Path, scheme: str):
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(0)  # new heads
    model = AutoEarlyExitModel.from_pretrained(stock)
    args = EarlyExitTrainingArguments(
        str(folder),
        **{**QUIET, "save_strategy": "steps"},
        **(FSDP if world_size > 1 else {}),
        per_device_train_batch_size=GLOBAL_BATCH // world_size,
        per_device_eval_batch_size=3,
        max_steps=5,
        save_steps=3,
        learning_rate=1e-2,
    )
    if world_size > 1:
        assert args.device.type == "cpu"
        PartialState().distributed_type = DistributedType.MULTI_GPU
    rows = {"train_dataset": make_rows(64, seed=1), "eval_dataset": make_rows(13, seed=2), "data_collator": collate}
    return get_scheme(scheme)(model=model, args=args, **rows)


def main(folder: Path) -> None:
    stock = folder.parent / "stock"
    if not stock.is_dir():
        tiny_stock_model(**NO_DROPOUT).save_pretrained(stock)
    for scheme in ("joint", "boosted"):
        trainer = make_trainer(folder / scheme, stock, scheme)
        trainer.train()
        exits = trainer.predict_exits(trainer.eval_dataset)
        report = trainer.calibrate(make_rows(30, seed=3), target_cost=0.7)
        scores = torch.from_numpy(exits.predictions).softmax(-1).amax(-1)
        thresholds = scores.quantile(0.6, dim=0, interpolation="midpoint").tolist()
        trainer.network.set_exit_policy({"criterion": "confidence", "thresholds": thresholds})
        answers = trainer.predict(trainer.eval_dataset)
        trainer.save_model()
        resumed = make_trainer(folder / scheme, stock, scheme)
        resumed.train(resume_from_checkpoint=str(folder / scheme / "checkpoint-3"))
        found = {
            "sharded": {name: isinstance(part, DTensor) for name, part in trainer.model.named_parameters()},
            "exit_logits": torch.from_numpy(exits.predictions),
            "thresholds": report.policy.thresholds,
            "answers": torch.from_numpy(answers.predictions),
            "fractions": answers.metrics["test_exit_fractions"],
            "resumed": torch.from_numpy(resumed.predict_exits(trainer.eval_dataset).predictions),
        }
        torch.save(found, folder / f"{scheme}-{trainer.args.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
