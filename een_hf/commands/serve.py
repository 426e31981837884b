"""Answer requests over HTTP with early exits.

een-hf serve runs/mine --port 8000

curl 127.0.0.1:8000/predict -H 'Content-Type: application/json' -d '{"inputs": "A fine film."}'

POST /predict has the requests and responses of text-embeddings-inference and Inference Endpoints; images are sent as
files (--data-binary @cat.png -H 'Content-Type: image/png') or in base64. GET /docs describes the requests; /health,
/info and /metrics (Prometheus) are for monitoring. The examples of all requests in progress run the stages together.
After SIGTERM the server answers the requests in progress and ends. The content of requests is never logged.
"""

import socket
from contextlib import suppress

import torch

from ..inference.loading import DTYPES, load_early_exit_model, load_processor
from ..models import ExitConfigurationError
from ..serving import AsyncExitEngine, Auditor, PrometheusObserver, ServerLimits, create_app


def add_arguments(parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="An early-exit model: a folder or a Hub name.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on. Default: only this machine.")
    parser.add_argument("--port", type=int, default=8000, help="Port; 0: any free one. Default: 8000.")
    parser.add_argument("--reuse_port", action="store_true", help="Let several servers listen on one port (Linux).")
    parser.add_argument("--device", help="cpu, cuda, cuda:1. Default: cuda if there is one.")
    parser.add_argument("--dtype", choices=DTYPES, help="Precision of the weights. Default: the checkpoint's.")
    parser.add_argument("--no_cuda_graphs", action="store_true", help="On CUDA, run the stages without CUDA graphs.")
    parser.add_argument("--threads", type=int, help="Number of torch's threads on the CPU. Default: torch's own.")
    parser.add_argument(
        "--max_rows", type=int, help="Largest number of rows that run together. Default: 64 on CUDA, else 8."
    )
    parser.add_argument(
        "--max_wait_ms", type=float, default=5.0, help="Milliseconds that rows wait before a deeper stage. Default: 5."
    )
    parser.add_argument(
        "--max_waiting",
        type=int,
        default=1024,
        help="Largest number of rows without an answer; beyond it, 503. Default: 1024.",
    )
    parser.add_argument(
        "--max_length", type=int, help="Number of tokens to which texts are truncated. Default: what the model takes."
    )
    parser.add_argument(
        "--max_inputs", type=int, default=64, help="Largest number of inputs of one request. Default: 64."
    )
    parser.add_argument(
        "--max_body_bytes", type=int, default=2 << 20, help="Largest size of a request. Default: 2 MiB."
    )
    parser.add_argument("--timeout", type=float, default=30.0, help="Seconds that a request may take. Default: 30.")
    parser.add_argument(
        "--audit_rate",
        type=float,
        help="Share of the inputs that continue to the last exit after their answer, to monitor the policy's risk.",
    )
    parser.add_argument(
        "--audit_limit",
        type=float,
        help="Largest share of answers that may differ from the last exit's. Default: the certified limit.",
    )
    parser.add_argument(
        "--audit_confidence", type=float, default=0.95, help="Probability of no false alarm. Default: 0.95."
    )
    parser.add_argument(
        "--on_alarm", choices=["log", "full"], default="log", help="full: no early exit after an alarm. Default: log."
    )


def run(args) -> None:
    for name in ("threads", "max_length", "max_inputs", "max_body_bytes", "timeout"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ExitConfigurationError(f"--{name} must be above 0, not {value}.")
    listening = _listen(args.host, args.port, args.reuse_port)  # before the model is loaded: a port may be taken
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load_early_exit_model(args.model, device=args.device, dtype=args.dtype)
    processor = load_processor(args.model, model)
    auditor = None
    if args.audit_rate is not None:
        auditor = Auditor(model, args.audit_rate, args.audit_limit, args.audit_confidence, args.on_alarm)
    engine = AsyncExitEngine(
        model,
        processor,
        max_rows=args.max_rows,
        max_wait_ms=args.max_wait_ms,
        max_waiting=args.max_waiting,
        max_length=args.max_length,
        observer=PrometheusObserver(),
        auditor=auditor,
        cuda_graphs=False if args.no_cuda_graphs else None,
    )
    limits = ServerLimits(args.max_body_bytes, args.max_inputs, args.timeout)
    serve(create_app(engine, name=args.model, limits=limits), listening, args.timeout)


def serve(app, listening: socket.socket, timeout: float) -> None:
    """Run an ASGI application until SIGTERM or SIGINT, then answer what is in progress for up to `timeout` seconds."""
    import uvicorn

    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"Listening at http://{host}:{port}, described at http://{host}:{port}/docs", flush=True)
    config = uvicorn.Config(
        app, access_log=False, log_level="warning", server_header=False, timeout_graceful_shutdown=int(timeout) + 1
    )
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again once it has ended
        uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int, reuse_port: bool) -> socket.socket:
    try:
        return socket.create_server(
            (host, port),
            family=socket.AF_INET6 if ":" in host else socket.AF_INET,
            reuse_port=reuse_port,
            backlog=2048,
        )
    except (OSError, OverflowError, ValueError) as error:
        raise ExitConfigurationError(f"--host {host} --port {port}: cannot listen there ({error}).") from error
