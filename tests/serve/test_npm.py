"""The npm package `openai` against a real server: client.mjs is the program, and every check in it must hold.

npm install --prefix DIR openai
NODE_PATH=DIR/node_modules pytest tests/serve/test_npm.py
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.serve.serving import KEY, Running

SCRIPT = Path(__file__).with_name("client.mjs")


@pytest.fixture(scope="module")
def node() -> str:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node isn't there: it runs the npm client")
    if subprocess.run([node, "-e", 'require.resolve("openai")'], capture_output=True).returncode:
        pytest.skip("the npm package openai isn't there: npm install --prefix DIR openai, NODE_PATH=DIR/node_modules")
    return node


def test_what_a_javascript_program_does_holds(node: str, running: Running) -> None:
    base = running.model.base.source.public_name
    told = json.dumps({"address": running.address, "key": KEY, "base": base, "adapter": "one"})
    ended = subprocess.run([node, SCRIPT, told], capture_output=True, text=True, timeout=120)
    checks = [line for line in SCRIPT.read_text().splitlines() if line.startswith('  async "')]
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == len(checks) > 5
