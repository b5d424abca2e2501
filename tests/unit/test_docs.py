"""What the documents say, done: every Python example runs, every link leads somewhere."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import lora_kernels
from tests.documents import FENCE, ROOT, document_id, run_python_blocks

DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
TUTORIALS = set((ROOT / "docs" / "tutorials").glob("*.md"))  # tests/interop/test_tutorials.py looks at their results

LINK = re.compile(
    r"\[[^\]]*\]\(\s*<?(?P<target>[^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|<(?:img|a)\s[^>]*?(?:src|href)=\"(?P<html>[^\"]+)\""
)
HEADING = re.compile(r"^#{1,6} +(?P<title>.+?) *#*$", re.M)


def prose(text: str) -> str:
    """The text without code, where brackets and hashes mean something else."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(path: Path) -> set[str]:
    """The fragments that a Markdown viewer makes of the headings."""
    titles = HEADING.findall(FENCE.sub("", path.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


# FSDP2 frees its parameters' memory, which only an allocator's can be.
FREES = pytest.mark.aligned
EXAMPLES = [
    pytest.param(path, marks=FREES if path.stem == "distributed" else ()) for path in DOCUMENTS if path not in TUTORIALS
]


@pytest.mark.parametrize("path", EXAMPLES, ids=document_id)
def test_python_examples_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python_blocks(path)


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_links_resolve(path):
    broken = []
    for match in LINK.finditer(prose(path.read_text(encoding="utf-8"))):
        target = match["target"] or match["html"]
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue  # another site: not asked, so that the tests need no network
        name, _, fragment = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        lost = not file.exists() or not file.is_relative_to(ROOT)
        if lost or (fragment and file.suffix == ".md" and fragment not in anchors(file)):
            broken.append(target)
    assert broken == []


def modules() -> list[str]:
    """Every module with an example that loads without Triton."""
    files = sorted((ROOT / "lora_kernels").rglob("*.py"))
    paths = [p.relative_to(ROOT) for p in files if ">>> " in p.read_text(encoding="utf-8")]
    names = [".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in paths]
    return [n for n in names if not n.startswith("lora_kernels.kernels") and not n.endswith("__main__")]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    torch.manual_seed(0)
    outcome = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert outcome.failed == 0
    assert outcome.attempted


@pytest.mark.parametrize(
    "name",
    [
        "AdapterReport",
        "LoRALinear",
        "add_lora",
        "explain_plan",
        "load_lora",
        "lora_linear",
        "merge_lora",
        "patch_peft",
        "save_lora",
        "set_adapter",
        "unload_lora",
        "unpatch_peft",
    ],
)
def test_public_entry_points_have_an_example(name):
    examples = doctest.DocTestFinder().find(getattr(lora_kernels, name), name)
    assert any(test.examples for test in examples)
