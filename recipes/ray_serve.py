#!/usr/bin/env python
"""Serve a model with early exits on Ray Serve: each replica is the server of `een-hf serve`, with its own engine.

python recipes/ray_serve.py runs/demo --replicas 2
curl localhost:8000/predict -H 'Content-Type: application/json' -d '{"inputs": "Shares fell."}'
"""

import argparse
from contextlib import suppress

import ray
from ray import serve

from een_hf.inference.loading import load_early_exit_model, load_processor
from een_hf.serving import AsyncExitEngine, PrometheusObserver, create_app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder that all nodes can read, or Hub name")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each replica; 0.5 puts two on one GPU")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: reachable from other machines")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--address", help="`auto`: the cluster of this machine; default: a Ray of its own")
    args = parser.parse_args()
    if args.address:
        ray.init(args.address)
    elif not ray.is_initialized():
        ray.init("local", num_cpus=args.replicas, include_dashboard=False)

    def build_app():
        """In a replica: `/predict`, `/health`, `/info`, `/metrics` and `/docs`."""
        model = load_early_exit_model(args.model)
        engine = AsyncExitEngine(model, load_processor(args.model, model), observer=PrometheusObserver())
        return create_app(engine, name=args.model)

    serve.start(http_options={"host": args.host, "port": args.port})
    # The engine has a queue of its own, so that a replica may be given many requests at a time.
    deployment = serve.deployment(
        serve.ingress(build_app)(),
        name="een_hf",
        num_replicas=args.replicas,
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": 1, "num_gpus": args.gpus},
    )
    with suppress(KeyboardInterrupt):
        serve.run(deployment.bind(), blocking=True)  # until SIGINT or SIGTERM


if __name__ == "__main__":
    main()
