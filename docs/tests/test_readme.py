"""README and docs say what is true: code blocks run, tables are of today, links lead somewhere."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

import support_matrix  # noqa: E402

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("docs/packages/*.md")),
    ROOT / "packages" / "attn-flash" / "README.md",  # the tests of others run their own
    ROOT / "packages" / "attn-triangle" / "README.md",
]


def name_of(page):
    return str(page.relative_to(ROOT))


def code_blocks():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(r"^( *)```python\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE):
            line = text[: block.start()].count("\n") + 1
            code = re.sub(f"^{block[1]}", "", block[2], flags=re.MULTILINE)
            yield pytest.param(code, id=f"{name_of(page)}:{line}")


@pytest.mark.parametrize("code", list(code_blocks()))
def test_code_block_runs(code):
    exec(compile(code, "block", "exec"), {"__name__": "block"})


def test_every_package_has_a_quick_start():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for package in ("flash", "paged", "triangle", "evo", "vulkan"):
        assert re.search(rf"^### attn-{package}\n\n```python", text, re.MULTILINE), package


def test_the_readme_has_the_support_matrix_of_today():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert support_matrix.updated(text) == text


def test_the_support_matrix_knows_the_kernels_of_attn_flash():
    _, *rows = support_matrix.matrix()
    [forward] = [row for row in rows if row[:2] == ["`attn_flash::attention`", "forward"]]
    assert forward[2] == "torch"
    assert forward[3].startswith("hopper: float16 bfloat16; triton: float32")
    assert forward[4].startswith("triton: float16 bfloat16 float32")
    assert forward[5] == "torch"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_files_lead_somewhere(page):
    prose = re.sub(
        r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose)
    broken = [link for link in links if not (page.parent / link).exists()]
    assert not broken
