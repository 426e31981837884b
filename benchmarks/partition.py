#!/usr/bin/env python
"""Time and memory of cutting CIFAR-100 into 1,000 balanced non-IID parts, in both formats.

Each run is `recipes/generate_cifar100.py noniid balance dir` in a process of its own and with an empty cache, from the
first import to the last file. CPU time tells a busy machine from slow code. Peak memory is what is resident in that
process, mapped files included.

    python benchmarks/partition.py --dataset_name path/to/cifar100
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import add_results_argument, summarize, write_results


ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="cifar100")
    parser.add_argument("--formats", nargs="+", default=["parquet", "npz"])
    parser.add_argument("--repeats", type=int, default=3)
    add_results_argument(parser)
    args = parser.parse_args()

    results = []
    for format in args.formats:
        seconds, computing, kibibytes = [], [], []
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory() as folder:
                flags = ["--dataset_name", args.dataset_name, "--format", format]
                flags += ["--output_dir", f"{folder}/parts", "--cache_dir", f"{folder}/cache"]
                recipe = [sys.executable, str(ROOT / "recipes/generate_cifar100.py"), "noniid", "balance", "dir"]
                start = time.perf_counter()
                process = subprocess.Popen([*recipe, *flags], stdout=subprocess.DEVNULL)
                # RUSAGE_CHILDREN would be the largest of all children so far.
                _, status, usage = os.wait4(process.pid, 0)
                seconds.append(time.perf_counter() - start)
                if status:
                    sys.exit(f"{' '.join(process.args)} failed with status {os.waitstatus_to_exitcode(status)}")
                computing.append(usage.ru_utime + usage.ru_stime)
                kibibytes.append(usage.ru_maxrss)
                about = json.loads(Path(folder, "parts", "partition.json").read_text())
        row = {"format": format, "parts": about["num_partitions"], "rows": sum(map(sum, about["sizes"].values()))}
        row["peak memory (GiB)"] = max(kibibytes) / 2**20
        results.append({**row, "wall": summarize(seconds), "cpu": summarize(computing)})
        print(results[-1])
    write_results(args.results, "partition", results)


if __name__ == "__main__":
    main()
