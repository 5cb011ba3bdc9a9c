"""Registries find the files of a package; a damaged one takes none of the others away."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import pytest

from dataloaders import error_text
from myutils.registry import Registry

SHAPE = """from shapes_registry import SHAPES, Solid


@SHAPES.register("{0}")
class Shape({1}):
    name = "{0}"
"""
SOUND = SHAPE + "    def volume(self): ...\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that can be imported, with the registry of its kind beside it."""
    folder = tmp_path / f"shapes_of_{tmp_path.name}"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (tmp_path / "shapes_registry.py").write_text(
        "from abc import ABC, abstractmethod\n\nfrom myutils.registry import Registry\n\n\n"
        "class Solid(ABC):\n    @abstractmethod\n    def volume(self): ...\n\n\n"
        f'SHAPES = Registry("shape", "{folder.name}", Solid)\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "shapes_registry", raising=False)
    monkeypatch.setattr(error_text, "_OWN", (str(tmp_path),))
    return folder


def registry() -> Registry:
    from shapes_registry import SHAPES

    return SHAPES


def test_a_file_of_the_package_is_found_by_its_name(package: Path) -> None:
    (package / "ball.py").write_text(SOUND.format("ball", "Solid"))
    assert registry().names() == ["ball"] and registry().get("ball").name == "ball"
    with pytest.raises(ValueError, match=r"unknown shape 'bal'; did you mean 'ball'\? known: ball$"):
        registry().get("bal")


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (
            "import no_such_package\n",
            r"No module named 'no_such_package' \(ModuleNotFoundError at .*cube\.py, line 1\)",
        ),
        ("class Cube(\n", r"'\(' was never closed \(cube\.py, line 1\)"),
        (SOUND.format("ball", "Solid"), "shape 'ball' is registered twice; choose another name"),
        (SOUND.format("cube", "object"), "shape 'cube' is no Solid; derive its class from this one"),
        (SHAPE.format("cube", "Solid"), "shape 'cube' is Shape without volume; write each as in Solid"),
    ],
)
def test_a_damaged_file_is_named_and_takes_no_other_away(
    package: Path, code: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    (package / "ball.py").write_text(SOUND.format("ball", "Solid"))
    (package / "cube.py").write_text(code)
    with caplog.at_level(logging.WARNING):
        assert registry().get("ball").name == "ball"
    named = rf"{package.name}\.cube cannot be imported: {fault}"
    [record] = caplog.records
    assert re.search(named, record.getMessage()), record.getMessage()
    with pytest.raises(ValueError, match=rf"unknown shape 'cube'; {named}.*; known: ball$"):
        registry().get("cube")
