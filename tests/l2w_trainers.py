"""Small models, batches and trainers for tests of the scheme `l2w`."""

import math
from fractions import Fraction

import factory
import torch
from factory import tiny_model
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

from een_hf.training.l2w import MetaWeightedArguments


NUM_LABELS = 4
SGD = {"optim": "sgd", "optim_args": "momentum=0.9"}
ADAMW = {"optim": "adamw_torch"}
WIDE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_labels": NUM_LABELS}


def bert(vocab_size=200, seed=0, **changes):
    changes = {"max_position_embeddings": 32, "exit_pooling": "cls", **changes}
    return tiny_model("bert", seed=seed, vocab_size=vocab_size, **WIDE, **changes)


def vit(seed=0, dropout=0.1):
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return tiny_model("vit", seed=seed, image_size=16, **WIDE, **dropouts)


def text_batch(size, seed, low=1, high=200, length=10):
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(low, high, (size, length), generator=generator),
        "attention_mask": torch.ones(size, length, dtype=torch.long),
        "labels": torch.randint(0, NUM_LABELS, (size,), generator=generator),
    }


def image_batch(size, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(size, 3, 16, 16, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(0, NUM_LABELS, (size,), generator=generator)}


class Rows(Dataset):
    """Texts whose label is plain in their words, so that a run can learn it."""

    def __init__(self, size):
        self.columns = text_batch(size, seed=3)
        self.columns["labels"] = self.columns["input_ids"][:, 0] % 2
        self.columns["input_ids"][:, 1:] = 2 + self.columns["labels"][:, None]

    def __len__(self):
        return len(self.columns["labels"])

    def __getitem__(self, row):
        return {name: column[row] for name, column in self.columns.items()}


def make_trainer(model, folder, scheme="l2w", scheme_args=None, size=40, **settings):
    common = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "weight_decay": 0.01, "logging_steps": 2}
    if scheme_args:
        settings["scheme_args"] = MetaWeightedArguments(**scheme_args)
    return factory.make_trainer(folder, model, scheme, **{"train_dataset": Rows(size), **common, **settings})


def warmed_up(model, folder, batches, **kwargs):
    """A trainer whose optimizer has taken one real step for each of `batches`."""
    trainer = make_trainer(model, folder, head_learning_rate=5e-3, **kwargs)
    trainer.create_optimizer_and_scheduler(100)
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        model.zero_grad()
    return trainer


class Reads(TorchDispatchMode):
    """Collects what a device would be waited for: values that come to the host, and sizes that depend on values."""

    waits = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.waits:
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def charged_by_loop(confidences, target_p, offset=0.0):
    """The rows charged at each exit, by sorted lists and exact fractions."""
    num_rows, num_exits = len(confidences), len(confidences[0])
    q = Fraction(target_p)
    total = sum(q**k for k in range(1, num_exits + 1))
    left, charged, before = list(range(num_rows)), [], 0
    for k in range(num_exits):
        before, share = before + q ** (k + 1) / total, -math.floor(num_rows * before + Fraction(offset))
        share += math.floor(num_rows * before + Fraction(offset))
        most_confident = sorted(left, key=lambda row: -confidences[row][k])  # stable: of equals the earlier row
        charged.append(most_confident[:share])
        left = [row for row in left if row not in charged[-1]]
    return charged


def tensors_of(state):
    """All tensors of a nested state."""
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        state = list(state.values())
    return [tensor for part in state for tensor in tensors_of(part)] if isinstance(state, (list, tuple)) else []
