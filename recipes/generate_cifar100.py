#!/usr/bin/env python
"""CIFAR-100 in 1,000 parts, by the call of the original experiments; further flags go to `een-hf partition`.

python recipes/generate_cifar100.py noniid balance dir
python recipes/generate_cifar100.py iid balance - --format npz
"""

import sys

from een_hf.commands import main


CALLS = {("iid", "-"): "iid", ("noniid", "dir"): "dir", ("noniid", "pat"): "pat"}

USAGE = "usage: generate_cifar100.py iid|noniid balance|- dir|pat|- [flags]; dir or pat goes with noniid"

if {"-h", "--help"} & {*sys.argv[1:]}:
    print(f"{USAGE}\n\n{__doc__}")
    main(["partition", "--help"])
if len(sys.argv) < 4 or (sys.argv[1], sys.argv[3]) not in CALLS or sys.argv[2] not in ("balance", "-"):
    sys.exit(USAGE)
kind, balance, scheme, *flags = sys.argv[1:]
command = ["partition", "--dataset_name", "cifar100", "--num_partitions", "1000", "--scheme", CALLS[kind, scheme]]
command += ["--balance"] if balance == "balance" else []
main([*command, "--output_dir", f"dataset/cifar100_{kind}1000", *flags])
