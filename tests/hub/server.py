"""A Hub on the loopback interface, as much of it as pushing, listing and loading a model needs.

python server.py FOLDER prints its address and keeps every repository's files below FOLDER,
and in FOLDER/commits.jsonl the names that each commit brought.
"""

import base64
import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml


USER = "someone"
PIPELINE_TYPES = ("text-classification", "image-classification")
COMMIT = "0" * 40
ROOT = Path(sys.argv[1]).resolve() if __name__ == "__main__" else None


def header_errors(card):
    """What the Hub would refuse in the header of a card, by its published rules for models."""
    try:
        header = yaml.safe_load(card.split("---")[1])
    except (IndexError, yaml.YAMLError) as error:
        return [f"no header: {error}"]
    errors = []
    if header.get("pipeline_tag") not in (None, *PIPELINE_TYPES):
        errors.append(f"pipeline_tag {header['pipeline_tag']!r} is not known")
    for name in ("tags", "datasets", "metrics"):
        if not all(isinstance(one, str) and one for one in header.get(name) or []):
            errors.append(f"{name} must be names")
    for model in header.get("model-index") or []:
        if not model.get("name"):
            errors.append("model-index needs a name")
        for result in model.get("results") or []:
            task, dataset = result.get("task") or {}, result.get("dataset") or {}
            if not (task.get("type") in PIPELINE_TYPES and dataset.get("type") and dataset.get("name")):
                errors.append("model-index needs the task's type and the data set's type and name")
            for metric in result.get("metrics") or [{}]:
                if not metric.get("type") or not isinstance(metric.get("value"), (int, float)):
                    errors.append("model-index needs each metric's type and value")
    return errors


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status=200, body=b"", headers=()):
        self.send_response(status)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "whoami-v2"]:
            return self.reply(body={"name": USER, "type": "user", "orgs": []})
        if parts[:2] == ["api", "models"] and (ROOT / "/".join(parts[2:4])).is_dir():
            files = [path for path in (ROOT / "/".join(parts[2:4])).rglob("*") if path.is_file()]
            names = sorted(str(path.relative_to(ROOT / "/".join(parts[2:4]))) for path in files)
            if "tree" in parts:
                return self.reply(body=[{"type": "file", "path": n, "size": 0, "oid": n} for n in names])
            siblings = [{"rfilename": name} for name in names]
            return self.reply(body={"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings})
        if len(parts) > 4 and parts[2] == "resolve" and (path := ROOT.joinpath(*parts[:2], *parts[4:])).is_file():
            content = path.read_bytes()
            return self.reply(body=content, headers={"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})
        code = "EntryNotFound" if parts[2:3] == ["resolve"] and ROOT.joinpath(*parts[:2]).is_dir() else "RepoNotFound"
        self.reply(404, {"error": code}, {"X-Error-Code": code})

    def do_PUT(self):
        blob = ROOT / "blobs" / self.path.strip("/")
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(self.body())
        self.reply()

    def do_POST(self):
        path, data = urlsplit(self.path).path, self.body()
        if path == "/api/repos/create":
            given = json.loads(data)
            repo = f"{given.get('organization') or USER}/{given['name']}"
            (ROOT / repo).mkdir(parents=True, exist_ok=True)
            return self.reply(body={"url": f"{self.address}/{repo}", "name": repo, "id": repo})
        if path == "/api/validate-yaml":
            found = [{"message": message} for message in header_errors(json.loads(data)["content"])]
            return self.reply(400 if found else 200, {"errors": found, "warnings": []})
        if "/preupload/" in path:
            files = json.loads(data)["files"]
            large = (".safetensors", ".bin", ".png", ".npz")
            for file in files:
                file |= {"uploadMode": "lfs" if file["path"].endswith(large) else "regular", "shouldIgnore": False}
            return self.reply(body={"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.address}/{item['oid']}"}}}
                for item in json.loads(data)["objects"]
            ]
            return self.reply(
                body={"transfer": "basic", "objects": objects},
                headers={"Content-Type": "application/vnd.git-lfs+json"},
            )
        repo = "/".join(path.split("/")[3:5])
        entries = [json.loads(line) for line in data.splitlines()]
        entries = [entry for entry in entries if entry["key"] in ("file", "lfsFile")]
        with open(ROOT / "commits.jsonl", "a") as log:
            log.write(json.dumps({"repo": repo, "files": [entry["value"]["path"] for entry in entries]}) + "\n")
        for entry in entries:
            target = ROOT / repo / entry["value"]["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            if entry["key"] == "file":
                target.write_bytes(base64.b64decode(entry["value"]["content"]))
            else:
                target.write_bytes((ROOT / "blobs" / entry["value"]["oid"]).read_bytes())
        commit = {"commitUrl": f"{self.address}/{repo}/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""}
        self.reply(body=commit)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()
