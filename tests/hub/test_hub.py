"""Sharing on the Hub, through a real server on the loopback interface, and the model card that goes along."""

import ast
import copy
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from factory import RESULTS as WHOLE_RESULTS
from hub.server import header_errors
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from transformers import pipeline

from een_hf.evaluation import write_exit_results
from een_hf.hub import (
    choose_examples,
    guarantee_in_words,
    hub_name,
    is_run_card,
    public_settings,
    refresh_model_card,
    write_examples,
    write_model_card,
)
from een_hf.hub.sections import NETWORKS
from een_hf.models import MODEL_CLASSES, EarlyExitBertConfig, ExitConfigurationError, ExitPolicy
from een_hf.training import EarlyExitTrainingArguments
from een_hf.training.publishing import publishing


ROOT = Path(__file__).parents[2]
SERVER = Path(__file__).with_name("server.py")

PUSH = """
import sys
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers import BertTokenizer, ViTImageProcessor

import een_hf
from een_hf.data.images import IMAGES
from een_hf.hub import write_model_card
from een_hf.commands.train import main
from factory import RESULTS

folder = sys.argv[1]
torch.manual_seed(0)
shape = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, exit_layers=[1, 2, 4])
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
with open(f"{folder}/vocab.txt", "w") as file:
    file.write("\\n".join(words))
tokenizer = BertTokenizer(f"{folder}/vocab.txt")
texts = ["a b c d e f g h i j", "c", "d e f", "j j j a", "b a", "i h g f e"]
bert = een_hf.EarlyExitBertForSequenceClassification(
    een_hf.EarlyExitBertConfig(vocab_size=len(words), max_position_embeddings=32, initializer_range=0.5, **shape)
)
vit = een_hf.EarlyExitViTForImageClassification(
    een_hf.EarlyExitViTConfig(image_size=8, patch_size=4, initializer_range=0.5, num_labels=3, **shape)
)
pixels = torch.randn(6, 3, 8, 8)
inputs = {"bert": dict(tokenizer(texts, padding=True, return_tensors="pt")), "vit": {"pixel_values": pixels}}
loaders = {"bert": AutoModelForSequenceClassification, "vit": AutoModelForImageClassification}
expected = {}
write_model_card(folder, RESULTS, bert.config, repo_id="someone/bert").rename(f"{folder}/bert_card.md")
for name, model in (("bert", bert), ("vit", vit)):
    model.eval()
    with torch.no_grad():
        scores = model(**inputs[name]).exit_logits.softmax(-1).amax(-1)
    thresholds = [float(scores[:, k].sort().values[2:4].mean()) for k in range(2)] + [0.0]
    model.set_exit_policy({"criterion": "confidence", "thresholds": thresholds})
    with torch.no_grad():
        output = model(**inputs[name])
    expected[name] = {"inputs": inputs[name], "logits": output.logits, "exit_index": output.exit_index}
    model.push_to_hub(f"someone/{name}")
    # Where the package is there, its classes load the repository and nothing has to be trusted.
    again = loaders[name].from_pretrained(f"someone/{name}").eval()
    assert type(again) is type(model), type(again)
    with torch.no_grad():
        assert torch.equal(again(**inputs[name]).logits, output.logits)
tokenizer.push_to_hub("someone/bert")
ViTImageProcessor(size={"height": 8, "width": 8}).push_to_hub("someone/vit")
torch.save({"texts": texts, **expected}, f"{folder}/expected.pt")

overrides = "hidden_size=16,num_hidden_layers=3,num_attention_heads=2,intermediate_size=32,patch_size=4"
flags = ["--model_type=vit", f"--config_overrides={overrides}", "--image_size=8", "--dataset_name=digits"]
flags += ["--do_train", "--do_eval", "--max_train_samples=64", "--max_eval_samples=60", "--num_train_epochs=1"]
flags += ["--target_cost=0.7", "--save_strategy=epoch", "--use_cpu", "--disable_tqdm=True", "--learning_rate=0.005"]
flags += ["--push_to_hub", "--hub_model_id=someone/digits-run", "--hub_always_push", f"--output_dir={folder}/run"]
flags += ["--hub_strategy=all_checkpoints", "--eval_strategy=epoch", "--load_best_model_at_end", "--report_to=all"]
flags += ["--push_handler"]
flags += ["--hub_token=hf_planted_one", "--token=hf_planted_two", f"--cache_dir={folder}/cache", "--logging_steps=1"]
sys.argv[1:] = flags
main(IMAGES, flags)
"""

LOAD = """
import importlib.util
import re
import sys


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "een_hf":
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, NotInstalled())
import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from transformers import (
    AutoImageProcessor, AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer
)

# First of all, before any class is known: the card's own block, a prompt of which nobody would answer.
for card in (sys.argv[1] + "/bert_card.md", hf_hub_download("someone/digits-run", "README.md")):
    with open(card) as file:
        exec(re.search(r"```python\\n(.*?)```", file.read(), re.DOTALL)[1])
found = torch.load(sys.argv[1] + "/expected.pt")
loaders = {"bert": AutoModelForSequenceClassification, "vit": AutoModelForImageClassification}
for name, auto_class in loaders.items():
    model = auto_class.from_pretrained(f"someone/{name}", trust_remote_code=True).eval()
    counts = {}
    for depth, layer in enumerate(model.backbone_layers):
        layer.register_forward_hook(lambda _, args, out, depth=depth: counts.__setitem__(depth, len(args[0])))
    with torch.no_grad():
        output = model(**found[name]["inputs"])
    found[name] |= {"found_logits": output.logits, "found_exit_index": output.exit_index, "rows": counts}
    model.save_pretrained(f"{sys.argv[1]}/again-{name}")
    model = auto_class.from_pretrained(f"{sys.argv[1]}/again-{name}", trust_remote_code=True).eval()
    with torch.no_grad():
        found[name]["again_logits"] = model(**found[name]["inputs"]).logits
tokenizer = AutoTokenizer.from_pretrained("someone/bert")
found["token_ids"] = tokenizer(found["texts"], padding=True, return_tensors="pt")["input_ids"]
run = AutoModelForImageClassification.from_pretrained("someone/digits-run", trust_remote_code=True)
found["run_policy"] = run.config.exit_policy
found["processor"] = AutoImageProcessor.from_pretrained("someone/digits-run").size["height"]
# As Inference Endpoints do: the file of the repository, with the folder of the model.
spec = importlib.util.spec_from_file_location("handler", hf_hub_download("someone/digits-run", "handler.py"))
handler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(handler)
image = Image.new("L", (8, 8), 99)
answer = handler.EndpointHandler(sys.argv[1] + "/run")({"inputs": [image], "parameters": {"top_k": 3, "exits": True}})
found["handler"] = {"image": image, "answer": answer}
assert not any(name.split(".")[0] == "een_hf" for name in sys.modules)
torch.save(found, sys.argv[1] + "/found.pt")
"""


CARD = """
import json
import re
import sys

from huggingface_hub import hf_hub_download

with open(hf_hub_download("someone/digits-run", "README.md")) as file:
    blocks = re.findall(r"```python\\n(.*?)```", file.read(), re.DOTALL)
names, policies = {}, []
for block in blocks:
    exec(block, names)
    policies.append(names["model"].config.exit_policy)
with open(sys.argv[1] + "/policies.json", "w") as file:
    json.dump(policies, file)
"""


PUSH_ALL = """
import sys
import torch
from models.conftest import STOCK, _architecture, _scramble

expected = {}
for name in STOCK:
    architecture = _architecture(name)
    if architecture.model_class.__module__.startswith("een_hf."):
        fields = {**architecture.stock_config.to_dict(), "model_type": None, "exit_layers": [1, 3]}
        fields |= {"distillation_head": True} if name == "deit_teacher" else {}
        model = _scramble(architecture.model_class(architecture.config_class(**fields)))
        inputs = architecture.inputs(padding=architecture.paddings[0])
        with torch.no_grad():
            scores = model(**inputs).exit_logits.softmax(-1).amax(-1)
            thresholds = [float(scores[:, k].sort().values[2:4].mean()) for k in range(2)] + [0.0]
            model.set_exit_policy({"criterion": "confidence", "thresholds": thresholds})
            output = model(**inputs)
        model.push_to_hub(f"someone/{name}")
        expected[name] = {"text": architecture.text, "inputs": inputs}
        expected[name] |= {"logits": output.logits, "exit_index": output.exit_index}
torch.save(expected, sys.argv[1] + "/expected.pt")
"""

LOAD_ALL = """
import sys


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "een_hf":
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, NotInstalled())
import torch
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

for name, wanted in torch.load(sys.argv[1] + "/expected.pt").items():
    auto_class = AutoModelForSequenceClassification if wanted["text"] else AutoModelForImageClassification
    model = auto_class.from_pretrained(f"someone/{name}", trust_remote_code=True).eval()
    with torch.no_grad():
        output = model(**wanted["inputs"])
    assert (output.logits - wanted["logits"]).abs().max() <= 1e-5, name
    assert output.exit_index.equal(wanted["exit_index"]), name
    assert len(set(output.exit_index.tolist())) > 1, name
"""


def run_python(code, folder, endpoint, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_")) and k != "PYTHONPATH"}
    hub = {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    hub |= {"HF_DATASETS_OFFLINE": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**kept, **hub, **environment},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server's folder, after the models and a run were pushed and loaded again without the package."""
    folder, store = tmp_path_factory.mktemp("planted"), tmp_path_factory.mktemp("hub")
    command = [sys.executable, str(SERVER), str(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            endpoint = server.stdout.readline().strip()
            ours = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
            wandb = {"WANDB_MODE": "offline", "WANDB_DIR": str(store)}
            run_python(PUSH, folder, endpoint, HF_HOME=str(folder / "pusher"), PYTHONPATH=ours, **wandb)
            run_python(LOAD, folder, endpoint, HF_HOME=str(folder / "loader"))
            run_python(CARD, folder, endpoint, HF_HOME=str(folder / "reader"), PYTHONPATH=str(ROOT))
        finally:
            server.terminate()
    return {"folder": folder, "store": store / "someone", "commits": store / "commits.jsonl", "all": store}


@pytest.mark.slow
def test_without_the_package_every_architecture_answers_the_same(tmp_path):
    """An adapter that imports more than its siblings runs on its author's machine only."""
    (tmp_path / "hub").mkdir()
    command = [sys.executable, str(SERVER), str(tmp_path / "hub")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            endpoint = server.stdout.readline().strip()
            ours = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
            run_python(PUSH_ALL, tmp_path, endpoint, HF_HOME=str(tmp_path / "pusher"), PYTHONPATH=ours)
            run_python(LOAD_ALL, tmp_path, endpoint, HF_HOME=str(tmp_path / "loader"))
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def found(hub):
    import torch

    return torch.load(hub["folder"] / "found.pt", weights_only=False)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_without_the_package_a_pushed_model_answers_the_same(found, name):
    """Custom code that lacks a file, or falls back to all exits, makes a shared model fail or slow."""
    ours = found[name]
    assert ours["found_logits"].equal(ours["logits"])
    assert ours["found_exit_index"].equal(ours["exit_index"])
    assert ours["again_logits"].equal(ours["logits"])


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_without_the_package_rows_that_leave_stop_computing(found, name):
    """Each layer must see just the rows whose exit lies at or behind it."""
    exits = np.array([1, 2, 4])[found[name]["exit_index"].numpy()]
    assert len(set(exits)) > 1
    expected = {depth: int((exits > depth).sum()) for depth in range(4) if (exits > depth).any()}
    assert found[name]["rows"] == expected


def test_the_tokenizer_travels_along(found):
    assert found["token_ids"].equal(found["bert"]["inputs"]["input_ids"])


def test_a_trainers_push_brings_all_that_the_card_speaks_of(hub, found):
    files = {path.name for path in (hub["store"] / "digits-run").iterdir()}
    assert files >= {
        "README.md",
        "config.json",
        "exit_curves.png",
        "exit_results.json",
        "model.safetensors",
        "modeling_een.py",
        "modeling_een_vit.py",
        "preprocessor_config.json",
    }
    results = json.loads((hub["store"] / "digits-run" / "exit_results.json").read_text())
    assert found["run_policy"]["thresholds"] == results["policy"]["thresholds"]
    assert found["processor"] == 8


def test_the_handler_of_inference_endpoints_answers_without_the_package(hub, found):
    """What breaks: an endpoint that was made of a pushed model does not start, or answers otherwise."""
    assert (hub["store"] / "digits-run" / "handler.py").is_file()
    folder = str(hub["folder"] / "run")
    classify = pipeline("early-exit-image-classification", model=folder, image_processor=folder, device="cpu")
    (wanted,), (answer,) = classify([found["handler"]["image"]], top_k=3), found["handler"]["answer"]
    for label, other in zip(answer, wanted, strict=True):
        assert set(label) == {"label", "score", "exit_layer"}
        assert label["label"] == other["label"] and label["exit_layer"] == other["exit_layer"]
        assert label["score"] == pytest.approx(other["score"], abs=1e-5)


def test_examples_are_not_published_unasked(hub):
    """They are users' data: found in the run's folder, not on the Hub."""
    assert (hub["folder"] / "run" / "_examples" / "examples.json").is_file()
    assert list((hub["folder"] / "run" / "_examples").glob("*.png"))
    assert not [path for path in (hub["store"] / "digits-run").rglob("*") if "examples" in str(path)]
    assert "## Examples" not in (hub["store"] / "digits-run" / "README.md").read_text()


def assert_nothing_private(store):
    """No file that was pushed, and none that wandb would send, holds a token or names the run's folder."""
    wandb = list(store.glob("wandb/offline-run-*"))
    files = [path for path in store.rglob("*") if path.is_file() and "logs" not in path.relative_to(store).parts]
    names = {path.name for path in files}
    assert wandb and {"training_args.bin", "trainer_state.json"} <= names and any("tfevents" in name for name in names)
    assert any(name.endswith(".wandb") for name in names) and list(store.rglob("checkpoint-*/training_args.bin"))
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                content = b"".join(array.tobytes() for array in arrays.values())
        assert b"planted" not in content and b"hf_test" not in content, path


def test_no_token_and_no_folder_leaves_the_machine(hub):
    """What a Trainer pickles, TensorBoard's events, wandb's record of the command line: all of it goes out."""
    assert_nothing_private(hub["all"])


TEXT_RUN = """
import sys
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
from een_hf.data.text import TEXT
from een_hf.commands.train import main

folder = sys.argv[1]
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(f"{folder}/source")
shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=15)
BertForSequenceClassification(BertConfig(**shape, max_position_embeddings=32)).save_pretrained(f"{folder}/source")
for name in ("train", "dev"):
    with open(f"{folder}/{name}.csv", "w") as file:
        file.write("text,label\\n" + "".join(f"{'a b c' if i % 2 else 'e f'},{i % 2}\\n" for i in range(40)))
flags = f"--model_name_or_path {folder}/source --train_file {folder}/train.csv --validation_file {folder}/dev.csv"
flags += f" --test_file {folder}/dev.csv --do_train --do_eval --do_predict --num_train_epochs 2 --target_cost 0.9"
flags += " --save_strategy epoch --eval_strategy epoch --load_best_model_at_end --use_cpu --disable_tqdm True"
flags += " --push_to_hub --hub_model_id someone/text-run --hub_always_push --hub_strategy all_checkpoints"
flags += f" --hub_token hf_planted_one --token hf_planted_two --output_dir {folder}/run --cache_dir {folder}/cache"
sys.argv[1:] = [*flags.split(), "--report_to=all", "--logging_steps=1"]
main(TEXT)
"""


@pytest.mark.slow
def test_no_token_and_no_folder_of_a_text_run_leaves_the_machine(tmp_path):
    """As above, with a tokenizer and weights from a local folder."""
    folder, store = tmp_path / "planted", tmp_path / "hub"
    folder.mkdir()
    store.mkdir()
    command = [sys.executable, str(SERVER), str(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            endpoint, wandb = server.stdout.readline().strip(), {"WANDB_MODE": "offline", "WANDB_DIR": str(store)}
            run_python(TEXT_RUN, folder, endpoint, HF_HOME=str(folder / "home"), PYTHONPATH=str(ROOT), **wandb)
        finally:
            server.terminate()
    assert_nothing_private(store)


def test_arguments_are_whole_unless_they_are_published(tmp_path):
    """Another process that gets them pickled must write to the same folder and push with the same token."""
    args = EarlyExitTrainingArguments(str(tmp_path / "out"), hub_token="hf_planted", report_to="none", use_cpu=True)
    for again in (pickle.loads(pickle.dumps(args)), copy.deepcopy(args), copy.copy(args)):
        assert (again.output_dir, again.hub_token) == (args.output_dir, "hf_planted")
    with publishing():
        told = pickle.loads(pickle.dumps(args))
    assert (told.output_dir, told.hub_token, told.learning_rate) == ("out", None, args.learning_rate)
    assert (args.to_dict()["output_dir"], args.to_dict()["hub_token"]) == ("out", None)


def test_what_may_be_published():
    settings = {"token": "x", "hub_token": "x", "tokenizer_name": "google/bert", "output_dir": "runs/mine", "seed": 3}
    settings |= {
        "train_file": "a/b.csv",
        "run_name": "/home/me/x",
        "nested": {"cache_dir": "/a/b", "list": ["/a/b", 1]},
    }
    assert public_settings(settings) == {
        "token": None,
        "hub_token": None,
        "tokenizer_name": "google/bert",
        "output_dir": "mine",
        "seed": 3,
        "train_file": "b.csv",
        "run_name": "x",
        "nested": {"cache_dir": "b", "list": ["b", 1]},
    }


def test_every_push_of_a_run_can_be_loaded(hub):
    """A push in the middle of training brings a config that names the code: the code must be there too."""
    commits = [json.loads(line) for line in hub["commits"].read_text().splitlines()]
    pushed = [set(commit["files"]) for commit in commits if commit["repo"] == "someone/digits-run"]
    there = set()
    for files in pushed:
        there |= files
        if "config.json" in there:
            assert there >= {"modeling_een_vit.py", "configuration_een.py", "exits.py", "policies.py"}
    assert "README.md" not in pushed[0]


# The card


@pytest.fixture(scope="module")
def card_of_run(hub):
    folder = hub["store"] / "digits-run"
    return ModelCard.load(folder / "README.md"), json.loads((folder / "exit_results.json").read_text())


def table_rows(text, first_column):
    """The cells of the table whose header begins so."""
    lines = text[text.index(f"| {first_column} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_the_header_is_what_the_hub_reads(card_of_run):
    card, results = card_of_run
    header = card.data.to_dict()
    assert ModelCardData(**header).to_dict() == header
    assert (header["library_name"], header["pipeline_tag"]) == ("transformers", "image-classification")
    assert {"early-exit", "joint", "vit"} <= set(header["tags"])
    assert "datasets" not in header and "base_model" not in header  # digits is no data set of the Hub
    name, measured = model_index_to_eval_results(header["model-index"])
    assert name == "someone/digits-run"
    wanted = [row["metrics"]["accuracy"] for row in results["anytime"]] + [results["policy"]["metrics"]["accuracy"]]
    assert [result.metric_value for result in measured] == [round(value, 4) for value in wanted]
    assert {result.metric_type for result in measured} == {"accuracy"}


def test_the_server_refuses_a_header_that_the_hub_would_refuse(card_of_run):
    """Otherwise that the pushes went through would say nothing about the card."""
    card, _ = card_of_run
    assert header_errors(card.content) == []
    assert header_errors("no header") and header_errors("---\n: [\n---\n")
    for before, after in (
        ("pipeline_tag: image-classification", "pipeline_tag: classification"),
        ("type: image-classification", "kind: image-classification"),
        ("- early-exit", "- 3"),
    ):
        assert before in card.content and header_errors(card.content.replace(before, after))


def test_figures_are_those_of_the_results(card_of_run):
    card, results = card_of_run
    header, *rows = table_rows(card.text, "exit")
    assert header == ["exit", "layer", "relative cost", "accuracy", "loss", "share exiting"]
    assert len(rows) == len(results["anytime"])
    for cells, row, share in zip(rows, results["anytime"], results["policy"]["exit_fractions"], strict=True):
        wanted = [row["exit"], row["layer"], row["relative_cost"], row["metrics"]["accuracy"], row["loss"], share]
        assert [float(cell) for cell in cells] == [round(value, 4) for value in wanted]
    budgets = table_rows(card.text, "budget")[1:]
    wanted = [[row["target_cost"], row["relative_cost"], row["metrics"]["accuracy"]] for row in results["budgeted"]]
    assert [[float(cell) for cell in cells] for cells in budgets] == [[round(v, 4) for v in row] for row in wanted]
    assert f"relative cost {results['policy']['relative_cost']:.4f}" in card.text


def test_the_card_says_nothing_of_the_machine(hub, card_of_run):
    text = card_of_run[0].content
    for private in (str(hub["folder"]), str(ROOT), os.uname().nodename, "+cpu", "/home", "/tmp"):
        assert private not in text
    assert 'from_pretrained("someone/digits-run", trust_remote_code=True)' in text
    assert "(exit_curves.png)" in text


def test_the_code_of_the_card_runs(hub, card_of_run):
    """Load, another budget from the results file, the same by hand: the reader's first three steps."""
    loaded, budget, by_hand = json.loads((hub["folder"] / "policies.json").read_text())
    results = card_of_run[1]
    assert loaded["thresholds"] == results["policy"]["thresholds"]
    wanted = max((row for row in results["budgeted"] if row["target_cost"] <= 0.5), key=lambda row: row["target_cost"])
    for policy in (budget, by_hand):
        assert (policy["criterion"], policy["thresholds"]) == (wanted["criterion"], wanted["thresholds"])
        assert policy["temperatures"] == wanted["temperatures"]


RESULTS = {
    **WHOLE_RESULTS,
    "method": "l2w",
    "dataset": "stanfordnlp/sst2",
    "anytime": [
        {"exit": 1, "layer": 1, "relative_cost": 0.51234, "loss": 0.7, "metrics": {"accuracy": 0.56784}, "ece": 0.1},
        {"exit": 2, "layer": 2, "relative_cost": 1.0, "loss": 0.3, "metrics": {"accuracy": None}, "ece": 0.2},
    ],
    "budgeted": [],
    "policy": None,
}
GUARANTEE = {"risk": "consistency", "limit": 0.02, "confidence": 0.9, "errors": 3, "num_rows": 500}


def test_a_card_names_hub_sources_and_hides_local_paths(tmp_path):
    settings = {"method": "l2w", "model_name_or_path": "/data/secret/my-bert", "dataset_name": "/data/secret/reviews"}
    settings |= {"learning_rate": 0.001, "output_dir": "/data/secret/out", "train_file": "/data/secret/rows.csv"}
    results = {**RESULTS, "dataset": "/data/secret/reviews"}
    text = write_model_card(tmp_path, results, EarlyExitBertConfig(), settings=settings).read_text()
    assert "secret" not in text and str(tmp_path) not in text
    assert "my-bert" in text and "reviews" in text and "learning_rate: 0.001" in text
    assert "Learning to Weight Samples" in text
    sources = {"base_model": "google/bert", "dataset_id": "stanfordnlp/sst2", "repo_id": "someone/mine"}
    path = write_model_card(tmp_path, RESULTS, EarlyExitBertConfig(), metadata={"license": "mit"}, **sources)
    header = ModelCard.load(path).data
    assert (header.base_model, header.datasets, header.license) == ("google/bert", ["stanfordnlp/sst2"], "mit")
    assert [result.metric_value for result in header.eval_results] == [0.5678]  # a metric without a value is left out


def test_a_new_policy_keeps_the_rest_of_the_card(tmp_path):
    """`een-hf calibrate --save` knows neither where the run was pushed nor what it started from."""
    sources = {"base_model": "google/bert", "dataset_id": "stanfordnlp/sst2", "repo_id": "someone/mine"}
    path = write_model_card(tmp_path, RESULTS, EarlyExitBertConfig(), metadata={"license": "mit"}, **sources)
    before = ModelCard.load(path)
    policy = {"criterion": "margin", "thresholds": [0.25, 0.0], "calibrated_for": {"max_risk": 0.02}}
    policy |= {
        "guarantee": GUARANTEE,
        "relative_cost": 0.7,
        "metrics": {"accuracy": 0.8},
        "exit_fractions": [0.6, 0.4],
    }
    refresh_model_card(tmp_path, {**RESULTS, "policy": policy}, EarlyExitBertConfig(), {})
    after = ModelCard.load(path)
    for name in ("model_name", "base_model", "datasets", "license", "tags"):
        assert getattr(after.data, name) == getattr(before.data, name)
    assert "`margin`" in after.text and "0.2500" in after.text
    assert guarantee_in_words(GUARANTEE) in after.text and "No exit policy" in before.text


def test_a_card_without_a_policy_says_only_what_works(tmp_path):
    """No budget below one half, or none at all (several labels per row): code that raises helps nobody."""
    text = write_model_card(tmp_path, RESULTS, EarlyExitBertConfig()).read_text()
    assert "no other policy" in text and "set_exit_policy" not in text
    budget = {"target_cost": 0.7123, "relative_cost": 0.7, "metrics": {"accuracy": 0.8}, "exit_fractions": [0.6, 0.4]}
    budget |= {"criterion": "margin", "thresholds": [0.25, 0.0]}
    results = {**RESULTS, "budgeted": [budget, {**budget, "target_cost": 1.0, "thresholds": [1e30, 0.0]}]}
    text = write_model_card(tmp_path, results, EarlyExitBertConfig()).read_text()
    path = write_exit_results(tmp_path, results)
    target = float(re.search(r"target_cost=([\d.]+)", text)[1])
    assert ExitPolicy.from_results(path, target_cost=target).thresholds == budget["thresholds"]


HOSTILE = 'x`y|<b>z</b>\n# owned\n```\n[l](http://e) "+exit()+" '


def test_no_name_changes_the_card_or_its_code(tmp_path):
    """Names of metrics, criteria, risks, repositories and flags are data: who picks them must not write the card."""
    policy = {"criterion": HOSTILE, "thresholds": [0.25, 0.0], "calibrated_for": {"max_risk": 0.02}}
    policy |= {"guarantee": {**GUARANTEE, "risk": HOSTILE}, "relative_cost": 0.7, "exit_fractions": [0.6, 0.4]}
    policy["metrics"] = {HOSTILE: 0.5}
    budget = {**WHOLE_RESULTS["budgeted"][0], "metrics": {HOSTILE: 0.5}, "criterion": HOSTILE}
    rows = [{**row, "metrics": {HOSTILE: 0.5}} for row in WHOLE_RESULTS["anytime"]]
    results = {**RESULTS, "anytime": rows, "policy": policy, "budgeted": [budget], "method": HOSTILE}
    results |= {"dataset": HOSTILE, "task_name": HOSTILE, "metric": HOSTILE}
    settings = {"model_name_or_path": HOSTILE, "dataset_name": HOSTILE, "max_seq_length": HOSTILE}
    path = write_model_card(tmp_path, results, EarlyExitBertConfig(), settings=settings, repo_id=HOSTILE)
    text = ModelCard.load(path).text
    outside, blocks = [], []
    for number, part in enumerate(re.split(r"^(```+)(\w*)$", text, flags=re.MULTILINE)):
        (outside if number % 6 == 0 else blocks if number % 6 == 3 else []).append(part)
    outside = re.sub(r"(?<!\\)`[^`]*`", "", "".join(outside))
    assert not re.search(r"^ *# owned|<b>|(?<!\\)\]\(http", outside, re.MULTILINE)
    for line in outside.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (4, 7), line  # the columns of budgets, and of exits
    code = [block for block in blocks if "import" in block or "set_exit_policy" in block]
    assert len(code) == 3
    for block in code:
        calls = [node.func for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
        assert calls and not [call for call in calls if getattr(call, "id", None) == "exit"]


def test_a_scheme_that_a_file_names_is_not_imported(tmp_path, monkeypatch):
    """exit_results.json and config.json come with a model: their strings must not run code."""
    (tmp_path / "payload.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    results = {**RESULTS, "method": "payload:X"}
    for settings in (None, {"method": "payload:X"}):
        text = write_model_card(tmp_path, results, EarlyExitBertConfig(), settings=settings).read_text()
        assert "`payload:X`" in text
    refresh_model_card(tmp_path, results, EarlyExitBertConfig(training_scheme="payload:X"), {})
    assert "payload" not in sys.modules


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"surest": 3}',
        '{"surest": [{}]}',
        '{"surest": [{"image": "../../x](http://e) ![", "label": 1, "predictions": [], "confidence": 1}]}',
    ],
)
def test_examples_that_are_none_are_named(tmp_path, content):
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "examples.json").write_text(content)
    with pytest.raises(ExitConfigurationError, match="examples.json"):
        write_model_card(tmp_path, RESULTS, EarlyExitBertConfig())


def test_a_card_without_a_header_is_nobodys(tmp_path):
    path = tmp_path / "README.md"
    for content in ("", "---\n: [\n---\n", "---\ntags: 3\n---\n", "text"):
        path.write_text(content)
        assert not is_run_card(path)
        refresh_model_card(tmp_path, RESULTS, EarlyExitBertConfig(), {})
        assert is_run_card(path)


def test_the_card_of_an_evaluation_claims_no_training(tmp_path):
    text = write_model_card(tmp_path, {**RESULTS, "method": "unknown"}, EarlyExitBertConfig()).read_text()
    assert "trained on" not in text and "scheme" not in text and "- unknown" not in text


@pytest.mark.parametrize(("part", "words"), [("3", "part 3 of digits9"), ("all", "all parts of digits9")])
def test_the_card_names_the_part_that_was_trained_on(tmp_path, part, words):
    """What breaks: a model of 50 images claims to be one of the whole data set."""
    settings = {"dataset_name": "cifar100", "partition_dir": "/home/me/digits9", "partition_id": part}
    text = write_model_card(tmp_path, RESULTS, EarlyExitBertConfig(), settings=settings).read_text()
    assert f"trained on {words}, evaluated on {RESULTS['dataset']}" in text.replace("\\", "")
    assert "partition_dir: digits9" in text and f"partition_id: {yaml.safe_dump(part).split()[0]}" in text
    assert "/home/me" not in text
    own = write_model_card(tmp_path, {**RESULTS, "dataset": "digits9"}, EarlyExitBertConfig(), settings=settings)
    assert f"trained on {words}" in own.read_text() and "evaluated on" not in own.read_text()


def test_what_counts_as_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    local = ["runs/mine", "runs", str(tmp_path), "~/model", "./model", "a/b/c", "minilm", None]
    assert [hub_name(name, installed=("minilm",)) for name in local] == [None] * len(local)
    assert hub_name("google/bert-base.v1") == "google/bert-base.v1" and hub_name("imdb") == "imdb"


# Examples


def test_examples_against_a_plain_loop():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 3, 4)).astype(np.float32), rng.integers(4, size=200)
    chosen = choose_examples(logits, labels, list("wxyz"), count=5)

    def softmax(row):
        return np.exp(row) / np.exp(row).sum()

    wanted = {"surest": [], "deep": [], "mistakes": []}
    for row in range(200):
        said = [int(logits[row, k].argmax()) for k in range(3)]
        right = [answer == labels[row] for answer in said]
        sure, last = softmax(logits[row, 0]).max(), softmax(logits[row, 2]).max()
        wanted["surest" if right[0] else "mistakes"].append((sure, row))
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
    card = write_model_card(tmp_path, RESULTS, EarlyExitBertConfig()).read_text()
    assert ("## Examples" in card) == shared
    if shared:
        assert r"| a \| \*b\* \# c | no | no | no | 0.9999 |" in card
        assert r"&lt;img src=x&gt; \`d\`" in card and r"\[e\](f)" in card
        write_examples(tmp_path, examples, rows, ["text"], shared=False)
        assert not folder.exists()  # what may no longer be shown is gone


def test_images_of_the_card_are_the_rows(tmp_path):
    rows = [{"image": Image.new("L", (8, 8), 40 * number)} for number in range(3)]
    write_examples(tmp_path, choose_examples(LOGITS, LABELS, ["no", "yes"]), rows, ["image"], shared=True)
    card = write_model_card(tmp_path, {**RESULTS, "model_type": "vit"}, EarlyExitBertConfig()).read_text()
    shown = re.findall(r"!\[\]\((examples/.*?)\)", card)
    assert len(shown) == 4
    greys = {name: np.asarray(Image.open(tmp_path / name)) for name in shown}
    expected = {"examples/surest-1.png": 0, "examples/deep-1.png": 40, "examples/mistakes-1.png": 80} | {
        "examples/mistakes-2.png": 40
    }
    assert all((greys[name] == value).all() for name, value in expected.items())


@pytest.mark.parametrize(
    ("model_type", "words"),
    [("mpnet", "An MPNet classifier"), ("electra", "An ELECTRA classifier"), ("roberta", "A RoBERTa classifier")],
)
def test_a_card_calls_networks_by_their_names(tmp_path, model_type, words):
    card = write_model_card(tmp_path, {**RESULTS, "model_type": model_type}, EarlyExitBertConfig()).read_text()
    assert words in card


def test_every_architecture_has_a_name():
    assert {name for name in MODEL_CLASSES if "mobile" not in name} == set(NETWORKS)
