#!/usr/bin/env python
"""Train LoRA and exits on a pretrained encoder, save the adapter, load it again, and merge it into a model to serve.

python recipes/lora_bbc_news.py runs/lora_bbc_news
"""

import sys

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoTokenizer

from een_hf import AutoEarlyExitModel, EarlyExitTrainingArguments, JointExitTrainer, predict
from een_hf.data import load_bbc_news, sample_model_path


adapter_dir = sys.argv[1]
pretrained = str(sample_model_path("minilm"))  # or a name on the Hub, with the names of its products in target_modules
tokenizer = AutoTokenizer.from_pretrained(pretrained)
news = load_bbc_news()
names = news["train"].features["label"].names
news = news.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=64), batched=True)
halves = news["validation"].train_test_split(0.5, seed=0, stratify_by_column="label")
calibration, test = halves["train"], halves["test"]

# All heads are trained in full beside the adapter of the layers, and saved with it.
model = AutoEarlyExitModel.from_pretrained(
    pretrained,
    exit_layers=[2, 4, 6],
    id2label=dict(enumerate(names)),
    label2id={name: k for k, name in enumerate(names)},
)
lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=model.head_module_names())
model = get_peft_model(model, lora)
model.print_trainable_parameters()

args = EarlyExitTrainingArguments(
    adapter_dir,
    learning_rate=5e-4,
    head_learning_rate=1e-3,
    per_device_train_batch_size=32,
    num_train_epochs=1,
    train_sampling_strategy="group_by_length",
)
trainer = JointExitTrainer(model=model, args=args, train_dataset=news["train"], processing_class=tokenizer)
trainer.train()
trainer.network.set_exit_policy(trainer.calibrate(calibration, target_cost=0.5).policy)
trainer.save_model()  # the adapter and the heads; exits and policy in base_config

# Anywhere else: the same pretrained encoder, the exits, the adapter. Merged, it is an early-exit model like any other.
config = AutoConfig.from_pretrained(f"{adapter_dir}/base_config")
base = AutoEarlyExitModel.from_pretrained(pretrained, config=config)
merged = PeftModel.from_pretrained(base, adapter_dir).merge_and_unload()
merged.save_pretrained(f"{adapter_dir}/merged")
tokenizer.save_pretrained(f"{adapter_dir}/merged")

answers = predict(merged, test.select_columns(["input_ids", "token_type_ids", "attention_mask"]), batch_size=32)
right = (answers.logits.argmax(-1).numpy() == test["label"]).mean()
print(f"accuracy on {len(test)} other rows: {right:.4f}; rows per exit: {answers.exit_index.bincount().tolist()}")
