#!/usr/bin/env bash
# benchmarks/gpu_quality.sh RESULTS DATA [FLAGS]
#
# Schemes and baselines on whole data sets, side by side on one GPU, without a network: SST-2, CLINC-150, CIFAR-100 and
# the union of its 1,000 non-IID parts. RESULTS gets quality_<data>.json, the runs (RESULTS/runs) and their logs.
# DATA is a folder that holds
#   minilm  vit       an encoder of texts, with its tokenizer, and a vision transformer (folders or links to folders)
#   sst2 clinc cifar100   parquet files in the schema of the Hub; one that is not there is left out
# FLAGS go to every run, for example --num_train_epochs 1.
#
# JOBS=8 runs at once, SEEDS=3, LIMIT=3000 seconds for everything, METHODS="joint boosted ..."; PYTHON=python.
# The same command goes on where the time was over: finished runs are kept, others resume from their checkpoint.
# The page of the results: python benchmarks/page.py --folder FOLDER, where FOLDER/results is RESULTS.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
results=$1 data=$2
shift 2
python=${PYTHON:-python} end=$((SECONDS + ${LIMIT:-3000})) unfinished=0
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
read -ra methods <<< "${METHODS:-joint two_stage two_stage-joint boosted l2w stock}"

quality() { # NAME RECIPE SMALLER FLAGS: the cells of one data set
    local name=$1 recipe=$2 smaller=$3
    shift 3
    "$python" benchmarks/quality.py "$recipe" --name "$name" --methods "${methods[@]}" $smaller --seeds "${SEEDS:-3}" \
        --jobs "${JOBS:-8}" --time_limit $((end > SECONDS ? end - SECONDS : 0)) --results "$results" \
        --runs "$results/runs" --bf16 --save_strategy epoch --save_total_limit 1 --logging_steps 100 \
        --disable_tqdm true "$@" || unfinished=1
}

text=(--model_name_or_path "$data/minilm" --per_device_train_batch_size 128 --per_device_eval_batch_size 256)
text+=(--learning_rate 1e-4 --head_learning_rate 1e-3)
image=(--images --model_name_or_path "$data/vit" --dataset_name "$data/cifar100" --image_size 112)
image+=(--max_train_samples 50000 --max_eval_samples 10000 --min_crop 0.5 --dataloader_num_workers 2)
image+=(--per_device_train_batch_size 128 --per_device_eval_batch_size 256 --learning_rate 1e-4)
image+=(--head_learning_rate 2e-3 --num_train_epochs 6)
image+=(--second_stage_samples 20000 --second_stage_views 1) # of two_stage: 300 kB of memory for each

if [ -e "$data/sst2" ]; then
    quality sst2_whole recipes/sst2_minilm_joint.yaml "cut-3 cut-2 student-3" --dataset_name "$data/sst2" \
        --max_train_samples 67349 --num_train_epochs 3 "${text[@]}" "$@"
fi
if [ -e "$data/clinc" ]; then
    quality clinc_whole recipes/clinc_minilm_joint.yaml "cut-3 cut-2 student-3" --dataset_name "$data/clinc" \
        --max_train_samples 15000 --num_train_epochs 5 "${text[@]}" "$@"
fi
if [ -e "$data/cifar100" ]; then
    quality cifar100_whole recipes/cifar100_vit_small.yaml "cut-6 cut-3 student-6" "${image[@]}" "$@"
    parts=$results/cifar100_noniid1000
    if [ ! -e "$parts/partition.json" ]; then
        "$python" recipes/generate_cifar100.py noniid balance dir --dataset_name "$data/cifar100" --output_dir "$parts"
    fi
    quality cifar100_noniid recipes/cifar100_vit_small.yaml "" "${image[@]}" \
        --partition_dir "$parts" --partition_id all "$@"
fi
if [ $unfinished = 1 ]; then
    echo "Not all runs are done: give the same command again." >&2
    exit 1
fi
