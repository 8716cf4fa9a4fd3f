"""For tools that still call setup.py; everything is in pyproject.toml."""

import setuptools

setuptools.setup()
