"""A look-ahead on the rows of the token table that the batch reads."""

import pytest
import torch
from l2w_trainers import ADAMW, SGD, bert, text_batch, warmed_up
from torch.testing import assert_close

from een_hf.training.l2w.look_ahead import halve


@pytest.mark.parametrize("method", ["directional", "exact"])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("table", ["padded", "unpadded", "shared", "meta batch"])
def test_only_the_tokens_of_the_batch_count(tmp_path, table, optimizer, method):
    """A look-ahead on the rows of the word table that the batch looks up is the one on the whole table."""
    model = bert().double()
    words = model.get_input_embeddings()
    if table == "shared":
        model.twin = torch.nn.Embedding(*words.weight.shape, dtype=torch.float64)
        model.twin.weight = words.weight
    batches = [text_batch(8, 100 + step) for step in range(5)]
    scheme_args = {"meta_gradient": method, "meta_batch_size": 12 if table == "meta batch" else None}
    trainer = warmed_up(model, tmp_path, batches, weight_decay=0.1, scheme_args=scheme_args, **optimizer)
    batch = text_batch(7, 1)
    assert words.padding_idx == 0
    if table == "padded":
        batch["input_ids"][::2, 6:], batch["attention_mask"][::2, 6:] = 0, 0
        batch["attention_mask"][0, 6:] = 1  # a padding word that is read, but never learned

    found, parts, sizes, whole_table = [], [], set(), trainer.meta_gradient

    def record(train, meta):
        weights, gradient, meta_loss = whole_table(train, meta)
        sizes.add(len(words.weight))
        parts.append((train, meta))
        found.append((weights.detach().clone(), gradient, meta_loss))
        return weights, gradient * 0, meta_loss

    trainer.meta_gradient = record
    # W stays as it is, so that both orders can be told from the same one.
    trainer.meta_optimizer.param_groups[0].update(lr=0.0)
    torch.manual_seed(3)
    held = set(trainer.optimizer.state)
    trainer.meta_step(batch)
    assert set(trainer.optimizer.state) == held  # nothing of the few rows stays, to be saved with a checkpoint
    ids = torch.cat([part["input_ids"].flatten() for part in parts[0]])
    assert sizes == {200 if table == "shared" else len(ids.unique())}
    if table != "meta batch":
        halves = halve(batch)
        assert_close(parts, [halves, halves[::-1]], rtol=0, atol=0)
    torch.manual_seed(3)
    for (train, meta), ours in zip(parts, found, strict=True):
        for wanted, got in zip(whole_table(train, meta), ours, strict=True):
            assert wanted.norm() > 0
            assert_close(got, wanted.detach(), rtol=1e-6, atol=1e-10)
