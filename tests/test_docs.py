"""The documentation keeps its promises: links, paths, commands and code in it are real."""

from __future__ import annotations

import importlib.util
import re
import shlex
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.cli import build_parser
from model.train import load_recipe
from model.train.__main__ import main as train
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "data").rglob("README.md"))]
NANO = ROOT / "assets" / "medplib-nano"
MADE_BY_TRAINING = (
    set()
    if NANO.is_dir()
    else {  # there once the nano is
        "assets",
        "assets/medplib-nano",
        "assets/pictures",
        "assets/pictures/answer.png",
    }
)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"(?:[\w.*-]+/)*[\w.*-]+")
_PROGRAMS = {"medplib", "sh", "bash", "python", "deepspeed", "torchrun"}
_CITED = re.compile(r"reference (§[^)\n]*)")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def fences(page: Path, *languages: str) -> list[str]:
    """Contents of a page's code fences in the given languages."""
    found = _FENCE.findall(page.read_text(encoding="utf-8"))
    return [content for language, content in found if language in languages]


def shell_commands(page: Path) -> list[list[str]]:
    """Command lines of a page's shell fences, split into words, comments and ``NAME=value`` in front left out."""
    commands = []
    for content in fences(page, "bash", ""):
        for line in content.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line.removeprefix("$ "), comments=True)
            except ValueError:  # not a command: a listing with a quotation mark, say
                continue
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words and words[0] in _PROGRAMS:
                commands.append(words)
    return commands


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if str(path.relative_to(ROOT)) in MADE_BY_TRAINING:
            continue
        assert path.exists(), f"{target} does not exist"
        assert not anchor or anchor in headings(path), f"{target} has no such heading"


@pages
def test_commands_are_understood(page: Path) -> None:
    for words in shell_commands(page):
        if words[0] == "medplib":
            build_parser().parse_args(words[1:])  # ends the process with 2 where it does not understand
        script = words[1] if words[0] in ("sh", "bash") and len(words) > 1 else ""
        assert not script or (ROOT / script).is_file(), f"{script} does not exist"
        for word in words:
            name = word.partition("=")[2] if word.startswith("model.sizes=") else word
            if name.startswith("configs/"):
                assert (ROOT / name).is_file(), f"{name} does not exist"


@pages
def test_recipe_arguments_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every ``key=value`` on a training command is a key of the recipe that it would change."""
    for variable in ("LLAMA", "LLAVA", "CLIP", "SAM", "DATA", "IMAGES"):
        monkeypatch.setenv(f"MEDPLIB_{variable}", str(tmp_path / "absent"))
    for words in shell_commands(page):
        overrides = [word for word in words if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
        stage = re.search(r"stage(\d)", " ".join(words))
        if not overrides or stage is None:
            continue
        recipe = ROOT / "configs" / "stages" / f"stage{stage[1]}_7b.yaml"
        load_recipe(recipe, overrides)  # raises where a key or value is wrong


def test_options_of_training_are_real(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train(["--help"])
    told = capsys.readouterr().out
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for option in set(re.findall(r"--(?:resume|check|on-bad-record)\b", text)):
        assert option in told


@pages
def test_named_paths_exist(page: Path) -> None:
    """Paths in code spans are real, written from the project's root, from ``model/``, or as a bare file name."""
    missing = []
    for code in _CODE.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        name = code.strip().split(" ")[0].rstrip("/")
        rooted = re.match(r"(model|scripts|configs|docs|tests|assets)/", name)
        is_path = _PATH.fullmatch(name) and (rooted or name.endswith((".py", ".sh")))
        if not is_path or name in MADE_BY_TRAINING:
            continue
        places = [ROOT, ROOT / "model"] if "/" in name else [ROOT / "model", ROOT / "scripts"]
        if not any(found for place in places for found in place.glob(name if "/" in name else f"**/{name}")):
            missing.append(name)
    assert not missing, f"{page.name} names {', '.join(missing)}"


def readme_layout() -> dict[str, str]:
    """Paths of the README's layout and what it says about each."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = fences_after(text, "## Repository layout")
    found, parents = {}, ["", "", ""]
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, said = line.strip().partition(" ")
        parents[depth] = name
        path = "".join(parents[:depth]) + name
        found[path.rstrip("/")] = said.strip()
    return found


def fences_after(text: str, heading: str) -> str:
    """The first code fence below a heading."""
    match = _FENCE.search(text, text.index(heading))
    assert match is not None
    return match[2]


def test_readme_layout_matches_the_tree() -> None:
    listed = readme_layout()
    assert not [path for path in listed if not (ROOT / path).exists() and path not in MADE_BY_TRAINING]
    packages = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "model").rglob("__init__.py")} - {"model"}
    settings = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").iterdir() if path.is_dir()}
    absent = (packages | settings) - listed.keys()
    assert not absent, f"the layout lacks {', '.join(sorted(absent))}"


@pages
def test_python_examples_compile(page: Path) -> None:
    for content in fences(page, "python"):
        compile(content, str(page), "exec")


def test_cited_sections_exist() -> None:
    sections = set(re.findall(r"^## (\d+)\. ", (ROOT / "docs" / "reference.md").read_text("utf-8"), re.MULTILINE))
    for folder in ("model", "scripts", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            cited = {n for tail in _CITED.findall(file.read_text("utf-8")) for n in re.findall(r"§(\d+)", tail)}
            assert cited <= sections, f"{file.relative_to(ROOT)} cites sections {sorted(cited - sections)}"
    assert all(int(after) == int(before) + 1 for before, after in pairwise(sorted(sections, key=int)))


def test_figure_names_real_files() -> None:
    drawing = (ROOT / "docs" / "pictures" / "architecture.svg").read_text("utf-8")
    rooms = [room.strip("/") for room in re.findall(r'class="room"[^>]*>([^<]+)<', drawing)]
    for name in re.findall(r">([a-z_0-9]+\.py)<", drawing):
        assert any((ROOT / "model" / room / name).is_file() for room in rooms), name


def test_phantom_picture_is_what_the_script_draws() -> None:
    location = ROOT / "scripts" / "pictures.py"
    spec = importlib.util.spec_from_file_location("pictures", location)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = ROOT / "docs" / "pictures" / "phantoms.png"
    assert path.stat().st_size <= 400 * 1024
    kept, drawn = np.asarray(Image.open(path).convert("RGB"), int), np.asarray(module.phantoms(), int)
    assert kept.shape == drawn.shape
    assert np.abs(kept - drawn).mean() < 4, "run python scripts/pictures.py phantoms"  # the palette costs about 2
