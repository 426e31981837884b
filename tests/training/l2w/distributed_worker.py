"""Meta-weighted training in two processes; run by `test_distributed.py` under a launcher."""

import copy
import sys
from itertools import islice

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback

from een_hf.models import ExitConfigurationError
from een_hf.training.l2w.meta_batches import meta_batches


def flat(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


class SameEverywhere(TrainerCallback):
    """After every step, all processes have one W and one model."""

    steps = 0

    def __init__(self, networks):
        self.networks = networks

    def on_step_end(self, args, state, control, **kwargs):
        for network in self.networks:
            mine = flat(network)
            others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(others, mine)
            assert all(torch.equal(mine, other) for other in others)
        self.steps += 1


def train(method: str, folder: str) -> None:
    """Five epochs, each process on rows of its own: one W, one model, and the loss falls."""
    trainer = make_trainer(
        bert(),
        folder,
        scheme_args={"meta_gradient": method, "meta_learning_rate": 1e-3},
        size=64,
        num_train_epochs=5,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        logging_steps=2,
        learning_rate=1e-2,
    )
    callback = SameEverywhere([trainer.weight_network, trainer.model])
    trainer.add_callback(callback)
    start = flat(trainer.weight_network)
    trainer.train()
    assert trainer.args.world_size == dist.get_world_size() == 2
    assert callback.steps == trainer.state.global_step == 10
    assert not torch.equal(start, flat(trainer.weight_network))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0], losses


def average(folder: str) -> None:
    """A step of W is Adam's on the plain mean of the processes' gradients, each made alone here."""
    batches = [text_batch(8, seed=10 + process) for process in range(2)]
    trainer = make_trainer(bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), folder)
    trainer.create_optimizer_and_scheduler(10)
    start = trainer.meta_generator.get_state()
    trainer.look_ahead.share_offset = torch.rand((), generator=trainer.meta_generator, dtype=torch.float64).item()
    trainer.meta_generator.set_state(start)
    plain = copy.deepcopy(trainer.weight_network)
    adam = torch.optim.Adam(plain.parameters(), lr=1e-4, weight_decay=1e-4)
    shared, trainer.weight_network = trainer.weight_network, plain
    trainer.model.train()
    for first, second in ((slice(4), slice(4, 8)), (slice(4, 8), slice(4))):
        total = [torch.zeros_like(parameter) for parameter in plain.parameters()]
        for batch in batches:
            halves = ({name: value[rows] for name, value in batch.items()} for rows in (first, second))
            weights, gradient, _ = trainer.meta_gradient(*halves)
            own = torch.autograd.grad(weights, list(plain.parameters()), gradient)
            total = [before + part / 2 for before, part in zip(total, own, strict=True)]
        for parameter, part in zip(plain.parameters(), total, strict=True):
            parameter.grad = part
        adam.step()
    start = flat(shared)
    trainer.weight_network = shared
    trainer.meta_step(batches[dist.get_rank()])
    moved, wanted = flat(shared) - start, flat(plain) - start
    assert moved.norm() > 0
    assert (moved - wanted).norm() < 1e-3 * wanted.norm(), (moved - wanted).norm() / wanted.norm()
    # Adam hardly tells a sum from a mean: compare the last gradient itself.
    for parameter, part in zip(shared.parameters(), total, strict=True):
        assert (parameter.grad - part).norm() < 1e-3 * part.norm(), (parameter.grad - part).norm() / part.norm()


def disjoint_meta_batches(folder: str) -> None:
    """In a pass each row is at most in one meta batch of one process; a run may be resumed at any of them."""
    rows = text_batch(40, seed=3)
    rows["input_ids"][:, 1] = torch.arange(40)
    rows = [{name: column[row] for name, column in rows.items()} for row in range(40)]
    trainer = make_trainer(bert(), folder, scheme_args={"meta_batch_size": 6}, train_dataset=rows, max_steps=4)
    mine = [batch["input_ids"][:, 1] for batch in islice(meta_batches(trainer, 0), 7)]
    assert all(map(torch.equal, mine[4:], (batch["input_ids"][:, 1] for batch in meta_batches(trainer, 4))))
    both = torch.empty(2, *torch.stack(mine).shape, dtype=torch.long)
    dist.all_gather(list(both), torch.stack(mine))
    for start in (0, 3):  # 36 rows in 3 batches of both
        assert len(both[:, start : start + 3].unique()) == 36
    assert not torch.equal(both[:, :3], both[:, 3:6])
    callback, start = SameEverywhere([trainer.weight_network, trainer.model]), flat(trainer.weight_network)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.steps == 4 and not torch.equal(start, flat(trainer.weight_network))


def refuse_shards(folder: str) -> None:
    """Really sharded parameters."""
    model = bert()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    try:
        make_trainer(model, folder)
    except ExitConfigurationError as error:
        assert "--method l2w" in str(error) and "--fsdp" in str(error), error
    else:
        raise AssertionError("sharded parameters were taken")


if __name__ == "__main__":
    from l2w_trainers import bert, make_trainer, text_batch

    method, folder = sys.argv[1:]
    if method == "directional":
        average(folder)
        disjoint_meta_batches(folder)
        refuse_shards(folder)
    train(method, folder)
    print("passed")
