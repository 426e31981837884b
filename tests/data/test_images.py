"""Image data sets: every source gives the same rows, columns and splits, and says what is wrong with it."""

import math

import datasets
import numpy as np
import pytest
import torch
from factory import download, tiny_config, tiny_model
from PIL import Image
from transformers import DeiTImageProcessor, ViTForImageClassification, ViTImageProcessor

from een_hf.commands import main as commands_main
from een_hf.data import DataError, TextDataArguments, load_digits, load_partition, load_text_data
from een_hf.data.image_arguments import ImageDataArguments
from een_hf.data.images import IMAGES, load_image_data
from een_hf.models import EarlyExitViTForImageClassification
from een_hf.runs.model import labels_of_checkpoint
from een_hf.training.arguments import ModelArguments


NAMES = ["cat", "dog", "eel"]
PIXELS = np.random.default_rng(1).integers(0, 256, (18, 6, 6, 3), dtype=np.uint8)


def load(**flags):
    needed = flags.pop("needed", ["train", "validation"])
    return load_image_data(ImageDataArguments(**flags), splits_needed=needed, seed=1)


def write_parquet(folder, image="img", label="fine_label", splits=("train", "test")):
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=NAMES)})
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        rows = {image: [Image.fromarray(pixels) for pixels in PIXELS], label: [row % 3 for row in range(18)]}
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def write_folders(folder):
    for row, pixels in enumerate(PIXELS):
        place = folder / NAMES[row % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{row:02d}.png")
    return str(folder)


@pytest.mark.parametrize(("image", "label"), [("img", "fine_label"), ("image", "label"), ("img", "label")])
@pytest.mark.parametrize("nested", [False, True])
def test_the_hubs_layouts(tmp_path, image, label, nested):
    """CIFAR-100 has img and fine_label, others image and label; the files lie in the folder or below data."""
    write_parquet(tmp_path / "data" if nested else tmp_path, image, label)
    data = load(dataset_name=str(tmp_path))
    assert (data.input_columns, data.label_column) == ([image], label)
    assert data.label_names == NAMES and data.num_labels == 3
    assert data.splits["validation"][label] == [row % 3 for row in range(18)]
    assert (np.asarray(data.splits["train"][7][image]) == PIXELS[7]).all()


def test_one_folder_per_class(tmp_path):
    folder = write_folders(tmp_path)
    data = load(train_dir=folder, validation_dir=folder)
    assert data.label_names == NAMES
    found = {np.asarray(row["image"]).tobytes(): row["label"] for row in data.splits["train"]}
    assert found == {pixels.tobytes(): row % 3 for row, pixels in enumerate(PIXELS)}


def test_a_single_folder_is_a_class(tmp_path):
    """What breaks: images of one class only, or a folder of one class to evaluate, count as unlabelled."""
    folder = write_folders(tmp_path / "all")
    (tmp_path / "dogs").mkdir()
    (tmp_path / "all" / "dog").rename(tmp_path / "dogs" / "dog")
    with pytest.raises(DataError, match="one class only, 'dog'"):
        load(train_dir=str(tmp_path / "dogs"), needed=["train"])
    like = load(train_dir=folder, needed=["train"])
    like.label_names.append("dog")
    args = ImageDataArguments(validation_dir=str(tmp_path / "dogs"))
    data = load_image_data(args, splits_needed=["validation"], seed=1, like=like)
    assert (data.label_names, data.splits["validation"]["label"][:]) == (["dog"], [0] * 6)


def test_named_columns(tmp_path):
    folder = write_parquet(tmp_path, "picture", "kind")
    data = load(dataset_name=folder, image_column_name="picture", label_column_name="kind")
    assert (data.input_columns, data.label_column) == (["picture"], "kind")


def test_a_validation_split_is_cut_from_the_training_rows(tmp_path):
    """With --train_val_split the test split stays unseen until prediction."""
    folder = write_parquet(tmp_path)
    data = load(dataset_name=folder, train_val_split=1 / 3, needed=["train", "validation", "test"])
    sizes = {split: len(rows) for split, rows in data.splits.items()}
    assert sizes == {"train": 12, "validation": 6, "test": 18}
    parts = [{np.asarray(image).tobytes() for image in data.splits[part]["img"]} for part in ("train", "validation")]
    assert not parts[0] & parts[1]


def test_limits_take_the_first_rows(tmp_path):
    data = load(dataset_name=write_parquet(tmp_path), max_train_samples=4, max_eval_samples=5)
    assert (len(data.splits["train"]), len(data.splits["validation"])) == (4, 5)


def test_digits_are_installed():
    data = load(dataset_name="digits")
    assert data.num_labels == 10 and len(data.splits["train"]) + len(data.splits["validation"]) == 1797


def test_real_cifar100(shared_dir):
    folder = shared_dir / "data" / "cifar100"
    if not folder.is_dir():
        pytest.skip("needs shared/data/cifar100")
    data = load(dataset_name=str(folder), max_train_samples=20, max_eval_samples=20)
    assert data.num_labels == 100 and data.label_names[0] == "apple" and data.dataset == "cifar100"
    assert data.splits["train"][0]["img"].size == (32, 32)


# What the model is given


@pytest.fixture
def model():
    names = ["eel", "cat", "dog"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    return tiny_model("vit", image_size=12, num_hidden_layers=2, **labels).eval()


def test_labels_follow_the_checkpoints_names(tmp_path, model):
    """A fine-tuned model with its labels in another order must not be trained on the wrong classes."""
    args = ImageDataArguments(dataset_name=write_parquet(tmp_path))
    data = load_image_data(args, splits_needed=["validation"], seed=1)
    rows = IMAGES.encode_data(data, IMAGES.load_processor(None, args, model.config), args, model.config)["validation"]
    assert [model.config.id2label[label] for label in rows.labels] == [NAMES[row % 3] for row in range(18)]
    assert rows[0]["pixel_values"].shape == (3, 12, 12)


def test_position_embeddings_are_resized_once_and_saved(tmp_path, model):
    """The resized model equals the stock model that interpolates in each pass, also after saving and loading."""
    stock = ViTForImageClassification(ViTForImageClassification.config_class(**model.config.to_dict()))
    stock.load_state_dict({name: value for name, value in model.state_dict().items() if name in stock.state_dict()})
    pixels = torch.randn(2, 3, 20, 20)
    wanted = stock.eval()(pixels, interpolate_pos_encoding=True).logits
    IMAGES.fit_model(model, ImageDataArguments(dataset_name="digits", image_size=20))
    torch.testing.assert_close(model(pixels).logits, wanted, atol=1e-6, rtol=0)
    model.save_pretrained(tmp_path)
    loaded = EarlyExitViTForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.image_size == 20
    torch.testing.assert_close(loaded(pixels).logits, wanted, atol=1e-6, rtol=0)


def test_images_without_labels_are_predicted_by_a_checkpoint(tmp_path, model):
    """What breaks: the labels of one's own model are not known to it, and a folder of images alone is refused."""
    (tmp_path / "new").mkdir()
    Image.fromarray(PIXELS[0]).save(tmp_path / "new" / "one.png")
    args = ImageDataArguments(test_dir=str(tmp_path / "new"))
    source = {"splits_needed": ["test"], "seed": 1, "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(DataError, match="no labels.*a fine-tuned model"):
        load_image_data(args, **source)
    model.save_pretrained(tmp_path / "model")
    like = labels_of_checkpoint(IMAGES, ModelArguments(model_name_or_path=str(tmp_path / "model")))
    data = load_image_data(args, **source, like=like)
    assert (data.label_names, data.num_labels) == (["eel", "cat", "dog"], 3)
    rows = IMAGES.encode_data(data, IMAGES.load_processor(None, args, model.config), args, model.config)["test"]
    assert {*rows[0]} == {"pixel_values"} and len(rows) == 1


def test_folders_that_differ_in_case_are_two_classes(tmp_path, model):
    """What breaks: the images of `A` and `a` become one class, at an accuracy of 1."""
    for name in ("A", "a"):
        (tmp_path / name).mkdir()
        Image.fromarray(PIXELS[0]).save(tmp_path / name / "0.png")
    args = ImageDataArguments(validation_dir=str(tmp_path))
    data = load_image_data(args, splits_needed=["validation"], seed=1, cache_dir=str(tmp_path / "cache"))
    model.config.label2id = {"a": 0, "b": 1, "A": 2}
    rows = IMAGES.encode_data(data, IMAGES.load_processor(None, args, model.config), args, model.config)["validation"]
    assert data.label_names == ["A", "a"] and rows.labels.tolist() == [2, 0]
    model.config.label2id = {"a": 0, "b": 1}
    with pytest.raises(DataError, match="'A', which the model does not know .*'a' in case"):
        IMAGES.encode_data(data, IMAGES.load_processor(None, args, model.config), args, model.config)


def test_names_are_the_models_in_either_case(tmp_path, model):
    """What breaks: a model fine-tuned on `cat` and `dog` refuses, or renumbers, the folders `Cat` and `DOG`."""
    for name in ("Cat", "DOG"):
        (tmp_path / name).mkdir()
        Image.fromarray(PIXELS[0]).save(tmp_path / name / "0.png")
    args = ImageDataArguments(validation_dir=str(tmp_path))
    data = load_image_data(args, splits_needed=["validation"], seed=1, cache_dir=str(tmp_path / "cache"))
    model.config.label2id = {"dog": 0, "eel": 1, "cat": 2}
    rows = IMAGES.encode_data(data, IMAGES.load_processor(None, args, model.config), args, model.config)["validation"]
    assert data.label_names == ["Cat", "DOG"] and rows.labels.tolist() == [2, 0]


def test_the_processor_gives_the_models_size(tmp_path, model):
    cropping = ViTImageProcessor(
        do_center_crop=True, size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}
    )
    for processor in (cropping, ViTImageProcessor()):
        processor.save_pretrained(tmp_path)
        loaded = IMAGES.load_processor(str(tmp_path), ImageDataArguments(dataset_name="digits"), model.config)
        pixels = loaded(Image.fromarray(PIXELS[0]), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 12, 12)


def test_a_processor_that_crops_keeps_the_share_that_it_crops(tmp_path, model):
    """What breaks: the processor of DeiT, whose size is a height and a width, ended in a TypeError."""
    image = Image.fromarray(PIXELS[0])
    for sides in (("height", "width"), ("shortest_edge",)):
        DeiTImageProcessor(size=dict.fromkeys(sides, 256)).save_pretrained(tmp_path)  # it crops 256 pixels to 224
        loaded = IMAGES.load_processor(str(tmp_path), ImageDataArguments(dataset_name="digits"), model.config)
        wanted = DeiTImageProcessor(size=dict.fromkeys(sides, 14), crop_size={"height": 12, "width": 12})
        found = loaded(image, return_tensors="pt")["pixel_values"]
        assert torch.equal(found, wanted(image, return_tensors="pt")["pixel_values"])


# Bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "give --dataset_name"),
        ({"dataset_name": "digits", "train_dir": "."}, "two sources"),
        ({"train_dir": "nowhere"}, "--train_dir nowhere does not exist"),
        ({"dataset_name": "digits", "mixup": -1.0}, "--mixup"),
        ({"dataset_name": "digits", "cutmix": math.inf}, "--cutmix must be finite"),
        ({"dataset_name": "digits", "random_erase": 2.0}, "--random_erase"),
        ({"dataset_name": "digits", "min_crop": 0.0}, "--min_crop"),
        ({"dataset_name": "digits", "image_size": 0}, "--image_size"),
        ({"dataset_name": "digits", "train_val_split": 1.0}, "--train_val_split"),
        ({"dataset_name": "digits", "auto_augment": "wild"}, "--auto_augment 'wild'"),
        ({"dataset_name": "digits", "auto_augment": "rand-foo"}, "--auto_augment 'rand-foo' is none of timm's"),
        ({"dataset_name": "digits", "auto_augment": "rand-m9-tfoo"}, "--auto_augment 'rand-m9-tfoo'"),
        ({"dataset_name": "digits", "auto_augment": "augmix-w"}, "--auto_augment 'augmix-w'"),
        ({"dataset_name": "digits", "auto_augment": ""}, "--auto_augment ''"),
    ],
)
def test_flags_that_make_no_sense(flags, message):
    with pytest.raises(DataError, match=message):
        ImageDataArguments(**flags)


def test_a_missing_split_is_named(tmp_path):
    with pytest.raises(DataError, match="no validation split.*--validation_dir.*--train_val_split"):
        load(dataset_name=write_parquet(tmp_path, splits=["train"]))


@pytest.mark.parametrize("flag", ["image_column_name", "label_column_name"])
def test_a_missing_column_is_named(tmp_path, flag):
    with pytest.raises(DataError, match=f"no column 'nope'.*--{flag}"):
        load(dataset_name=write_parquet(tmp_path), **{flag: "nope"})


def test_a_folder_that_is_not_there():
    with pytest.raises(DataError, match="no such folder"):
        load(dataset_name="./nowhere")


def test_an_image_size_that_patches_do_not_divide(model):
    with pytest.raises(DataError, match="--image_size 18 must be a multiple .* 4 pixels"):
        IMAGES.fit_model(model, ImageDataArguments(dataset_name="digits", image_size=18))


def test_a_label_that_the_model_does_not_know(tmp_path, model):
    model.config.label2id = {"eel": 0, "cat": 1, "bee": 2}
    args = ImageDataArguments(dataset_name=write_parquet(tmp_path))
    data = load_image_data(args, splits_needed=["validation"], seed=1)
    with pytest.raises(DataError, match="'dog', which the model does not know"):
        IMAGES.encode_data(data, IMAGES.load_processor(None, args, model.config), args, model.config)


def test_mixing_needs_classes(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("float32")})
    rows = {"image": [Image.fromarray(pixels) for pixels in PIXELS], "label": np.arange(18) / 7}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
    assert load(dataset_name=str(tmp_path), needed=["train"]).problem_type == "regression"
    with pytest.raises(DataError, match="--mixup and --cutmix mix classes"):
        load(dataset_name=str(tmp_path), needed=["train"], mixup=0.2)


# Parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts") / "digits4"
    words = f"partition --dataset_name digits --num_partitions 4 --scheme dir --output_dir {folder} --format npz"
    commands_main(words.split())
    return folder


def images_of(rows):
    return sorted(np.asarray(image).tobytes() for image in rows["image"])


def test_a_part_is_trained_on_and_the_data_set_evaluated(parts):
    """With --dataset_name the untouched test split is what is reported; without it the part's own rows."""
    with np.load(parts / "train" / "2.npz", allow_pickle=False) as arrays:
        wanted = sorted(image.tobytes() for image in arrays["x"])
    with np.load(parts / "valid" / "2.npz", allow_pickle=False) as arrays:
        own_validation = arrays["y"].tolist()
    alone = load(partition_dir=str(parts), partition_id="2")
    beside = load(partition_dir=str(parts), partition_id="2", dataset_name="digits")
    assert images_of(alone.splits["train"]) == images_of(beside.splits["train"]) == wanted
    assert alone.splits["validation"]["label"][:] == own_validation
    assert images_of(beside.splits["validation"]) == images_of(load_digits()["test"])
    assert alone.label_names == beside.label_names


def test_a_part_without_rows_of_a_class_has_all_labels(tmp_path):
    """What breaks: the models of two parts differ in their labels, and none can be evaluated on the whole data set."""
    rows = [{"text": f"a {row}", "label": NAMES[row // 8]} for row in range(24)]
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "rows.csv")
    words = f"partition --train_file {tmp_path / 'rows.csv'} --num_partitions 3 --scheme pat --classes_per_partition 1"
    commands_main([*words.split(), "--output_dir", str(tmp_path / "parts"), "--cache_dir", str(tmp_path / "cache")])
    for part in "012":
        args = TextDataArguments(partition_dir=str(tmp_path / "parts"), partition_id=part)
        data = load_text_data(args, splits_needed=["train", "validation"], seed=0)
        assert data.label_names == NAMES
        own = load_partition(tmp_path / "parts", part)["train"]["label"][:]
        assert [NAMES[label] for label in data.splits["train"]["label"]] == own and len({*own}) == 1


def test_the_union_of_all_parts(parts):
    data = load(partition_dir=str(parts), partition_id="all")
    both = images_of(data.splits["train"]) + images_of(data.splits["validation"])
    assert sorted(both) == images_of(load_digits()["train"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"partition_id": "4"}, "--partition_id .* 0 to 3"),
        ({"partition_id": "x"}, "--partition_id"),
        ({}, "belong together"),
        ({"partition_id": "0", "train_dir": "."}, "two sources"),
        ({"partition_id": "0", "streaming": True}, "--streaming"),
    ],
)
def test_parts_that_are_not_there(parts, flags, message):
    with pytest.raises(DataError, match=message):
        load(partition_dir=str(parts), **flags)


def test_the_image_processor_is_of_the_models_revision(tmp_path):
    """What breaks: images are normalized as for the weights of another commit, or the commit of the model is asked of
    the repository of another processor, which does not have it."""
    for name, revision, mean in (("model", "main", 0.1), ("model", "old", 0.2), ("other", "main", 0.3)):
        download(tmp_path, name, revision, ViTImageProcessor(image_mean=[mean] * 3))
    hub = {"cache_dir": tmp_path, "revision": "old"}
    for more, mean in (({}, 0.2), ({"image_processor_name": "someone/other"}, 0.3)):
        args = ImageDataArguments(dataset_name="digits", **more)
        found = IMAGES.load_processor("someone/model", args, tiny_config("vit"), **hub)
        assert list(found.image_mean) == [mean] * 3
