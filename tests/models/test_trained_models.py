"""Dynamic inference of models that have learned something: the model and the engine answer as the all-exits pass."""

import numpy as np
import pytest
import sklearn.datasets
import torch
from factory import tiny_model
from transformers import AutoTokenizer

from een_hf import (
    EarlyExitBertForSequenceClassification,
    EarlyExitTrainingArguments,
    JointExitTrainer,
    predict,
)
from een_hf.data import load_bbc_news


pytestmark = pytest.mark.slow
CRITERIA = ["confidence", "entropy", "margin", "patience", "vote"]
NUM_ROWS, WIDTH = 40, 48


def trained(model, rows, folder, **settings):
    common = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    args = EarlyExitTrainingArguments(str(folder), **common, **settings)
    JointExitTrainer(model=model, args=args, train_dataset=rows).train()
    return model.eval()


@pytest.fixture(scope="module")
def bert(tmp_path_factory, minilm_path):
    """MiniLM after 25 steps on BBC News, and test rows by padding."""
    torch.manual_seed(0)
    tokenizer, news = AutoTokenizer.from_pretrained(minilm_path), load_bbc_news()

    def encode(texts, side="right", **settings):
        tokenizer.padding_side = side
        return dict(tokenizer(texts, truncation=True, max_length=WIDTH, return_tensors="pt", **settings))

    train = encode(news["train"]["text"][:400], padding="max_length") | {"labels": news["train"]["label"][:400]}
    rows = [{name: column[row] for name, column in train.items()} for row in range(400)]
    model = EarlyExitBertForSequenceClassification.from_pretrained(
        minilm_path, num_labels=5, exit_pooling="mean", exit_layers=[1, 2, 4, 6]
    )
    trained(model, rows, tmp_path_factory.mktemp("bert"), num_train_epochs=1, per_device_train_batch_size=16)
    # Titles and articles: every length up to the limit.
    texts = [text.split("\n", 1)[0] if row % 2 else text for row, text in enumerate(news["validation"]["text"])]
    texts = [text[: 20 + 7 * row] for row, text in enumerate(texts[:NUM_ROWS])]
    inputs = {side: encode(texts, side, padding="max_length") for side in ("right", "left")}
    whole = encode(news["validation"]["text"][:NUM_ROWS], padding="max_length")
    assert whole.pop("attention_mask").all()
    return model, {**inputs, "none": whole}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A small ViT after 120 steps on the digits, and test rows."""
    torch.manual_seed(0)
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    pixels = torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    model = tiny_model("vit", **shape, patch_size=2, num_channels=1, num_labels=10)
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, labels, strict=True)]
    settings = {"learning_rate": 3e-3, "max_steps": 120, "per_device_train_batch_size": 32}
    trained(model, rows[NUM_ROWS:], tmp_path_factory.mktemp("vit"), **settings)
    return model, {"images": {"pixel_values": pixels[:NUM_ROWS]}}


def starts(size):
    return range(0, NUM_ROWS, size)


def grid(criterion, scores):
    """Lists of thresholds: quantiles of every exit's scores, or counts."""
    exits = scores.shape[1]
    if criterion in ("patience", "vote"):
        return [[count * (k > 0) for k in range(exits)] for count in (1, 2)] + [[n] * exits for n in (1, 2, 3)]
    return [(np.quantile(scores, share, axis=0) + 1e-7).tolist() for share in (0.1, 0.4, 0.7, 0.9)]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_trained_models_exit_as_the_all_exits_pass_says(kind, criterion, request):
    """What breaks: scores of a trained model, unlike random ones, lie close together or saturate."""
    model, paddings = request.getfixturevalue(kind)
    taken = set()
    if criterion not in ("confidence", "patience"):  # padding acts on hidden states and on what criteria remember
        paddings = dict([next(iter(paddings.items()))])
    for inputs in paddings.values():
        rows = [{name: column[row] for name, column in inputs.items()} for row in range(NUM_ROWS)]
        with torch.no_grad():
            every = model(**inputs, early_exit=False).exit_logits
        model.set_exit_policy({"criterion": criterion, "thresholds": [0.0] * model.num_exits})
        scores = model.get_exit_policy().scores(every.double()).numpy()
        for thresholds in grid(criterion, scores):
            sure = scores >= np.array(thresholds)
            sure[:, -1] = True
            wanted = sure.argmax(1)
            near = np.abs(scores - thresholds)[:, :-1].min(1) <= 1e-5
            clear = ~near | (criterion in ("patience", "vote"))
            model.set_exit_policy({"criterion": criterion, "thresholds": thresholds})
            answers = [predict(model, rows, size, progress=False) for size in (1, 32)]
            answers = [(found.logits, found.exit_index) for found in answers]
            for size in (1, 32):
                with torch.no_grad():
                    batches = [
                        [column[at : at + size] for column in inputs.values()] for at in range(0, NUM_ROWS, size)
                    ]
                    parts = [model(**dict(zip(inputs, batch, strict=True))) for batch in batches]
                answers.append([torch.cat([part[name] for part in parts]) for name in ("logits", "exit_index")])
            for logits, exit_index in answers:
                exits = exit_index.numpy()
                assert (exits == wanted)[clear].all()
                assert (logits - every[range(NUM_ROWS), exits]).abs().max() <= 1e-5
            taken |= set(wanted.tolist())
    assert len(taken) >= 4
