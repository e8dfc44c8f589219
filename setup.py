"""Adds to the wheel the configurations, as ``fourm/cfgs``, so that they can be used without the repository."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigurations(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree("cfgs", Path(self.build_lib, "fourm", "cfgs"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigurations})
