"""Python examples in Markdown files, run as a reader would type them."""

import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]

FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+)(?P<language>[^\n]*)\n(?P<body>.*?)^(?P=indent)(?P=fence) *$", re.M | re.S
)


def document_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def run_python_blocks(path: Path) -> dict[str, Any]:
    """The blocks of one document, in order, in one namespace, which is returned."""
    text = path.read_text(encoding="utf-8")
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "__example__"}
    for block in FENCE.finditer(text):
        if block["language"].strip() == "python":
            # Blank lines before the code give a traceback the document's own line numbers.
            line = text.count("\n", 0, block.start("body"))
            body = re.sub(rf"^{block['indent']}", "", block["body"], flags=re.M)
            exec(compile("\n" * line + body, document_id(path), "exec"), namespace)
    return namespace
