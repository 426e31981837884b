"""Which rows the meta loss charges at which exit, against sorted lists and exact fractions."""

import math

import pytest
import torch
from l2w_trainers import NUM_LABELS, bert, charged_by_loop, image_batch, make_trainer, text_batch, vit

from een_hf.data.transforms import ImageCollator
from een_hf.training.l2w import (
    charged_shares,
)
from een_hf.training.l2w.look_ahead import halve


@pytest.mark.parametrize("target_p", [0.3, 0.75, 1.0, 1.4])
def test_shares_equal_exact_fractions(target_p):
    for num_rows in [*range(1, 12), 37]:
        for num_exits in (1, 2, 3, 7):
            for offset in (0.0, 0.3, 0.95):
                wanted = charged_by_loop([[0.0] * num_exits] * num_rows, target_p, offset)
                assert charged_shares(num_rows, num_exits, target_p, offset) == [len(rows) for rows in wanted]


@pytest.mark.parametrize("num_rows", [1, 16, 50])
def test_each_exit_is_charged_with_its_share_on_average(num_rows):
    """What breaks: rounding down never charges exits 6 to 11 of 12 with any of 16 samples, and the last with 5."""
    p = [0.75**k for k in range(1, 13)]
    p = [part / sum(p) for part in p]
    counts = torch.tensor(
        [charged_shares(num_rows, 12, 0.75, (draw + 0.5) / 1000) for draw in range(1000)], dtype=torch.float64
    )
    assert (counts.sum(1) == num_rows).all()
    wanted = num_rows * torch.tensor(p, dtype=torch.float64)
    assert ((counts >= wanted.floor()) & (counts <= wanted.ceil())).all()
    torch.testing.assert_close(counts.mean(0), wanted, rtol=0, atol=2e-3)


def test_each_look_ahead_draws_one_rounding_from_its_own_generator(tmp_path):
    trainer = make_trainer(bert(), tmp_path, size=40, max_steps=4, scheme_args={"meta_interval": 2})
    generator = torch.Generator()
    generator.set_state(trainer.meta_generator.get_state())
    seen, meta_loss = [], trainer.look_ahead.meta_loss

    def record(inputs, parameters=None):
        seen.append(trainer.look_ahead.share_offset)
        return meta_loss(inputs, parameters)

    trainer.look_ahead.meta_loss = record
    trainer.train()
    draws = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    assert seen == [draws[0], draws[0], draws[1], draws[1]]


def plain_meta_loss(exit_logits, labels):
    """The charged rows' cross-entropy, from all rows at all exits (rows, exits, labels)."""
    total = 0.0
    for k, rows in enumerate(charged_by_loop(exit_logits.softmax(-1).amax(-1).tolist(), 0.75)):
        if rows:
            total = total + torch.nn.functional.cross_entropy(exit_logits[rows, k], labels[rows])
    return total


@pytest.mark.parametrize("kind", ["left padding", "right padding", "4-D mask", "images"])
@pytest.mark.parametrize("num_rows", [1, 3, 16])
def test_samples_that_exit_where_they_are_charged_change_no_gradient(tmp_path, kind, num_rows):
    """What breaks: a row is charged at another exit, or reaches a parameter more or less than if it had stayed."""
    text = kind != "images"
    model = (bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0) if text else vit(dropout=0.0)).double()
    batch = text_batch(num_rows, 1) if text else image_batch(num_rows, 1)
    if text:
        lengths = torch.randint(2, 11, (num_rows, 1), generator=torch.Generator().manual_seed(0))
        mask = (torch.arange(10) < lengths).long()
        batch["attention_mask"] = mask.flip(1) if kind == "left padding" else mask
        if kind == "4-D mask":
            batch["attention_mask"] = mask.bool()[:, None, None].expand(-1, 1, 10, -1)
    else:
        batch["pixel_values"] = batch["pixel_values"].double()
    trainer = make_trainer(model, tmp_path)
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # rows differ in how sure they are
    parameters, seen = list(model.parameters()), []
    handles = [layer.register_forward_hook(lambda *args: seen.append(len(args[2]))) for layer in model.backbone_layers]
    loss = trainer.look_ahead.meta_loss(batch)
    for handle in handles:
        handle.remove()
    staying = {1: [1, 1, 1], 3: [3, 2, 1], 16: [16, 10, 4]}[num_rows]
    assert seen == staying
    wanted = plain_meta_loss(model(**batch).exit_logits, batch["labels"])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    ours, plain = (torch.autograd.grad(of, parameters, materialize_grads=True) for of in (loss, wanted))
    for found, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_meta_loss_of_a_mixed_batch(tmp_path):
    """Each half of an odd batch keeps its own soft labels: every row is charged once, by a plain loop over numbers."""
    model = vit().double().eval()
    model.config.problem_type = "single_label_classification"
    trainer = make_trainer(model, tmp_path)
    pixels = torch.randn(7, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = [{"pixel_values": image, "labels": k % NUM_LABELS, "draw": (1, 0, k)} for k, image in enumerate(pixels)]
    batch = ImageCollator(mixup=0.8, cutmix=1.0, num_labels=NUM_LABELS)(rows)
    with torch.no_grad():
        logits = model(pixel_values=batch["pixel_values"], early_exit=False).exit_logits
    for half, start, stop in zip(halve(batch), (0, 3), (3, 7), strict=True):
        confidences = logits[start:stop].softmax(-1).amax(-1).tolist()
        wanted = 0.0
        for k, charged in enumerate(charged_by_loop(confidences, 0.75)):
            for row in charged:
                values, target = logits[start + row, k].tolist(), batch["labels"][start + row].tolist()
                log_sum = math.log(sum(map(math.exp, values)))
                wanted += sum(y * (log_sum - value) for y, value in zip(target, values, strict=True)) / len(charged)
        assert trainer.look_ahead.meta_loss(half).item() == pytest.approx(wanted, rel=1e-12)
