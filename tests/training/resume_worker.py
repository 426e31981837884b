"""Resume runs from their checkpoints; `test_resume.py` runs it in one process and under a launcher.

resume_worker.py FOLDER STRATEGIES STEPS, the last two separated by commas: writes what differs to FOLDER, as JSON.
"""

import json
import sys
from pathlib import Path

import factory
import torch
from factory import QUIET, tiny_model

from een_hf.training import EarlyExitTrainingArguments, JointExitTrainer


GLOBAL_BATCH, NUM_ROWS, NUM_EPOCHS = 4, 22, 3
STEPS_PER_EPOCH = 6


def make_rows() -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 12, (NUM_ROWS,), generator=generator).tolist()
    rows = [torch.randint(1, 60, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": ids[0] % 2, "row": row} for row, ids in enumerate(rows)]


class Collator:
    """Pads, and keeps which rows it was given."""

    def __init__(self):
        self.rows = []

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        self.rows.append([row["row"] for row in rows])
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def make_trainer(folder: Path, strategy: str) -> JointExitTrainer:
    world_size = EarlyExitTrainingArguments(str(folder), **QUIET).world_size
    return factory.make_trainer(
        folder,
        tiny_model(num_hidden_layers=2),
        train_dataset=make_rows(),
        data_collator=Collator(),
        train_sampling_strategy=strategy,
        per_device_train_batch_size=GLOBAL_BATCH // world_size,
        num_train_epochs=NUM_EPOCHS,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        remove_unused_columns=False,
    )


def differences(folder: Path, strategies: list[str], steps: list[int]) -> dict[str, dict[int, float]]:
    """The largest difference between the weights of resumed runs and of the uninterrupted one, by strategy and step.

    Step 0 stands for the number of epochs that the uninterrupted run read in the order of another one.
    """
    found = {}
    for strategy in strategies:
        whole = make_trainer(folder / strategy, strategy)
        whole.train()
        batches = whole.data_collator.rows
        orders = {str(batches[start : start + STEPS_PER_EPOCH]) for start in range(0, len(batches), STEPS_PER_EPOCH)}
        found[strategy] = {0: NUM_EPOCHS - len(orders)}
        for step in steps:
            resumed = make_trainer(folder / f"{strategy}-{step}", strategy)
            resumed.train(resume_from_checkpoint=str(folder / strategy / f"checkpoint-{step}"))
            pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
            found[strategy][step] = max((one - other).abs().max().item() for one, other in pairs)
    return found


if __name__ == "__main__":
    strategies, steps = sys.argv[2].split(","), [int(step) for step in sys.argv[3].split(",")]
    args = EarlyExitTrainingArguments(sys.argv[1], use_cpu=True)
    found = {"world_size": args.world_size, "differences": differences(Path(sys.argv[1]), strategies, steps)}
    Path(sys.argv[1], f"found-{args.process_index}.json").write_text(json.dumps(found))
