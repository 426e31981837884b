#!/usr/bin/env python
"""Fine-tune, evaluate and calibrate early exits on ViT: CIFAR, local images or the installed digits.

python run_cifar_een.py recipes/digits_vit_smoke_joint.yaml
python run_cifar_een.py --model_name_or_path google/vit-base-patch16-224 --dataset_name cifar100 --do_train --do_eval \
    --output_dir out
python run_cifar_een.py --help
"""

from een_hf.commands.train import main
from een_hf.data.images import IMAGES


if __name__ == "__main__":
    main(IMAGES)
