"""Build lnl_ext; build_support/extension.py says what is compiled, and how."""

from setuptools import Extension, setup

from build_support.extension import NAME, build_command, sources

setup(
    license="MIT",
    ext_modules=[Extension(NAME, sources("cpu"))],
    cmdclass={"build_ext": build_command()},
)
