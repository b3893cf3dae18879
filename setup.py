"Reads settings.ini, the one place where name, version and requirements stand."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

class BuildWithLogs(build_py):
    "The wheel has a copy of nbs/logs, which walkthroughs read (`comam_nb.base.files.log_path`)."
    def run(self):
        super().run()
        if self.editable_mode: return
        copy = Path(self.build_lib, "comam_nb", "logs")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(here / "nbs" / "logs", copy, ignore=shutil.ignore_patterns(".*", "*.lock", "__pycache__"))

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"],
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"],
    license="Apache-2.0", keywords=cfg["keywords"],
    long_description=(here / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    packages=find_packages(include=["comam_nb", "comam_nb.*"]), include_package_data=True,
    package_data={"comam_nb": ["py.typed", "weights/**/*"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={k.removesuffix("_requirements"): v.split() for k, v in cfg.items() if k.endswith("_requirements")},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
                 "Programming Language :: Python :: 3.11"],
    cmdclass={"build_py": BuildWithLogs},
    zip_safe=False,
)
