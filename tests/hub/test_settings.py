"""Which settings and names of a run may be published."""

from een_hf.hub import (
    hub_name,
    public_settings,
)


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


def test_what_counts_as_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    local = ["runs/mine", "runs", str(tmp_path), "~/model", "./model", "a/b/c", "minilm", None]
    assert [hub_name(name, installed=("minilm",)) for name in local] == [None] * len(local)
    assert hub_name("google/bert-base.v1") == "google/bert-base.v1" and hub_name("imdb") == "imdb"
