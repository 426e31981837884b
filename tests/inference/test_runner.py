"""The runner's programs answer as the model does: every line but capture and replay runs on a CPU too."""

import copy
import gc
import weakref
from collections import Counter

import pytest
import torch
from factory import tiny_model
from operations import Operations

from een_hf import ExitConfigurationError, ExitPolicy
from een_hf.inference import ExitRunner, predict
from een_hf.inference.programs import row_bucket, segments_of
from een_hf.inference.runner import runner_of
from een_hf.models.policies import NEVER


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
TEXT = {"vocab_size": 99, "max_position_embeddings": 40}
CRITERIA = ["confidence", "entropy", "margin", "patience", "vote"]
COUNTS = {"patience": [1, 1, 2, 0], "vote": [2, 2, 3, 0]}


def make_model(kind, device="cpu", **settings):
    settings = {"num_hidden_layers": 5, "exit_layers": [1, 2, 4], **(TEXT if kind == "bert" else {}), **settings}
    return tiny_model(kind, noise=0.3, **settings).eval().to(device)


class Twice(torch.nn.Module):
    """Takes the place of a module, as adapters do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return 2 * self.module(*args)


def make_inputs(model, batch, length=13, seed=0, padding="right"):
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": 3 * torch.randn(batch, 3, 8, 8, generator=generator)}
    inputs = {"input_ids": torch.randint(1, 99, (batch, length), generator=generator)}
    if padding != "none":
        lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        inputs["attention_mask"] = mask if padding == "right" else mask.flip(1)
    return inputs


def on(model, inputs):
    return {name: value.to(model.device) for name, value in inputs.items()}


@torch.no_grad()
def anytime(model, inputs):
    return model(**on(model, inputs), early_exit=False).exit_logits


def midway_policy(model, inputs, criterion="confidence", **fields):
    """A policy by which examples exit everywhere: thresholds between two scores, so that rounding decides nothing."""
    num_exits = model.num_exits
    if criterion in COUNTS:
        return ExitPolicy(criterion, [float(count) for count in COUNTS[criterion]], **fields)
    scores = ExitPolicy(criterion, [0.0] * num_exits, **fields).scores(anytime(model, inputs).float())
    thresholds = []
    for column in scores.T:
        ordered = column.sort().values
        cut = len(ordered) * 2 // 3
        thresholds.append(float(ordered[max(cut - 1, 0) : cut + 1].mean()))
    return ExitPolicy(criterion, thresholds, **fields)


def assert_as_anytime(runner, model, inputs, policy, tolerance=2e-5):
    """Each example's exit is the first whose score reaches its threshold, and its logits are that exit's."""
    every, answers = anytime(model, inputs), runner(**inputs)
    scores = policy.scores(every.float())
    exits = []
    for row in scores.tolist():
        exits.append(next(k for k, score in enumerate(row) if k == len(row) - 1 or score >= policy.thresholds[k]))
    assert answers.exit_index.tolist() == exits
    wanted = every[torch.arange(len(exits)), exits]
    assert (answers.logits - wanted).abs().max() <= tolerance
    return exits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("aggregation", ["none", "boosted"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_runner_equals_anytime(kind, criterion, aggregation, device):
    """A surplus row that is answered, an order that is applied twice, a state that is left behind."""
    model = make_model(kind, device, exit_aggregation=aggregation)
    temperatures = None if criterion in COUNTS else [0.7, 1.4, 1.1, 1.0]
    policy = midway_policy(model, make_inputs(model, 70), criterion, temperatures=temperatures)
    runner, seen = ExitRunner(model, policy), set()
    for seed, batch in enumerate((70, 1, 2, 3, 8, 33, 64, 1, 70)):
        padding = ("right", "left", "none")[seed % 3]
        inputs = make_inputs(model, batch, (13, 16, 30)[seed % 3], seed=seed, padding=padding)
        seen |= set(assert_as_anytime(runner, model, inputs, policy))
    assert aggregation == "boosted" or len(seen) >= (2 if criterion in COUNTS else 3)


def test_batches_shrink_through_several_buckets():
    """Compaction that keeps the full bucket answers rightly and saves nothing."""
    model = make_model("vit")
    inputs = make_inputs(model, 64)
    runner = ExitRunner(model, midway_policy(model, inputs))
    sizes = []
    for depth, layer in enumerate(model.backbone_layers):
        layer.register_forward_hook(lambda _, args, __, depth=depth: sizes.append((depth, args[0].shape[0])))
    exits = runner(**inputs).exit_index
    for depth, rows in sizes:
        after = [k for k, layer in enumerate(model.config.exit_layers) if layer <= depth]
        there = int((exits > max(after)).sum()) if after else 64
        assert rows == row_bucket(there, 64)
    assert len({rows for _, rows in sizes}) >= 3


@pytest.mark.parametrize(("capacity", "limit"), [(1, 1), (8, 1), (32, 1.15), (512, 1.07)])
def test_buckets_are_few_and_close(capacity, limit):
    """Programs without number fill the memory; coarse ones run on rows that nobody needs."""
    buckets = [row_bucket(count, capacity) for count in range(1, capacity + 1)]
    assert all(count <= rows <= capacity for count, rows in enumerate(buckets, 1))
    assert len(set(buckets)) <= 16
    half = buckets[capacity // 2 - 1 :]
    assert sum(rows / count for count, rows in enumerate(half, max(capacity // 2, 1))) / len(half) <= limit


def test_no_wait_where_no_smaller_bucket_follows():
    """A wait for the device at each exit where hardly any example exits costs more than it saves."""
    model = make_model("bert")
    inputs = make_inputs(model, 16)
    scores = anytime(model, inputs)[:, 0].softmax(-1).amax(-1)
    policy = ExitPolicy("confidence", [float(scores.max()), NEVER, 0.5, 0.0])  # one exits at exit 1
    all_exit = {name: value[scores.argmax()].expand(16, -1) for name, value in inputs.items()}
    runner, calls = ExitRunner(model, policy), []
    model.backbone_layers[1].register_forward_hook(lambda *_: calls.append(1))

    def runs_on(inputs):
        calls.clear()
        answers = runner(**inputs)
        return bool(calls), answers.exit_index

    behind, exits = runs_on(all_exit)
    assert not behind and exits.tolist() == [0] * 16  # nothing is known yet: the count is waited for
    for _ in range(3):
        behind, exits = runs_on(inputs)
        assert behind and exits.tolist().count(0) == 1
    # As the batches before, hardly any example is expected to exit: the layers behind start without asking.
    behind, exits = runs_on(all_exit)
    assert behind and exits.tolist() == [0] * 16


def test_nothing_is_decided_where_nobody_can_exit():
    """Decisions that cannot end anything cost launches, and a wait each."""
    model = make_model("bert")
    assert segments_of(model, ExitPolicy("confidence", [NEVER, 0.5, 2.0, 0.0])) == [[1], [3]]
    assert segments_of(model, None) == [[3]]
    assert segments_of(model, ExitPolicy("vote", [9, 2, NEVER, 0])) == [[0, 1], [2, 3]]
    model.config.exit_aggregation = "boosted"
    assert segments_of(model, ExitPolicy("confidence", [NEVER, 0.5, 2.0, 0.0])) == [[0, 1], [2, 3]]


def test_one_example_is_neither_moved_nor_copied():
    """At batch 1 a layer takes a GPU hardly longer than a copy: what is not the model or its decision must not run."""
    model = make_model("vit")
    inputs = make_inputs(model, 1)
    policy = ExitPolicy("confidence", [-NEVER, 0.5, 0.5, 0.0])
    runner, threshold = ExitRunner(model, policy), torch.tensor(-NEVER)
    runner(**inputs)
    with torch.no_grad(), Operations() as alone:
        examples = model.embed(**inputs)
        _, logits = model.run_stage(0, examples, model.make_context(examples))
        _ = logits.float().softmax(-1).amax(-1) >= threshold
    with Operations() as operations:
        runner(**inputs)
    more = Counter(map(str, operations.ran)) - Counter(map(str, alone.ran))
    # The image to its place and the decision to the host; logits and exit to the caller.
    assert more == {"aten.copy_.default": 2, "aten.clone.default": 2}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("device", DEVICES)
def test_answers_belong_to_the_caller(device, batch):
    """Answers that the next call writes over, or a call that answers what a caller has written over."""
    model = make_model("bert", device)
    policy = midway_policy(model, make_inputs(model, 40))
    runner, before = ExitRunner(model, policy), None
    for seed in range(6):
        inputs = make_inputs(model, batch, seed=seed)
        assert_as_anytime(runner, model, inputs, policy)
        answers = runner(**inputs)
        if before is not None:
            assert all((tensor == -7).all() for tensor in (before.logits, before.exit_index))
        answers.logits.fill_(-7)
        answers.exit_index.fill_(-7)
        before = answers


def test_all_exit_at_once_and_nobody_exits():
    """The ends of the range: the layers behind must not run, and the last exit answers all."""
    model = make_model("bert")
    inputs = make_inputs(model, 9)
    calls = []
    model.backbone_layers[1].register_forward_hook(lambda *_: calls.append(1))
    answers = ExitRunner(model, ExitPolicy("confidence", [-NEVER, 0.5, 0.5, 0.0]))(**inputs)
    assert answers.exit_index.tolist() == [0] * 9 and not calls
    policy = ExitPolicy("confidence", [NEVER] * 4)
    assert_as_anytime(ExitRunner(model, policy), model, inputs, policy)


@pytest.mark.parametrize("device", DEVICES)
def test_another_policy_and_other_weights_between_calls(device):
    """A program must never answer with old weights or old thresholds."""
    model = make_model("vit", device)
    inputs, runner = make_inputs(model, 24), ExitRunner(model)
    policies = [midway_policy(model, inputs), midway_policy(model, inputs, "margin"), ExitPolicy("vote", [1, 2, 3, 0])]
    policies.append(ExitPolicy("confidence", [0.9, *policies[0].thresholds[1:]]))
    policies.append(midway_policy(model, inputs, temperatures=[2.0, 1.0, 0.5, 1.0]))
    for policy in (*policies, *policies):
        model.set_exit_policy(policy)
        assert_as_anytime(runner, model, inputs, policy)
    state = copy.deepcopy(model.state_dict())

    def trained():
        model.train()
        model(**on(model, inputs), labels=torch.zeros(24, dtype=torch.int64, device=device)).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.5 * parameter.grad)
        model.eval()

    changes = {
        "in place": trained,
        "loaded": lambda: model.load_state_dict(state),
        "assigned": lambda: model.load_state_dict({n: t.clone() * 1.1 for n, t in state.items()}, assign=True),
        "data": lambda: setattr(model.classifier.weight, "data", model.classifier.weight.data * -2),
        "moved": lambda: model.double().float(),
        "in another precision": model.double,
        "with another module": lambda: setattr(model.vit.layers[1], "mlp", Twice(model.vit.layers[1].mlp)),
    }
    for name, change in changes.items():
        before = runner(**inputs).logits
        change()
        policy = midway_policy(model, inputs)
        model.set_exit_policy(policy)
        assert_as_anytime(runner, model, inputs, policy)
        if name not in ("moved", "in another precision"):
            assert not torch.equal(before, runner(**inputs).logits)


def test_two_models_and_two_policies_at_once():
    """Static tensors that are shared between runners would be overwritten by the other."""
    models = [make_model("bert"), make_model("vit")]
    runners = []
    for model in models:
        inputs = make_inputs(model, 16)
        for policy in (midway_policy(model, inputs), midway_policy(model, inputs, "entropy")):
            runners.append((ExitRunner(model, policy), model, policy))
    held = []
    for seed in range(3):
        for runner, model, policy in runners:
            inputs = make_inputs(model, 16, seed=seed)
            assert_as_anytime(runner, model, inputs, policy)
            answers = runner(**inputs)
            held.append((answers.logits, answers.logits.clone()))
    # An answer must not change when the next batch comes.
    assert all(torch.equal(now, then) for now, then in held)


@pytest.mark.parametrize("device", DEVICES)
def test_runners_under_several_policies_share_a_model(device):
    """One that answers by another's thresholds or old weights, or forgets what the other still runs."""
    model = make_model("bert", device)
    policies = [midway_policy(model, make_inputs(model, 40), criterion) for criterion in ("entropy", "vote", "margin")]
    policies.append(ExitPolicy("margin", [NEVER] * 4))
    first = ExitRunner(model, policies[0])
    runners = [first, *(first.under(policy.to_dict()) for policy in policies[1:])]
    for seed in range(3):
        inputs = make_inputs(model, 20, seed=seed)
        pairs = zip(runners, policies, strict=True)
        found = [assert_as_anytime(runner, model, inputs, policy) for runner, policy in pairs]
        assert len(set(map(tuple, found))) > 2 and set(found[3]) == {3}
        other = make_model("bert", device, num_labels=3)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1 + 0.05 * seed)
        model.load_state_dict(other.state_dict(), assign=seed == 1)
    with pytest.raises(ExitConfigurationError, match="one per exit"):
        first.under({"criterion": "vote", "thresholds": [1.0]})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_other_precisions(kind, dtype, device):
    """A buffer of another dtype would round answers, or refuse them; autocast is part of what a program is."""
    model = make_model(kind, device)
    half = copy.deepcopy(model).to(dtype)
    for network, autocast in ((half, False), (model, dtype != torch.float32)):
        inputs = make_inputs(network, 20)
        with torch.autocast(device, dtype=dtype, enabled=autocast):
            policy = midway_policy(network, inputs)
            runner, every = ExitRunner(network, policy), anytime(network, inputs)
            for _ in range(2):
                answers = runner(**inputs)
                chosen = every[torch.arange(20), answers.exit_index]
                assert answers.logits.dtype == every.dtype
                # Kernels for fewer rows round otherwise: an example may stop at another exit, with that exit's logits.
                assert (answers.logits - chosen).abs().max() <= {torch.float32: 1e-4}.get(dtype, 0.25)
                assert (policy.exits_of(every.float()) == answers.exit_index).float().mean() >= 0.8
    if dtype != torch.float32:  # without autocast again, by the same runner
        answers, every = runner(**inputs), anytime(model, inputs)
        assert (answers.logits - every[torch.arange(20), answers.exit_index]).abs().max() <= 1e-4


def test_token_types_positions_and_embeddings_are_read():
    """An input that is dropped, or padded by the wrong number, changes answers."""
    model = make_model("bert")
    inputs = make_inputs(model, 6)
    inputs["token_type_ids"] = torch.randint(0, 2, (6, 13))
    inputs["position_ids"] = torch.randperm(40)[:13].expand(6, 13)
    policy = midway_policy(model, inputs)
    assert_as_anytime(ExitRunner(model, policy), model, inputs, policy)
    embedded = {"inputs_embeds": torch.randn(6, 13, 16), "attention_mask": inputs["attention_mask"]}
    policy = midway_policy(model, embedded)
    assert_as_anytime(ExitRunner(model, policy), model, embedded, policy)
    longest = make_inputs(model, 3, 40)
    assert_as_anytime(ExitRunner(model, policy), model, longest, policy)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_recorded_for_gradients(device):
    """Static tensors with a history keep every tensor of every batch: gigabytes after a few."""
    model = make_model("bert", device)
    inputs = make_inputs(model, 6)
    policy, runners = midway_policy(model, inputs), []
    gc.collect()
    before = recorded()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        runners.append(ExitRunner(model, policy))
        with mode():
            answers = runners[-1](**inputs)
        assert recorded() == before and not answers.logits.requires_grad
    assert_as_anytime(runners[1], model, inputs, policy)


def recorded():
    """How many tensors there are that have a history, or that only inference mode can write."""
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return sum(tensor.grad_fn is not None or tensor.is_inference() for tensor in tensors)


def test_what_fills_up_a_text_is_masked_whatever_its_token():
    """What breaks: with RoBERTa's padding token, 1, padding counts as text."""
    model = make_model("bert", pad_token_id=1)
    inputs = make_inputs(model, 3, padding="none")
    torch.testing.assert_close(ExitRunner(model)(**inputs).logits, anytime(model, inputs)[:, -1], atol=2e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_masks_on_the_device():
    """A batch that is taken for unpadded, since the last one was, attends to its padding."""
    model = make_model("bert", "cuda")
    policy = midway_policy(model, make_inputs(model, 32))
    runner = ExitRunner(model, policy)
    for seed, padded in enumerate((False, True, False, True, True)):
        inputs = make_inputs(model, 32, 16, seed=seed)
        if not padded:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        assert_as_anytime(runner, model, on(model, inputs), policy)


def test_training_mode_is_refused():
    """Dropout in answers, frozen into a graph."""
    with pytest.raises(ValueError, match="eval"):
        ExitRunner(make_model("vit").train())(pixel_values=torch.zeros(1, 3, 8, 8))


@pytest.mark.slow
def test_compiled_stages_answer_the_same():
    """A compiled stage that is specialised on one batch would answer others wrongly."""
    model = make_model("bert")
    policy = midway_policy(model, make_inputs(model, 40))
    runner = ExitRunner(model, policy, compile=True)
    for seed, batch in enumerate((40, 7, 1)):
        assert_as_anytime(runner, model, make_inputs(model, batch, seed=seed), policy)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_graphs_equal_eager_programs():
    """Capture that forgets a tensor answers with that of the batch before."""
    model = make_model("bert", "cuda")
    policy = midway_policy(model, make_inputs(model, 64))
    graphs, eager = ExitRunner(model, policy), ExitRunner(model, policy, cuda_graphs=False)
    for seed in range(12):
        inputs = make_inputs(model, (64, 1, 5, 30)[seed % 4], seed=seed)
        ours, theirs = graphs(**inputs), eager(**inputs)
        assert torch.equal(ours.exit_index, theirs.exit_index)
        assert (ours.logits - theirs.logits).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_predict_by_programs_equals_the_engine(kind):
    """Rows that change places, or a batch that is never fetched."""
    model = make_model(kind)
    rows = []
    for seed in range(40):
        inputs = make_inputs(model, 1, 1 + seed % 30, seed=seed, padding="none")
        rows.append({name: value[0] for name, value in inputs.items()})
    sample = make_inputs(model, 40, 30)
    for policy in (None, midway_policy(model, sample), ExitPolicy("patience", [9, 1, 2, 0])):
        model.set_exit_policy(policy)
        wanted = predict(model, rows, 8, cuda_graphs=False)
        for data in (rows, iter(rows)):
            found = predict(model, data, 8, cuda_graphs=True)
            assert torch.equal(found.exit_index, wanted.exit_index)
            assert (found.logits - wanted.logits).abs().max() <= 2e-5
            assert (found.confidence - wanted.confidence).abs().max() <= 1e-5
    assert copy.deepcopy(model)(**sample, early_exit=False).exit_logits.shape == (40, 4, 3)
    assert predict(model, [], cuda_graphs=True).logits.shape == (0, 3)


def makes_buffers(runner, inputs):
    """Whether a batch is answered by new programs, on tensors of their own."""
    with Operations() as operations:
        runner(**inputs)
    return torch.ops.aten.zeros.default in operations.ran


def lend(tensor):
    """Puts a tensor into memory of which the answer says whether it is still held: `None` once it is not."""
    memory = tensor.detach().numpy().copy()
    tensor.data = torch.from_numpy(memory)
    return weakref.ref(memory)


@pytest.mark.parametrize("change", ["data", "parameter", "module", "part", "attention"])
def test_what_graphs_read_is_watched_and_kept(change):
    """A graph of replaced weights or modules answers for another network; one of freed memory ends the process."""
    model = make_model("bert")
    inputs, head, layer = make_inputs(model, 3), model.classifier, model.bert.encoder.layer[0].output
    changes = {
        "data": lambda: setattr(head.weight, "data", head.weight.data.clone()),
        "parameter": lambda: setattr(head, "weight", torch.nn.Parameter(head.weight.data.clone())),
        "module": lambda: setattr(layer, "dense", Twice(layer.dense)),
        "part": lambda: model.register_module("another", torch.nn.Linear(1, 1)),
        "attention": lambda: model.set_attn_implementation("eager"),
    }
    held, runner = lend(head.weight), ExitRunner(model)
    assert makes_buffers(runner, inputs) and not makes_buffers(runner, inputs)
    changes[change]()
    assert held() is not None  # a graph may be running
    assert makes_buffers(runner, inputs) and not makes_buffers(runner, inputs)
    assert (held() is None) == (change in ("data", "parameter"))


def test_a_copy_of_a_model_has_a_runner_of_its_own():
    """What breaks: a shallow copy with another head is answered by the network that it was copied from."""
    model = make_model("bert")
    runner, other = runner_of(model), copy.copy(model)
    other._modules = {**model._modules, "classifier": Twice(model.classifier)}
    inputs = make_inputs(model, 3)
    torch.testing.assert_close(runner_of(other)(**inputs).logits, 2 * runner(**inputs).logits)
    assert runner_of(model) is runner


def test_what_the_network_cannot_take_is_refused_before_it_runs():
    """On a device it would end in an assertion that no later call survives."""
    model, calls = make_model("bert", exit_pooling="cls"), []
    model.bert.embeddings.register_forward_pre_hook(lambda *_: calls.append(1))
    runner = ExitRunner(model)
    with pytest.raises(ExitConfigurationError, match="41 tokens, the model takes at most 40"):
        runner(**make_inputs(model, 2, 41))
    with pytest.raises(ExitConfigurationError, match="4-D"):
        runner(input_ids=torch.ones(2, 5, dtype=torch.int64), attention_mask=torch.ones(2, 1, 5, 5))
    assert not calls
