#!/usr/bin/env bash
# recipes/run_glue.sh SAVE_PATH METHOD DEVICE TASK [FLAGS]
#
# Train twelve exits of bert-base on a GLUE task and write SAVE_PATH/METHOD. Three calls fill a folder:
#   for method in base l2w boosted; do recipes/run_glue.sh exps/MRPC $method 0 mrpc; done
#
# METHOD: base, l2w or boosted; their recipes, sst2_bert_*.yaml, differ in the method and its own flags only. DEVICE: a
# GPU's number, or cpu. TASK: cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb (not with l2w) or wnli. FLAGS go to
# run_glue_een.py, for example --model_name_or_path minilm --dataset_name folder/of/glue.
set -euo pipefail
if [ $# -lt 4 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
save_path=$1 method=$2 device=$3 task=$4
shift 4
case $method in
    base) recipe=recipes/sst2_bert_joint.yaml ;;
    l2w | boosted) recipe=recipes/sst2_bert_$method.yaml ;;
    *) echo "METHOD must be base, l2w or boosted, not $method." >&2; exit 2 ;;
esac
criterion=confidence
if [ "$task" = stsb ]; then
    if [ "$method" = l2w ]; then
        echo "l2w takes single-label classification only, and stsb is a regression: take base or boosted." >&2
        exit 2
    fi
    criterion=patience
fi
if [ "$device" = cpu ]; then
    where=(--use_cpu)
else
    where=()
    export CUDA_VISIBLE_DEVICES=$device
fi
exec "${PYTHON:-python}" run_glue_een.py "$recipe" --task_name "$task" --exit_criterion "$criterion" \
    --output_dir "$save_path/$method" "${where[@]}" "$@"
