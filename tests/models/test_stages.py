"""Masks and compaction of examples."""

import pytest
import torch
from factory import tiny_config

from een_hf.models.stages import Examples, bidirectional_mask


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_token_that_sees_nothing_stays_a_number(dtype):
    """Eager attention takes its softmax in float32, where the smallest float64 is minus infinity: 0/0 in the row."""
    config = tiny_config(attn_implementation="eager")
    mask = torch.tensor([[0, 0, 0, 0, 1, 1]])  # the first token's window is padding only
    examples = Examples(torch.zeros(1, 6, 4, dtype=dtype), mask, padded=True)
    scores = bidirectional_mask(config, examples, window=1)
    weights = scores.softmax(-1, dtype=torch.float32)[0, 0]
    assert weights.isfinite().all()
    # A token beside the padding attends to its unmasked neighbours alone.
    assert weights[4].tolist() == [0, 0, 0, 0, 0.5, 0.5]


def test_every_tensor_follows_the_examples_that_continue():
    """What breaks: layers or criteria read positions, images or states of examples that have exited."""
    mask = (torch.arange(6) < torch.tensor([5, 3, 2])[:, None]).long()
    whole = Examples(
        hidden=torch.randn(3, 6, 4),
        attention_mask=mask,
        per_token={"position_ids": torch.arange(18).view(3, 6)},
        per_example={"size": torch.randn(3, 2)},
        logits=torch.randn(3, 5),
        state=(torch.tensor([1.0, 2.0, 3.0]),),
        ids=torch.tensor([7, 8, 9]),
    )
    found = whole.continuing(torch.tensor([True, False, False]))
    assert found.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert found.ids.tolist() == [8, 9] and found.state[0].tolist() == [2.0, 3.0]
    assert found.hidden.equal(whole.hidden[1:, :3]) and found.logits.equal(whole.logits[1:])
    assert found.per_token["position_ids"].tolist() == [[6, 7, 8], [12, 13, 14]]
    assert found.per_example["size"].equal(whole.per_example["size"][1:])
