"""Our classes pass the tests that transformers runs on its own models, in the release that is installed."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers


COMMON_FIELDS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "architectures": ["BertModel"],
    "id2label": {0: "label", 1: "other"},
    "label2id": {"label": 0, "other": 1},
    "problem_type": "regression",
}


@pytest.mark.slow
def test_common_model_tests_pass(tmp_path):
    """What breaks: whatever transformers promises of every model, and nobody here thought of."""
    source = f"transformers=={transformers.__version__}"
    words = ["download", "--quiet", "--no-deps", "--no-binary=:all:", "--dest", str(tmp_path), source]
    fetched = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"the source distribution of {source} cannot be fetched: {fetched.stderr.strip()[-200:]}")
    with tarfile.open(next(tmp_path.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = next(path for path in tmp_path.glob("transformers-*") if path.is_dir())
    # The distribution lacks what the common tests import: two mixins, of generation and of export, the fields that
    # every config takes, and the file that makes `tests` a package.
    missing = {
        "__init__": "",
        "generation/test_utils": "class GenerationTesterMixin:\n    pass\n",
        "exporters/test_export": "class ExportTesterMixin:\n    pass\n",
        "utils/test_configuration_utils": f"config_common_kwargs = {COMMON_FIELDS}\n",
    }
    for module, content in missing.items():
        stub = folder / "tests" / f"{module}.py"
        if not stub.exists():
            stub.parent.mkdir(exist_ok=True)
            stub.write_text(content)
    shutil.copy(Path(__file__).with_name("common_model_tests.py"), folder / "tests" / "test_een_hf.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_een_hf.py"]
    project = str(Path(__file__).parents[2])
    # `tests` must be the folder of the distribution.
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{folder}:{project}"}
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    print(done.stdout[-300:])
