"""docs/distributed.md quotes errors as the code raises them."""

import ast
import re

import pytest

from tests.documents import ROOT

PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
QUOTES = re.findall(r"^\| `([^`]+)` \|", PAGE.partition("## What is refused")[2], re.M)


def messages() -> list[str]:
    """The text that each raise, or constant of a message, is made of; what is filled in, as [..]."""
    found = []
    for path in (ROOT / "lora_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (str(p.value) if isinstance(p, ast.Constant) else "[..]" for p in node.values)
                found.append("".join(parts))
    return found


MESSAGES = messages()


@pytest.mark.parametrize("quote", QUOTES)
def test_the_page_quotes_the_code(quote):
    # "in_features" and "out_features", and the 8 of a random number's columns, are filled in.
    pattern = re.escape(quote)
    for filled in ("in_features", "out_features", "8"):
        pattern = pattern.replace(filled, rf"(?:{filled}|\[\.\.\])")
    assert any(re.search(pattern, message) for message in MESSAGES)


def test_there_are_quotes():
    assert len(QUOTES) == 12
