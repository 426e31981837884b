"""One harness for every architecture: exits change nothing of the stock model, and the mixin does the rest."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from factory import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from een_hf.evaluation.speed import stock_model
from een_hf.inference import ExitRunner, predict
from een_hf.inference.onnx import export_onnx
from een_hf.inference.programs import Lane
from een_hf.models import ExitConfigurationError


LABELS = torch.tensor([0, 2, 1, 1, 0, 2])
EXPORTED = "bert roberta distilbert electra mpnet modernbert vit deit deit_teacher dinov2".split()
CRITERIA = ["confidence", "entropy", "margin", "patience", "vote"]


def assert_close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def attentions(architecture):
    return ["eager", "sdpa"] if architecture.stock_class._supports_sdpa else ["eager"]


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_the_last_exit_is_the_stock_model(any_architecture, load_stock, load_exits):
    """A fine-tuned checkpoint would predict, show or learn something else by getting exits."""
    for attention in attentions(any_architecture):
        stock = load_stock(any_architecture, attn_implementation=attention)
        model = load_exits(any_architecture, exit_layers=[1, 3], attn_implementation=attention)
        assert [model.is_new_head(index) for index in range(3)] == [True, True, False]
        for padding in any_architecture.paddings:
            inputs = any_architecture.inputs(padding=padding)
            wanted = {"output_hidden_states": True, "output_attentions": attention == "eager"}
            output, expected = model(**inputs, **wanted), stock(**inputs, **wanted)
            assert_close(output.logits, expected.logits)
            assert len(output.hidden_states) == len(expected.hidden_states) == 5
            for actual, hidden in zip(output.hidden_states, expected.hidden_states, strict=True):
                assert_close(actual, hidden)
            if attention == "eager":
                for actual, attended in zip(output.attentions, expected.attentions, strict=True):
                    assert_close(actual, attended)
            for network, logits in ((model, output.logits), (stock, expected.logits)):
                network.zero_grad()
                F.cross_entropy(logits, LABELS).backward()
            assert gradients(model).keys() == gradients(stock).keys()
            for name, gradient in gradients(stock).items():
                assert_close(gradients(model)[name], gradient)


def test_saved_reloaded_and_taken_out_again(any_architecture, load_exits, load_stock, tmp_path):
    """A published model would predict something else, or its stock twin in a comparison of speed would."""
    model, inputs = load_exits(any_architecture, exit_layers=[2], exit_aggregation="none"), any_architecture.inputs()
    model.save_pretrained(tmp_path)
    again = any_architecture.auto_class.from_pretrained(tmp_path)
    assert type(again) is any_architecture.model_class and again.newly_initialized == frozenset()
    with torch.no_grad():
        wanted = model(**inputs).exit_logits
        assert torch.equal(again(**inputs).exit_logits, wanted)
        assert_close(stock_model(model)(**inputs).logits, load_stock(any_architecture)(**inputs).logits)
    # Checkpoints of `Trainer` come in by this method.
    other = any_architecture.model_class(copy.deepcopy(model.config)).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(**inputs).exit_logits, wanted)


def test_a_backbone_gets_a_new_last_head(any_architecture, load_exits):
    """Without a fine-tuned head the last exit reads what the others read, where its stock modules can."""
    model = load_exits(any_architecture, what="backbone", exit_layers=[2])
    assert all(model.is_new_head(index) for index in range(2))
    config = model.config
    readable = config.exit_pooling in config.last_exit_poolings
    assert config.last_exit_pooling == (config.exit_pooling if readable else config.stock_pooling)
    assert config.exit_pooling == ("mean" if any_architecture.text else "cls_mean")


def test_fewer_layers_keep_the_last_head(any_architecture, load_exits):
    """A cut network keeps the stock head; a field that stands for another would be set after the exits."""
    model = load_exits(any_architecture, num_hidden_layers=2, exit_layers=[1])
    assert (model.config.exit_layers, len(model.backbone_layers)) == ([1, 2], 2)
    inputs, cut = any_architecture.inputs(), stock_model(load_exits(any_architecture), num_layers=2)
    assert type(cut) is any_architecture.stock_class
    with torch.no_grad():
        assert_close(model(**inputs).logits, cut(**inputs).logits)


@pytest.mark.parametrize("aggregation", ["none", "boosted"])
def test_dynamic_answers_are_the_anytime_answers(any_architecture, load_exits, aggregation):
    """What layers read beside the hidden states must follow those who continue, in the engine and in programs too."""
    model = load_exits(any_architecture, exit_layers=[1, 2, 3], exit_aggregation=aggregation)
    runner = ExitRunner(model)
    for padding in any_architecture.paddings:
        inputs = any_architecture.inputs(16, padding=padding, seed=5)
        rows = [{name: tensor[row] for name, tensor in inputs.items()} for row in range(16)]
        with torch.no_grad():
            every = model(**inputs, early_exit=False).exit_logits
        taken = set()
        for criterion in CRITERIA:
            policy = {"criterion": criterion, "thresholds": [0.0] * 4}
            model.set_exit_policy(policy)
            scores = model.get_exit_policy().scores(every)
            thresholds = (scores.sort(0).values[8:10].mean(0)).tolist()
            model.set_exit_policy({**policy, "thresholds": thresholds})
            with torch.no_grad():
                output = model(**inputs)
            first = [next((k for k in range(3) if row[k] >= thresholds[k]), 3) for row in scores.tolist()]
            found = [output]
            if criterion == "confidence":
                # The stock head of DeBERTa reads the first token, and one of padding attends to all that is padding.
                if padding == "left" and "deberta" in any_architecture.name:
                    with pytest.raises(ExitConfigurationError, match="pad on the right"):
                        runner(**inputs)
                    with pytest.raises(ExitConfigurationError, match="pad on the right"):
                        predict(model, rows, batch_size=4)
                else:
                    found += [predict(model, rows, batch_size=4), runner(**inputs)]
            for logits, exit_index in ((each.logits, each.exit_index) for each in found):
                assert exit_index.tolist() == first
                assert_close(logits, every[range(16), exit_index], 1e-5)
            taken |= set(first)
        assert len(taken) > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision(any_architecture, load_exits, dtype):
    """A part that does not follow the model's dtype ends in an error on the first request that is served."""
    model, inputs = load_exits(any_architecture, exit_layers=[2]), any_architecture.inputs(padding="right")
    if not any_architecture.text:
        inputs = any_architecture.inputs()
    with torch.no_grad():
        expected = model(**inputs).exit_logits
        half = model.to(dtype)(**inputs, labels=LABELS)
    assert half.exit_logits.dtype == dtype
    assert (half.exit_logits.float() - expected).abs().max() / expected.abs().max() < 0.1


@pytest.mark.slow
def test_exported(any_architecture, load_exits, tmp_path):
    """`export_onnx` compares every exit with PyTorch and writes nothing where they differ."""
    pytest.importorskip("onnxruntime")
    if any_architecture.name not in EXPORTED:
        pytest.skip("is not promised to export")
    model = load_exits(any_architecture, exit_layers=[1, 3])
    model.set_exit_policy({"criterion": "confidence", "thresholds": [0.5, 0.5, 0.0]})
    export_onnx(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").exists()


class _NoTraffic(TorchDispatchMode):
    """Refuses operations between a device, for which `meta` stands, and the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        read = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()}
        made = {t.device.type for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        copied = {t.device.type for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        moves = func._schema.name in ("aten::_to_copy", "aten::copy_") and copied == {"cpu"} and made == {"meta"}
        assert len(read) < 2 and not moves, func
        return result


def test_a_stage_never_waits_for_the_device(any_architecture, load_exits):
    """A read from the device, or a copy to it, cannot be captured in a CUDA graph; in eager mode it costs a wait."""
    for attention in attentions(any_architecture):
        model = load_exits(any_architecture, exit_layers=[2], attn_implementation=attention)
        for padding in any_architecture.paddings[-2:]:
            with torch.no_grad():
                inputs = any_architecture.inputs(padding=padding)
                examples = model.embed(**inputs).unpadded()
                there, twin = examples.map(lambda tensor: tensor.to("meta")), copy.deepcopy(model).to("meta")
                # A warm-up, as before a capture: what follows from shapes alone may be kept.
                twin.run_stage(1, there, twin.make_context(there), after=-1)
                inputs = {name: tensor.to("meta") for name, tensor in inputs.items()}
                twin.embed(**inputs)
                with _NoTraffic():
                    twin.embed(**inputs)
                    context = twin.make_context(there)
                    hidden, _ = twin.run_stage(0, there, context)
                    twin.run_stage(1, replace(there, hidden=hidden), context)


class _NoLook(TorchDispatchMode):
    """Refuses operations that look at numbers, or whose results have a shape that depends on them."""

    LOOKS = ("local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "repeat_interleave")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").lstrip("_")
        assert not name.startswith(self.LOOKS), func
        if name.startswith("index"):
            indices = [t for t in tree_leaves(args[1:2]) if isinstance(t, torch.Tensor)]
            assert all(index.dtype not in (torch.bool, torch.uint8) for index in indices), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("aggregation", ["none", "boosted"])
def test_programs_answer_alike_and_look_at_no_number(any_architecture, load_exits, aggregation, monkeypatch):
    """A program that looks cannot be captured; inputs that a network does not take, or padding, change no answer."""
    model = load_exits(any_architecture, exit_layers=[1, 3], exit_aggregation=aggregation)
    runner, compute = ExitRunner(model), Lane.compute

    def compute_without_a_look(lane, segment, rows):
        with _NoLook():
            compute(lane, segment, rows)

    for number, criterion in enumerate((*CRITERIA, None)):
        inputs = any_architecture.inputs(8, padding=("right", "none")[number % 2] if any_architecture.text else "none")
        with torch.no_grad():
            every = model(**inputs, early_exit=False).exit_logits
            if criterion:
                policy = {"criterion": criterion, "thresholds": [0.0] * 3, "temperatures": [0.8, 1.1, 1.0]}
                model.set_exit_policy(policy)
                scores = model.get_exit_policy().scores(every)
                policy["thresholds"] = scores.sort(0).values[4:6].mean(0).tolist()
            model.set_exit_policy(policy if criterion else None)
            wanted = model(**inputs)
        answers = runner(**inputs, token_type=torch.zeros(1))
        if "deberta" not in any_architecture.name:
            # Deberta's constants are numbers that the host computes; of those on the device, see the test before.
            with monkeypatch.context() as patched:
                patched.setattr(Lane, "compute", compute_without_a_look)
                answers = runner(**inputs)
        if criterion:
            assert torch.equal(answers.exit_index, wanted.exit_index)
        assert_close(answers.logits, wanted.logits, 1e-5)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotary_tables_that_depend_on_the_batch_are_refused(rope_type):
    """What breaks: an answer depends on which of the texts beside it have exited."""
    rope = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 1e4}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 8}
    rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    with pytest.raises(ExitConfigurationError, match=f"rope_parameters have rope_type '{rope_type}'"):
        tiny_config("modernbert", pad_token_id=0, rope_parameters=rope)
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    rope["full_attention"] = linear
    assert tiny_config("modernbert", pad_token_id=0, rope_parameters=rope).rope_parameters
