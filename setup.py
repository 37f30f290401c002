"""Where the packages lie; all else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["varlik", "varlik.*"]), "varlik.kernels"],
    package_dir={"varlik.kernels": "kernels"},
)
