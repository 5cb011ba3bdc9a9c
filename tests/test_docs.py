"""What the documents name exists: tests, files, and the sections that links lead to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from myutils.contrastive_prototype_manager import ContrastivePrototypeManager

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Names of a page's sections, as links spell them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_sections(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, section = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), target
        assert not section or section in anchors(found), target


def test_tests_that_are_named_exist() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    defined = {name for source in sources for name in re.findall(r"def (test_\w+)", source)}
    for page in PAGES:
        named = set(re.findall(r"\btest_\w+\b(?!\.py)", page.read_text(encoding="utf-8")))
        assert named <= defined | {"test_list"}, (page.name, named - defined)


def test_tests_that_are_named_with_a_file_are_in_it() -> None:
    for page in PAGES:
        for path, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", page.read_text(encoding="utf-8")):
            assert (ROOT / path).is_file(), (page.name, path)
            source = (ROOT / path).read_text(encoding="utf-8")
            assert re.search(rf"def {name}\b", source), (page.name, f"{path}::{name}")


class _OneLayer(nn.Module):
    """Logits and features, as the page's example asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.classifier = nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, 3, 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.layer(images).relu()
        return 20 * self.classifier(features), features


def test_the_step_with_the_manager_alone_trains_it() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(manager = .*?)```", page, re.DOTALL)
    torch.manual_seed(0)
    names: dict[str, Any] = {"torch": torch, "ContrastivePrototypeManager": ContrastivePrototypeManager}
    names |= {"K": 3, "E": 8, "device": "cpu", "student": _OneLayer(), "teacher": _OneLayer(), "step": 0}
    names |= dict.fromkeys(("images_l", "strong_u", "weak_u"), torch.randn(2, 1, 8, 8, 8))
    names |= {"labels": torch.randint(0, 3, (2, 8, 8, 8)), "supervised": 0.0, "consistency": 0.0}
    exec(code.replace("...\n", ""), names | {"rampup": lambda step: 1.0}, names)
    names["loss"].backward()
    assert names["manager"].memory_count.any()
    gradients = [p.grad for p in (*names["student"].layer.parameters(), *names["manager"].parameters())]
    assert all(gradient is not None for gradient in gradients) and gradients[0].abs().sum() > 0
