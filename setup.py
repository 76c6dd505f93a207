"""Build lnl_ext; see build_support/extension.py for what is compiled and with which flags."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_support.extension import extension_module  # noqa: E402

extension, build_ext = extension_module()
setup(ext_modules=[extension], cmdclass={"build_ext": build_ext})
