"""The architecture page says what the code does: its packages, its names, its words."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import test_package

import saev_torch.order

PAGE = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text()
PICTURE = re.findall(r"^```\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[0]
FLOORS = [re.match(r"\w+(?:  \w+)*", line)[0].split("  ") for line in PICTURE.splitlines()]


def test_every_package_stands_in_the_picture_once():
    assert sorted(name for floor in FLOORS for name in floor) == sorted({*test_package.PACKAGES} - {"__init__"})


@pytest.mark.parametrize("module", [module for module in test_package.MODULES if module != "__init__"])
def test_no_arrow_of_the_picture_runs_up(module):
    height = {name: len(FLOORS) - i for i, floor in enumerate(FLOORS) for name in floor}
    for name in test_package.imports_of(module):
        if name.startswith("saev_torch."):
            below = name.removeprefix("saev_torch.").partition(".")[0]
            assert height[below] <= height[module.partition(".")[0]], f"{module} imports {name}"


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+(?:\.\w+)+)`", PAGE))))
def test_every_name_on_the_page_is_there(name):
    path, found = name.split("."), None
    for n in range(len(path), 0, -1):
        try:
            found = importlib.import_module(".".join(["saev_torch", *path[:n]]))
        except ModuleNotFoundError:
            continue
        for attribute in path[n:]:
            found = getattr(found, attribute)
        break
    assert found is not None


def test_the_words_are_those_that_the_package_defines():
    said = re.sub(r"\s+", " ", PAGE.rpartition("`:")[2]).strip(" .").split(", ")
    assert said == re.findall(
        r"^    (\w+)  +[A-Z]", ast.get_docstring(ast.parse(Path(saev_torch.order.__file__).read_text())), re.M
    )


def test_it_fits_a_screen():
    assert len(PAGE.splitlines()) <= 70
