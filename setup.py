"""Put the files that ship with the package into a built wheel; the metadata stand in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("assets/medplib-mini", "configs", "data/sample")


class BuildWithShippedFiles(build_py):
    """Copy model, recipes and sample images to ``model/shipped``; an editable install finds them beside ``model``."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in SHIPPED:
                shutil.copytree(folder, Path(self.build_lib, "model", "shipped", folder), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithShippedFiles})
