"""A frozen backbone: what stays to the bit, and where freezing is refused."""

import copy

import pytest
import torch
from models.comparing import LABELS, assert_equal

from een_hf.models import ExitConfigurationError


def test_frozen_backbone_stays_to_the_bit(architecture, load_exits):
    """The promise of --freeze_backbone: the fine-tuned model inside answers as before, whatever the exits learn."""
    model, inputs = load_exits(architecture, exit_layers=[1, 3]), architecture.inputs()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        logits = model(**inputs).logits
    model.freeze_backbone()
    model.train()
    assert model.training
    backbone = architecture.backbone(model)
    assert not any(module.training for module in backbone.modules())
    assert not any(module.training for head in model.last_head_modules for module in head.modules())
    assert all(module.training for module in model.exit_heads.modules())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output = model(**inputs, labels=LABELS)
        # Dropout in the backbone or the last head would show here.
        assert_equal(output.logits, logits)
        output.loss.backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        if name.startswith("exit_heads."):
            assert not torch.equal(tensor, before[name])
        else:
            assert_equal(tensor, before[name])
    model.eval()
    assert not any(module.training for module in model.modules())
    model.train()
    assert not any(module.training for module in backbone.modules())


def test_freezing_is_refused_where_it_means_nothing(architecture, load_exits):
    """Freezing a random last head, or one that boosting changes, would break the promise; one exit trains nothing."""
    for model, words in (
        (load_exits(architecture, what="backbone"), "fine-tuned"),
        (architecture.model_class(copy.deepcopy(load_exits(architecture).config)), "fine-tuned"),
        (load_exits(architecture, exit_aggregation="boosted"), "--method"),
        (load_exits(architecture, exit_layers=[4]), "--exit_layers"),
    ):
        with pytest.raises(ExitConfigurationError, match="--freeze_backbone") as raised:
            model.freeze_backbone()
        assert words in str(raised.value)
        # A refused call must not have frozen half of the model.
        assert all(parameter.requires_grad for parameter in model.parameters())
