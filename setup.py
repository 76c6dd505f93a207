"""Build lnl_ext; build_support/extension.py says what is compiled, and how."""

from setuptools import setup

from build_support.extension import BuildParts, extensions

setup(license="MIT", ext_modules=extensions(), cmdclass={"build_ext": BuildParts})
