#!/usr/bin/env python
"""Fine-tune, evaluate and calibrate early exits on BERT: GLUE, local files or the installed sample.

python run_glue_een.py recipes/bbc_news_minilm_joint.yaml
python run_glue_een.py --model_name_or_path bert-base-uncased --task_name mrpc --do_train --do_eval --output_dir out
python run_glue_een.py --help
"""

from een_hf.commands.train import main
from een_hf.data.text import TEXT


if __name__ == "__main__":
    main(TEXT)
