"""The files under deploy/ are documentation: what they start exists and understands its flags."""

from __future__ import annotations

import argparse
import configparser
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from model.cli import build_parser
from model.serve.limits import ServeLimits
from model.serve.server import parse_flags
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
SECURITY = ROOT / "docs" / "security.md"
PAGES = [ROOT / "README.md", ROOT / "docs" / "serving.md"]
Reader = Callable[[list[str]], argparse.Namespace]


def _readers() -> dict[str, Reader]:
    """How each program reads its flags."""
    from model.serve import controller, gradio_web_server, model_worker

    return {
        "model.serve.controller": partial(parse_flags, controller.make_parser()),
        "model.serve.model_worker": partial(parse_flags, model_worker.make_parser()),
        "model.serve.gradio_web_server": partial(parse_flags, gradio_web_server.build_parser()),
    }


READERS = _readers()


def understood(words: list[str]) -> argparse.Namespace | None:
    """The flags of a command as its own parser reads them; None for a command that is not ours."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[:1] == ["medplib"]:
        return build_parser().parse_args(words[1:])
    module = next((word for before, word in pairwise(words) if before == "-m"), "")
    if module in READERS:
        return READERS[module](words[words.index(module) + 1 :])
    assert not module.startswith("model.serve"), f"there is no {module}"
    return None


def example_environment() -> dict[str, str]:
    """The variables of the example file."""
    lines = (DEPLOY / "systemd" / "medplib.env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_start_programs_with_flags_they_know(unit: Path) -> None:
    parser = configparser.RawConfigParser(strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit)
    service = dict(parser["Service"])
    environment = example_environment()
    named = set(re.findall(r"\$\{(\w+)\}", service["ExecStart"]))
    assert named <= set(environment), f"{named - set(environment)} stand nowhere in medplib.env.example"
    command = re.sub(r"\$\{(\w+)\}", lambda match: environment[match[1]], service["ExecStart"]).replace("%i", "0")
    options = understood(shlex.split(command))
    assert options is not None and options.port
    if "--worker" in command:
        assert options.worker.endswith(f":{options.port}")
    assert "KEY" not in service["ExecStart"]  # every user of the machine sees a command line
    grace = getattr(options, "grace", 5)
    assert int(service["TimeoutStopSec"]) > grace, "systemd would kill what still ends its answers"


def test_all_three_programs_have_a_unit() -> None:
    started = {module for unit in UNITS for module in READERS if module in unit.read_text()}
    assert started == set(READERS)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_understands_the_units(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/opt/medplib/.venv/bin/python", "/bin/true"))
    told = subprocess.run(["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=False)
    assert not [line for line in told.stderr.splitlines() if unit.name in line or "medplib" in line], told.stderr


def compose() -> dict[str, dict[str, object]]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


def test_compose_starts_programs_that_find_each_other() -> None:
    services = compose()
    assert set(services) == {"controller", "worker", "web"}
    options = {name: understood(shlex.split(str(service["command"]))) for name, service in services.items()}
    reached = f"http://controller:{options['controller'].port}"
    assert options["worker"].controller == options["web"].controller == reached
    assert options["worker"].worker == f"http://worker:{options['worker'].port}"
    for name, service in services.items():
        assert options[name].host == "0.0.0.0"  # inside its container
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))  # outside, this host alone
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert service["cap_drop"] == ["ALL"] and service["read_only"] is True
    keys = {name: {key for key in service["environment"] if "KEY" in key} for name, service in services.items()}
    assert keys["worker"] == {"MEDPLIB_API_KEY"} and keys["web"] == {"MEDPLIB_CLIENT_KEY"}


def instructions() -> Iterator[tuple[str, str]]:
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            yield name, rest


def test_the_image_holds_what_it_starts() -> None:
    kept = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]]
    assert set(copied) <= set(kept) and all((ROOT / path).exists() for path in copied)
    (command,) = (json.loads(rest) for name, rest in instructions() if name == "CMD")
    options = understood(command)
    assert options is not None and options.host == "0.0.0.0"
    assert {str(options.port), str(options.api_port)} <= set(dict(instructions())["EXPOSE"].split())
    assert [rest for name, rest in instructions() if name == "USER"] == ["medplib"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_of_the_documentation_are_understood(page: Path) -> None:
    found = 0
    for fence in re.findall(r"^```(?:bash)?\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in fence.replace("\\\n", " ").splitlines():
            if "model.serve." in line and "serve run" not in line:
                found += understood(shlex.split(line.removeprefix("$ "), comments=True)) is not None
    assert found >= 3, "the three commands are missing"


def test_the_script_makes_an_environment_and_serves(tmp_path: Path) -> None:
    """With a pretended environment in place of the real one."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "serve.sh", tmp_path / "scripts")
    (tmp_path / "scripts" / "environment.sh").write_text(
        'prepare_environment() { echo "made for $1"; PATH="$PWD:$PATH"; }'
    )
    (tmp_path / "medplib").write_text('#!/bin/sh\necho "medplib $*"\n')
    (tmp_path / "medplib").chmod(0o755)
    told = subprocess.run(
        ["bash", str(tmp_path / "scripts" / "serve.sh"), "--port", "7", "--model", "a b"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.splitlines() == ["made for serve", "medplib serve --port 7 --model a b"]


def option_strings() -> set[str]:
    """Every flag of every program of serving."""
    from model.serve import controller, gradio_web_server, model_worker

    commands = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    parsers = [commands.choices["serve"], commands.choices["chat"], gradio_web_server.build_parser()]
    parsers += [controller.make_parser(), model_worker.make_parser()]
    return {option for parser in parsers for option in parser._option_string_actions}


@pytest.mark.parametrize("name", ["serving.md", "security.md"])
def test_flags_of_the_documentation_exist(name: str) -> None:
    prose = re.sub(r"^```.*?^```$", "", (ROOT / "docs" / name).read_text(), flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", prose)
    flags = {flag for span in spans for flag in re.findall(r"--[a-z][\w-]*", span)} - {"--help"}
    assert flags and flags <= option_strings()


def test_documented_limits_are_the_defaults() -> None:
    rows = re.findall(r"^\| [^|]+ \| ([\d,]+) ?(MiB|million)? \| `--([a-z-]+)` \|$", SECURITY.read_text(), re.MULTILINE)
    units = {"MiB": 2**20, "million": 1_000_000, "": 1}
    documented = {
        flag.replace("-mib", "-bytes").replace("-", "_"): int(number.replace(",", "")) * units[unit]
        for number, unit, flag in rows
    }
    defaults = asdict(ServeLimits())
    assert len(documented) >= 7 and documented == {name: defaults[name] for name in documented}
