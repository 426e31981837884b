#!/usr/bin/env python
"""The server under load against one built the same way around the stock pipeline.

Both are the same HTTP code on one thread of torch. The stock server batches dynamically: the texts that wait when the
pipeline is free run together, up to `--stock_rows`; of several such limits the fastest is compared. Then:

- saturation: `--connections` clients, each sending its next text at once;
- open loop: Poisson arrivals at shares of the stock server's capacity, latencies from the scheduled time;
- a lone request: the engine against tokenizing and calling the model directly.

Every answer is compared with the model's own for that text. Rounds are interleaved; only one server works at a time.

    python benchmarks/serving.py runs/sst2_minilm_half_cost --texts path/to/sst2/validation.parquet
"""

import argparse
import asyncio
import json
import queue
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import torch
from common import add_results_argument, write_results
from transformers import AutoTokenizer, pipeline

from een_hf import AutoEarlyExitModel
from een_hf.commands.serve import serve
from een_hf.evaluation import stock_model
from een_hf.serving import AsyncExitEngine, EngineObserver, ServerLimits, create_app
from een_hf.serving.engine import ExitAnswers


TARGETS = {"throughput at saturation": 2.5, "p99 at 80 % load": 0.5, "a lone request": 1.15}


class StockEngine:
    """Dynamic batching around the stock pipeline, with the interface that the server needs."""

    def __init__(self, model, tokenizer, max_rows: int):
        self.model, self.max_rows, self.observer = model, max_rows, EngineObserver()
        self.pipeline = pipeline("text-classification", model=stock_model(model), tokenizer=tokenizer, device="cpu")
        self.is_running, self.num_waiting, self.auditor = True, 0, None
        self._waiting: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)

    async def __aenter__(self):
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *_):
        self._waiting.put(None)
        self._thread.join()

    async def predict(self, examples: list[str], policy=None, timeout: float | None = None) -> ExitAnswers:
        futures = [self._loop.create_future() for _ in examples]
        for item in zip(examples, futures, strict=True):
            self._waiting.put(item)
        logits = torch.tensor(await asyncio.wait_for(asyncio.gather(*futures), timeout))
        return ExitAnswers(logits, torch.full((len(examples),), self.model.num_exits - 1))

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            batch = [item]
            while len(batch) < self.max_rows:
                try:
                    batch.append(self._waiting.get_nowait())
                except queue.Empty:
                    break
            texts = [text for text, _ in batch]
            settings = {"top_k": None, "function_to_apply": "none", "truncation": True, "batch_size": len(texts)}
            places = self.model.config.label2id
            answers = []
            for labels in self.pipeline(texts, **settings):
                scores = {places[label["label"]]: label["score"] for label in labels}
                answers.append([scores[place] for place in range(len(scores))])
            self._loop.call_soon_threadsafe(self._finish, [future for _, future in batch], answers)

    @staticmethod
    def _finish(futures: list[asyncio.Future], answers: list[list[float]]) -> None:
        for future, answer in zip(futures, answers, strict=True):
            if not future.done():
                future.set_result(answer)


class Connection(asyncio.Protocol):
    """One kept connection: a request at a time."""

    def connection_made(self, transport):
        self.transport, self.data, self.answered = transport, b"", None

    def data_received(self, data):
        self.data += data
        head, found, body = self.data.partition(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1]) if found else 0
        if found and len(body) >= length:
            self.data = b""
            if not self.answered.done():
                self.answered.set_result((int(head.split(b" ", 2)[1]), body))

    def connection_lost(self, error):
        if self.answered is not None and not self.answered.done():
            self.answered.set_exception(ConnectionError("The connection was closed before the answer."))


class Client:
    """Sends texts to a server on this machine and keeps what comes back."""

    def __init__(self, port: int):
        self.port, self.free = port, []

    async def ask(self, text: str) -> tuple[int, bytes]:
        """Status and body."""
        loop = asyncio.get_running_loop()
        while self.free and self.free[-1].transport.is_closing():  # the server keeps idle connections for some seconds
            self.free.pop()
        if self.free:
            connection = self.free.pop()
        else:
            _, connection = await loop.create_connection(Connection, "127.0.0.1", self.port)
        connection.answered = loop.create_future()
        body = json.dumps({"inputs": text, "raw_scores": True}).encode()
        connection.transport.write(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        answer = await connection.answered
        self.free.append(connection)
        return answer

    def close(self) -> None:
        for connection in self.free:
            connection.transport.abort()
        self.free = []


async def saturate(port: int, texts: list[str], seconds: float, connections: int) -> tuple[float, list]:
    """Answers per second, and (place of the text, status, body) of each."""
    client, answers, start = Client(port), [], time.perf_counter()

    async def work(first: int) -> None:
        place = first
        while time.perf_counter() - start < seconds:
            answers.append((place % len(texts), *await client.ask(texts[place % len(texts)])))
            place += connections

    await asyncio.gather(*map(work, range(connections)))
    elapsed = time.perf_counter() - start
    client.close()
    return len(answers) / elapsed, answers


async def arrive(port: int, texts: list[str], seconds: float, rate: float, seed: int) -> tuple[list[float], list]:
    """Latencies in seconds of Poisson arrivals at `rate` a second, from the time that each was due, and answers."""
    rng, client, latencies, answers = np.random.default_rng(seed), Client(port), [], []
    due = np.cumsum(rng.exponential(1 / rate, int(rate * seconds)))
    places = rng.integers(len(texts), size=len(due))

    async def one(at: float, place: int) -> None:
        answers.append((place, *await client.ask(texts[place])))
        latencies.append(time.perf_counter() - at)

    tasks, start = [], time.perf_counter()
    for offset, place in zip(due, places, strict=True):
        pause = start + offset - time.perf_counter()
        if pause > 0:
            await asyncio.sleep(pause)
        tasks.append(asyncio.create_task(one(start + offset, int(place))))
    await asyncio.gather(*tasks)
    client.close()
    return latencies, answers


@contextmanager
def server(words: list[str]):
    """The port of a server in a process of its own."""
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        yield int(re.search(r"http://127.0.0.1:(\d+)", line)[1])
    finally:
        process.terminate()
        process.wait(60)


def check(answers: list, wanted: torch.Tensor, label2id: dict[str, int]) -> None:
    """Raise where an answer is not that of its text."""
    for place, status, body in answers:
        if status != 200:
            raise RuntimeError(f"status {status}: {body[:200]}")
        scores = torch.empty(wanted.shape[1])
        for label in json.loads(body)[0]:
            scores[label2id[label["label"]]] = label["score"]
        torch.testing.assert_close(scores, wanted[place], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def answers_of(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """Logits (num_texts, num_labels) of each text by itself."""
    return torch.cat([model(**tokenizer(text, return_tensors="pt", truncation=True)).logits for text in texts])


async def lone(model, tokenizer, texts: list[str]) -> dict:
    """Medians, in milliseconds, of a request that is alone: by the engine, and by the model itself."""

    @torch.no_grad()
    def directly(text: str) -> None:
        outputs = model(**tokenizer(text, return_tensors="pt", truncation=True))
        model.get_exit_policy().temper(outputs.logits, outputs.exit_index).softmax(-1).tolist()

    times = {"engine": [], "model": []}
    async with AsyncExitEngine(model, tokenizer) as engine:
        for place, text in enumerate(texts):
            for name in sorted(times, reverse=bool(place % 2)):
                start = time.perf_counter()
                if name == "engine":
                    await engine.predict([text])
                else:
                    directly(text)
                times[name].append(time.perf_counter() - start)
    medians = {f"{name}_ms": 1000 * float(np.median(values)) for name, values in times.items()}
    return {**medians, "ratio": float(np.median(np.divide(times["engine"], times["model"])))}


def measure(args, model, tokenizer, texts: list[str]) -> list[dict]:
    wanted = {"exits": answers_of(model, tokenizer, texts), "stock": answers_of(stock_model(model), tokenizer, texts)}
    label2id, rows = model.config.label2id, []
    mine = ["-m", "een_hf", "serve", args.model, "--port", "0", "--threads", str(args.threads)]
    stock = [__file__, args.model, "--texts", args.texts, "--threads", str(args.threads), "--serve_stock"]

    def run(kind: str, coroutine):
        value, answers = asyncio.run(coroutine)
        check(answers, wanted[kind], label2id)
        return value

    found = {}
    for limit in args.stock_rows:
        with server([*stock, str(limit)]) as port:
            run("stock", saturate(port, texts, 1, 4))
            found[limit] = run("stock", saturate(port, texts, args.seconds / 2, args.connections))
            rows.append({"what": "stock server, saturation", "max_rows": limit, "per_second": found[limit]})
            print(rows[-1], flush=True)
    limit = max(found, key=found.get)
    with server(mine) as exits_port, server([*stock, str(limit)]) as stock_port:
        ports = {"stock": stock_port, "exits": exits_port}
        rates = {kind: [] for kind in ports}
        for _ in range(args.rounds):
            for kind, port in ports.items():
                rates[kind].append(run(kind, saturate(port, texts, args.seconds / 2, args.connections)))
        capacity = float(np.median(rates["stock"]))
        rows.append({
            "what": "saturation", "stock_max_rows": limit, "stock_per_second": capacity,
            "exits_per_second": float(np.median(rates["exits"])),
            "ratio": float(np.median(np.divide(rates["exits"], rates["stock"]))),
        })  # fmt: skip
        print(rows[-1], flush=True)
        for load in args.loads:
            latencies = {kind: [] for kind in ports}
            for turn in range(args.rounds):
                for kind, port in ports.items():
                    rate = load * capacity
                    latencies[kind] += run(kind, arrive(port, texts, args.seconds / args.rounds, rate, turn))
            row = {"what": f"open loop, {load:.0%} of the stock server's capacity", "per_second": load * capacity}
            for kind, values in latencies.items():
                for percent in (50, 95, 99):
                    row[f"{kind}_p{percent}_ms"] = 1000 * float(np.percentile(values, percent))
            row |= {"num_requests": len(values), "p99_ratio": row["exits_p99_ms"] / row["stock_p99_ms"]}
            rows.append(row)
            print(row, flush=True)
    rows.append({"what": "a lone request", **asyncio.run(lone(model, tokenizer, texts[:150]))})
    print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a fine-tuned model of texts with a policy")
    parser.add_argument("--texts", required=True, help="a parquet file with a column `sentence`")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each server")
    parser.add_argument("--seconds", type=float, default=20, help="of each load on each server")
    parser.add_argument("--rounds", type=int, default=2, help="in which the two take turns")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8, 0.95])
    parser.add_argument(
        "--stock_rows", type=int, nargs="+", default=[8, 32], help="limits of the stock server's batches"
    )
    parser.add_argument("--serve_stock", type=int, help=argparse.SUPPRESS)
    add_results_argument(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = AutoEarlyExitModel.from_pretrained(args.model).eval(), AutoTokenizer.from_pretrained(args.model)
    if args.serve_stock:
        import socket

        engine = StockEngine(model, tokenizer, args.serve_stock)
        app = create_app(engine, limits=ServerLimits(timeout=300))
        serve(app, socket.create_server(("127.0.0.1", 0), backlog=2048), 300)
        return
    import pyarrow.parquet

    texts = pyarrow.parquet.read_table(args.texts)["sentence"].to_pylist()
    write_results(args.results, "serving", measure(args, model, tokenizer, texts), targets=TARGETS)


if __name__ == "__main__":
    main()
