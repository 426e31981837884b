"""Examples of the card: which are chosen, and what may be shown of them."""

import json
import re

import numpy as np
import pytest
from factory import RESULTS, tiny_config
from PIL import Image

from een_hf.hub import (
    choose_examples,
    write_examples,
    write_model_card,
)
from een_hf.models import ExitConfigurationError


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"most_confident": 3}',
        '{"most_confident": [{}]}',
        '{"most_confident": [{"image": "../../x](http://e) ![", "label": 1, "predictions": [], "confidence": 1}]}',
    ],
)
def test_examples_that_are_none_are_named(tmp_path, content):
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "examples.json").write_text(content)
    with pytest.raises(ExitConfigurationError, match="examples.json"):
        write_model_card(tmp_path, RESULTS, tiny_config())


def test_examples_against_a_plain_loop():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 3, 4)).astype(np.float32), rng.integers(4, size=200)
    chosen = choose_examples(logits, labels, list("wxyz"), count=5)

    def softmax(row):
        return np.exp(row) / np.exp(row).sum()

    wanted = {"most_confident": [], "deep": [], "mistakes": []}
    for row in range(200):
        said = [int(logits[row, k].argmax()) for k in range(3)]
        right = [answer == labels[row] for answer in said]
        sure, last = softmax(logits[row, 0]).max(), softmax(logits[row, 2]).max()
        wanted["most_confident" if right[0] else "mistakes"].append((sure, row))
        if right == [False, False, True]:
            wanted["deep"].append((last, row))
    for kind, rows in wanted.items():
        assert [example["row"] for example in chosen[kind]] == [row for _, row in sorted(rows, reverse=True)[:5]]
        for example in chosen[kind]:
            assert example["label"] == "wxyz"[labels[example["row"]]]
            assert example["confidence"] == pytest.approx(softmax(logits[example["row"], 0]).max(), rel=1e-5)


LOGITS = np.array([[[9, 0], [9, 0]], [[5, 0], [0, 5]], [[0, 7], [0, 7]]], dtype=np.float32)  # right; deep; mistake
LABELS = np.array([0, 1, 0])


@pytest.mark.parametrize("shared", [True, False])
def test_texts_are_shown_as_they_are_and_only_if_asked(tmp_path, shared):
    """A text may hold what Markdown and HTML read as markup; it must not change the card."""
    rows = [{"text": t} for t in ("a | *b*\n# c", "<img src=x> `d`", "[e](f)")]
    examples = choose_examples(LOGITS, LABELS, ["no", "yes"])
    folder = write_examples(tmp_path, examples, rows, ["text"], shared=shared)
    assert folder.name == ("examples" if shared else "_examples")
    assert json.loads((folder / "examples.json").read_text())["deep"][0]["text"] == ["<img src=x> `d`"]
    card = write_model_card(tmp_path, RESULTS, tiny_config()).read_text()
    assert ("## Examples" in card) == shared
    if shared:
        assert r"| a \| \*b\* \# c | no | no | no | 0.9999 |" in card
        assert r"&lt;img src=x&gt; \`d\`" in card and r"\[e\](f)" in card
        write_examples(tmp_path, examples, rows, ["text"], shared=False)
        assert not folder.exists()  # what may no longer be shown is gone


def test_images_of_the_card_are_the_rows(tmp_path):
    rows = [{"image": Image.new("L", (8, 8), 40 * number)} for number in range(3)]
    write_examples(tmp_path, choose_examples(LOGITS, LABELS, ["no", "yes"]), rows, ["image"], shared=True)
    card = write_model_card(tmp_path, {**RESULTS, "model_type": "vit"}, tiny_config()).read_text()
    shown = re.findall(r"!\[\]\((examples/.*?)\)", card)
    assert len(shown) == 4
    greys = {name: np.asarray(Image.open(tmp_path / name)) for name in shown}
    expected = {"examples/most_confident-1.png": 0, "examples/deep-1.png": 40, "examples/mistakes-1.png": 80} | {
        "examples/mistakes-2.png": 40
    }
    assert all((greys[name] == value).all() for name, value in expected.items())


def test_examples_of_an_earlier_release_are_shown(tmp_path):
    """What breaks: `een-hf calibrate --save` writes a card without the examples that were there before."""
    rows = [{"text": text} for text in ("first", "second", "third")]
    folder = write_examples(tmp_path, choose_examples(LOGITS, LABELS, ["no", "yes"]), rows, ["text"], shared=True)
    wanted = write_model_card(tmp_path, RESULTS, tiny_config()).read_text()
    assert "### The most confident right answers of exit 1" in wanted
    path = folder / "examples.json"
    path.write_text(path.read_text().replace('"most_confident"', '"surest"'))
    assert write_model_card(tmp_path, RESULTS, tiny_config()).read_text() == wanted
