"""The command `een-hf retrofit` on tiny models, and what lies in its folder."""

from transformers import (
    BertForSequenceClassification,
    ViTForImageClassification,
)

from een_hf.models import EarlyExitBertForSequenceClassification, EarlyExitViTForImageClassification


NUM_ROWS, CHUNK = 200, 32
MODEL_CLASSES = {"bert": BertForSequenceClassification, "vit": ViTForImageClassification}
EXIT_CLASSES = {"bert": EarlyExitBertForSequenceClassification, "vit": EarlyExitViTForImageClassification}


def words_of(source, out, **flags):
    """The command; a flag of None stands alone."""
    settings = {"max_risk": 0.3, "num_train_epochs": 2, "chunk_size": CHUNK, "batch_size": 8, "speed_samples": 0}
    settings |= {"output_dir": out, **flags}
    words = [word for name, value in settings.items() for word in (f"--{name}", value) if word is not None]
    return ["retrofit", *source, *map(str, words)]


def chunks(out):
    return sorted(out.glob("features/*/chunk-*.npz"))


def weights(out):
    return (out / "model.safetensors").read_bytes()
