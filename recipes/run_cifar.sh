#!/usr/bin/env bash
# recipes/run_cifar.sh SAVE_PATH METHOD DEVICE [FLAGS]
#
# Train exits on the union of all parts of non-IID CIFAR-100 and write SAVE_PATH/METHOD. Three calls fill a folder:
#   for method in base l2w boosted; do recipes/run_cifar.sh exps/CIFAR_1000 $method 0; done
#
# METHOD: base, l2w or boosted; their recipes, cifar100_noniid_vit_*.yaml, differ in the method and its own flags only.
# DEVICE: a GPU's number, or cpu. FLAGS go to run_cifar_een.py, for example
# --model_name_or_path path/to/vit --max_steps 100. The parts are cut first, if they are not there, by
# recipes/generate_cifar100.py; DATASET=folder takes CIFAR-100 from a local folder instead of the Hub.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
save_path=$1 method=$2 device=$3
shift 3
case $method in
    base) recipe=recipes/cifar100_noniid_vit_joint.yaml ;;
    l2w | boosted) recipe=recipes/cifar100_noniid_vit_$method.yaml ;;
    *) echo "METHOD must be base, l2w or boosted, not $method." >&2; exit 2 ;;
esac
python=${PYTHON:-python}
dataset=${DATASET:-cifar100}
if [ ! -e dataset/cifar100_noniid1000/partition.json ]; then
    "$python" recipes/generate_cifar100.py noniid balance dir --dataset_name "$dataset"
fi
if [ "$device" = cpu ]; then
    where=(--use_cpu --bf16 false)
else
    where=()
    export CUDA_VISIBLE_DEVICES=$device
fi
exec "$python" run_cifar_een.py "$recipe" --dataset_name "$dataset" --output_dir "$save_path/$method" "${where[@]}" "$@"
