"""The pages for those who come from LLaMA-Factory and ms-swift show what `migrate` really makes of their examples."""

from __future__ import annotations

import json
import re
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from rlhf_ppo.config.arguments.commands import MigrateArgs
from rlhf_ppo.migration.migrate import migrate

PAGES = Path(__file__).parents[3] / "docs/coming-from"


@pytest.mark.parametrize(
    ("page", "before", "file", "rows"),
    [("llama-factory.md", "yaml", "ppo.yaml", 1000), ("ms-swift.md", "sh", "ppo.sh", None)],
)
def test_the_example_is_what_migrate_makes_of_it(page, before, file, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (PAGES / page).read_text(encoding="utf-8").partition("Before, ")[2]
    old, new = re.findall(r"```\w+\n(.*?)```", text, flags=re.DOTALL)[:2]
    Path(file).write_text(old)
    made = migrate(MigrateArgs(file=file, rows=rows)).splitlines()
    assert new.splitlines() == [line for line in made if line and not line.startswith("#")]


def test_the_function_that_asks_their_reward_server():
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
            body = json.dumps({"scores": [float(len(text)) for text in texts]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    block = (PAGES / "llama-factory.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    names: dict = {}
    exec(block.replace("localhost:8000", f"127.0.0.1:{server.server_port}"), names)
    try:
        assert names["server"](["a", "bc"], ["d", "e"]) == [2.0, 3.0]
    finally:
        server.shutdown()
        server.server_close()
