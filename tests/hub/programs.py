"""What processes beside the tests run: they push to a server, and load again where the package is absent."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path


# Where the package is, and where `factory` is.
ROOT = Path(__file__).parents[2]
OURS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
PUSH = """
import sys
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoModelForSequenceClassification

from een_hf.data.images import IMAGES
from een_hf.hub import write_model_card
from een_hf.commands.train import main
from factory import RESULTS, tiny_model, tiny_processor

folder = sys.argv[1]
tokenizer = tiny_processor("bert")
texts = ["a b c d e f g h i j", "c", "d e f", "j j j a", "b a", "i h g f e"]
settings = dict(num_hidden_layers=4, exit_layers=[1, 2, 4], initializer_range=0.5)
bert = tiny_model("bert", vocab_size=len(tokenizer), num_labels=2, **settings)
vit = tiny_model("vit", **settings)
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
tiny_processor("vit").push_to_hub("someone/vit")
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


@contextmanager
def hub_server(folder):
    """A server on the loopback interface that keeps what is pushed in `folder`; gives its address."""
    command = [sys.executable, str(Path(__file__).with_name("server.py")), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


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


TEXT_RUN = """
import sys
from een_hf.data.text import TEXT
from een_hf.commands.train import main
from factory import tiny_processor, tiny_stock_model

folder = sys.argv[1]
tiny_processor().save_pretrained(f"{folder}/source")
tiny_stock_model(vocab_size=15, num_labels=2).save_pretrained(f"{folder}/source")
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
