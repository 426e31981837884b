"""Train, evaluate and predict with three schemes; run by `test_distributed.py` in one process and under a launcher."""

import sys
from pathlib import Path

import torch
from factory import NO_DROPOUT, make_trainer, tiny_model

from een_hf.evaluation import make_compute_metrics
from een_hf.training import EarlyExitTrainingArguments


GLOBAL_BATCH, NUM_STEPS = 8, 5


def make_rows(size: int, seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (size,), generator=generator).tolist()
    rows = [torch.randint(1, 60, (length,), generator=generator) for length in lengths]
    return [{"input_ids": ids.tolist(), "labels": int(ids[0]) % 3} for ids in rows]


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


def main(folder: Path) -> None:
    for scheme in ("joint", "boosted", "two_stage"):
        size = GLOBAL_BATCH // EarlyExitTrainingArguments(str(folder / scheme), use_cpu=True).world_size
        trainer = make_trainer(
            folder / scheme,
            tiny_model(**NO_DROPOUT),
            scheme,
            train_dataset=make_rows(64, seed=1),
            eval_dataset=make_rows(13, seed=2),
            data_collator=collate,
            compute_metrics=make_compute_metrics(["accuracy"], "single_label_classification"),
            per_device_train_batch_size=size,
            # 13 rows in batches of 2 x 3: the last one is filled up with duplicates.
            per_device_eval_batch_size=3,
            max_steps=NUM_STEPS,
            learning_rate=1e-2,
        )
        trainer.train()
        evaluated = trainer.evaluate()
        exits = trainer.predict_exits(trainer.eval_dataset)
        report = trainer.calibrate(make_rows(30, seed=3), target_cost=0.7)
        # Thresholds between two rows' scores, so that rows exit at several exits.
        confidence = torch.from_numpy(exits.predictions).softmax(-1).amax(-1)
        thresholds = confidence.quantile(0.6, dim=0, interpolation="midpoint").tolist()
        trainer.model.set_exit_policy({"criterion": "confidence", "thresholds": thresholds})
        answers = trainer.predict(trainer.eval_dataset)
        streamed = trainer.predict(iter(trainer.eval_dataset))
        found = {
            "world_size": trainer.args.world_size,
            "parameters": trainer.model.state_dict(),
            "evaluated": {name: value for name, value in evaluated.items() if "accuracy" in name},
            "exit_logits": torch.from_numpy(exits.predictions),
            "exit_labels": torch.from_numpy(exits.label_ids),
            "answers": torch.from_numpy(answers.predictions),
            "answer_metrics": answers.metrics,
            "streamed": torch.from_numpy(streamed.predictions),
            "streamed_labels": torch.from_numpy(streamed.label_ids),
            "thresholds": report.policy.thresholds,
        }
        torch.save(found, folder / f"{scheme}-{trainer.args.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
