"""A server in a process of its own, and bundles for it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx

from export.bundle import bundle
from export.onnx_export import export_checkpoint
from slmrec.artifact import Stage, open_artifact, publish
from slmrec.config import ExportConfig
from slmrec.dataset import load_dataset
from slmrec.models.checkpoint import save_checkpoint

NUM_ITEMS = 40


def make_bundle(tiny_model, runs, name, change=0.0, append=None):
    import torch

    data = load_dataset(runs / "data")
    model = tiny_model(prompt="none", num_items=data.num_items, positions="compact").eval()
    with torch.no_grad():
        model.item_table.weight.add_(change * torch.randn_like(model.item_table.weight))
    with publish(runs / f"student-{name}", Stage(name="distill", kind="checkpoint", settings={})) as folder:
        save_checkpoint(folder, model)
        data.items.save(folder)
    student = open_artifact(runs / f"student-{name}")
    graph, _ = export_checkpoint(student, data, runs / f"export-{name}", ExportConfig(append=append))
    return bundle(graph, data, runs / name)[0].path


class Running:
    """`slmcompress serve` in a process of its own."""

    def __init__(self, bundle_path, *flags, env=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "slmrec.cli.main", "serve", str(bundle_path), "--port", str(self.port), *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **(env or {})}
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self.reader.start()
        self.url = f"http://127.0.0.1:{self.port}"
        for _ in range(600):
            if self.process.poll() is not None:
                raise AssertionError("".join(self.lines))
            try:
                if httpx.get(self.url + "/v2/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError("".join(self.lines))

    def stop(self, signum=signal.SIGTERM):
        self.process.send_signal(signum)
        return self.ended()

    def ended(self):
        code = self.process.wait(30)
        self.reader.join(30)
        self.process.stdout.close()
        return code

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:  # the test failed before it ended
            self.stop(signal.SIGKILL)
