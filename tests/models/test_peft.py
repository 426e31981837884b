"""LoRA around an early-exit model: it trains, saves, loads and merges to the same exits."""

import pytest
import torch
from factory import tiny_model

from een_hf.inference import predict


peft = pytest.importorskip("peft", reason="needs the extra peft")
SETTINGS = {"num_hidden_layers": 4, "exit_layers": [1, 3, 4], "initializer_range": 0.5}


def make(kind, aggregation):
    model = tiny_model(kind, exit_aggregation=aggregation, **SETTINGS)
    if kind == "vit":
        return model, {"pixel_values": torch.randn(12, 3, 8, 8)}
    return model, {"input_ids": torch.randint(1, 30, (12, 9))}


@torch.no_grad()
def exits_of(model, inputs):
    return model.eval()(**inputs, early_exit=False).exit_logits


@pytest.mark.parametrize("kind,aggregation", [("bert", "none"), ("bert", "boosted"), ("vit", "none")])
def test_lora_trains_saves_loads_and_merges(tmp_path, kind, aggregation):
    """What breaks: heads that were trained beside the adapter are not saved with it, and exits answer at random."""
    model, inputs = make(kind, aggregation)
    labels, before = torch.randint(0, 3, (12,)), {name: p.clone() for name, p in model.named_parameters()}
    model.save_pretrained(tmp_path / "base")
    targets = ["query", "value"] if kind == "bert" else ["q_proj", "v_proj"]
    settings = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=model.head_module_names())
    tuned = peft.get_peft_model(model, settings)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(8):
        loss = tuned.train()(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    wanted_exits = exits_of(tuned, inputs)
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(exits_of(again, inputs), wanted_exits, atol=1e-6, rtol=1e-6)
    merged = again.merge_and_unload()
    assert type(merged) is type(model) and merged.state_dict().keys() == before.keys()
    torch.testing.assert_close(exits_of(merged, inputs), wanted_exits, atol=1e-5, rtol=1e-5)
    changed = {name.rsplit(".", 1)[0] for name, p in merged.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name in merged.head_module_names() if any(f"{one}.".startswith(f"{name}.") for one in changed)}
    assert trained == set(merged.head_module_names())  # every head was trained, the adapted layers too
    # The merged model is one like any other: it exits, and is saved and loaded.
    policy = {"criterion": "confidence", "thresholds": [0.6, 0.6, 0.0]}
    merged.set_exit_policy(policy)
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(model).from_pretrained(tmp_path / "merged").eval()
    rows = [{name: values[row] for name, values in inputs.items()} for row in range(12)]
    tuned.set_exit_policy(policy)
    with torch.no_grad():
        wanted = tuned.eval()(**inputs)
    found = predict(loaded, rows, progress=False)
    assert found.exit_index.equal(wanted.exit_index)
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-5, rtol=1e-5)


def test_every_architecture_under_a_task_type(any_architecture, load_exits, tmp_path):
    """What breaks: PEFT adds `classifier` of its own accord, and a module inside it is wrapped twice and lost."""
    model, inputs = load_exits(any_architecture, exit_layers=[1, 3]), any_architecture.inputs()
    model.save_pretrained(tmp_path / "base")
    names = model.head_module_names()
    heads = {id(part) for k in range(3) for head in model.exit_head_modules(k) for part in head.modules()}
    outside = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and id(part) not in heads]
    named = {id(part): name for name, part in model.named_modules()}
    targets = [named[id(part)] for part in outside[:3]]
    task = "SEQ_CLS" if any_architecture.text else None
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=targets, modules_to_save=names, task_type=task)
    )
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wanted = exits_of(tuned, inputs)
    tuned.save_pretrained(tmp_path / "adapter")
    base = type(model).from_pretrained(tmp_path / "base")
    assert (exits_of(base, inputs) - wanted).abs().amax((0, 2)).min() > 1e-3  # of every exit
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(exits_of(again.merge_and_unload(), inputs), wanted, atol=1e-5, rtol=1e-5)
