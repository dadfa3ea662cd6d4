"""Variables and names in files of settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.errors import MedPLIBError
from model.settings import expand, nearest, read_mapping, unknown_key

VALUES = {"HOME_OF_DATA": "somewhere/data", "EMPTY": "", "ROOTED": "/srv", "SELF": "${SELF} and ${HOME_OF_DATA}"}


def expanded(text: str, *, is_path: bool = False) -> tuple[str, list[str]]:
    missing: list[str] = []
    return expand(text, VALUES, missing.append, is_path=is_path), missing


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("no variable", "no variable"),
        ("${HOME_OF_DATA}/x", "somewhere/data/x"),
        ("a${EMPTY:-b}c${NOWHERE:-}", "abc"),
        ("${EMPTY:-${NOWHERE:-${ROOTED}/x}/y}/z", "/srv/x/y/z"),
        ("${HOME_OF_DATA:-${NOWHERE}}", "somewhere/data"),  # the default is not looked at
        ("${SELF}", "${SELF} and ${HOME_OF_DATA}"),  # nor is what a variable holds
        ("$HOME ${1} ${a b} ${ROOTED-x} $} {", "$HOME ${1} ${a b} ${ROOTED-x} $} {"),
        ("${ROOTED:-open ${ROOTED}", "${ROOTED:-open /srv"),
        ("${ROOTED}" * 2000, "/srv" * 2000),
        ("${oc.env:ROOTED}/x", "/srv/x"),
        ("${oc.env:NOWHERE,${oc.env:EMPTY,a b}}/${oc.env:ROOTED,x}", "a b//srv"),
    ],
)
def test_variables_are_filled_in(text: str, wanted: str) -> None:
    assert expanded(text) == (wanted, [])


def test_unset_variables_are_reported() -> None:
    assert expanded("${NOWHERE}-${EMPTY}-${ABSENT:-${HERE}}") == ("--", ["NOWHERE", "EMPTY", "HERE"])


def test_leading_path_variable_is_relative_to_cwd() -> None:
    here = Path.cwd()
    assert expanded("${HOME_OF_DATA}/x", is_path=True)[0] == f"{here}/somewhere/data/x"
    assert expanded("${NOWHERE:-${HOME_OF_DATA}}/x", is_path=True)[0] == f"{here}/somewhere/data/x"
    assert expanded("${EMPTY:-}${HOME_OF_DATA}", is_path=True)[0] == f"{here}/somewhere/data"
    assert expanded("../${HOME_OF_DATA}", is_path=True)[0] == "../somewhere/data"
    assert expanded("${NOWHERE:-../x}", is_path=True)[0] == "../x"
    assert expanded("${ROOTED}/x", is_path=True)[0] == "/srv/x"


def test_unknown_key_names_the_nearest() -> None:
    assert nearest("treshold", ["scale", "threshold"]) == "threshold"
    assert unknown_key("a.treshold", ["a.scale", "a.threshold"]) == "a.treshold is not a key (nearest: a.threshold)"
    assert unknown_key("a", []) == "a is not a key"


@pytest.mark.parametrize(
    ("content", "told"), [(b"a: [", "cannot be read as YAML"), (b"\xff", "cannot be read"), (b"- a", "holds list")]
)
def test_what_is_no_mapping_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(MedPLIBError, match=f"recipe .*x.yaml {told}"):
        read_mapping(tmp_path / "x.yaml", "recipe")
