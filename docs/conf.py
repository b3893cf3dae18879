"What Sphinx is told. `python docs/build.py` calls it."
from configparser import ConfigParser
from pathlib import Path

_config = ConfigParser(delimiters=["="])
_config.read(Path(__file__).resolve().parents[1] / "settings.ini", encoding="utf-8")
project, release = _config["DEFAULT"]["lib_name"], _config["DEFAULT"]["version"]
copyright = _config["DEFAULT"]["copyright"]

extensions = ["myst_nb"]
nb_execution_mode = "off" # the notebooks are shown as they were run
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4 # links into a page count its headings as GitHub does
html_theme = "furo"
html_title = project
html_copy_source = False
suppress_warnings = ["misc.highlighting_failure", # lines such as %pip are no Python
                     "myst.header"]               # an output may begin with a small heading
