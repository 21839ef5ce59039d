"""The packages; everything else about the installation is in setup.cfg.

The recipes lie beside the package, for people, and are installed into it.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["perturbdiff*"]), "perturbdiff.recipes"],
    package_dir={"perturbdiff.recipes": "recipes"},
)
