#!/usr/bin/env python
"""Make a fine-tuned classifier cheaper: train exits on a frozen backbone, certify a policy, serve it.

python run_glue_een.py recipes/bbc_news_minilm_plain.yaml
python recipes/cheaper_classifier.py runs/bbc_news_minilm_plain runs/bbc_news_minilm_cheaper
"""

import sys

from transformers import AutoTokenizer, pipeline

from een_hf import EarlyExitBertForSequenceClassification, EarlyExitTrainingArguments, JointExitTrainer, predict
from een_hf.data import load_bbc_news


fine_tuned, output_dir = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(fine_tuned)
news = load_bbc_news().map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=64), batched=True)
halves = news["validation"].train_test_split(0.5, seed=0, stratify_by_column="label")
calibration, test = halves["train"], halves["test"]

# Exits after every layer; the backbone and the last head stay the same, bit for bit.
model = EarlyExitBertForSequenceClassification.from_pretrained(
    fine_tuned, exit_layers=[1, 2, 3, 4, 5, 6], exit_pooling="mean", dtype="float32"
)
args = EarlyExitTrainingArguments(
    output_dir,
    freeze_backbone=True,
    head_learning_rate=1e-3,
    per_device_train_batch_size=32,
    num_train_epochs=1,
    train_sampling_strategy="group_by_length",
)
trainer = JointExitTrainer(model=model, args=args, train_dataset=news["train"], processing_class=tokenizer)
trainer.train()

# The cheapest policy that, with confidence 0.9, differs from the fine-tuned model on at most 3 % of new rows.
report = trainer.calibrate(calibration, max_risk=0.03, risk="consistency")
print(report.message)
model.set_exit_policy(report.policy)
trainer.save_model()

columns = ["input_ids", "token_type_ids", "attention_mask"]
answers = predict(model, test.select_columns(columns), batch_size=32)
right = (answers.logits.argmax(-1).numpy() == test["label"]).mean()
print(f"accuracy on {len(test)} other rows: {right:.4f}; rows per exit: {answers.exit_index.bincount().tolist()}")

# The saved model is an ordinary checkpoint: with een_hf imported, a stock pipeline exits early.
classifier = pipeline("text-classification", model=output_dir, tokenizer=output_dir)
print(classifier("Shares in the carmaker rose after it reported record profits.", truncation=True, max_length=64))
