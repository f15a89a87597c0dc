"""Importing this module is `install()`: for `custom_imports` of a config and `python -c`.

    custom_imports = dict(imports=["dcn_plugin.integrations.mmcv.auto"])

It says once what was replaced. A config is read after the program's own imports, so this comes in time for those that
import mm* packages later (`mmengine`'s tools, scripts that build from a config), not for `tools/train.py` of mmdet and
mmseg, which import them in their first lines: those run under `python -m dcn_plugin --accelerate mmcv`.
"""

from mmengine.logging import print_log

from . import install

print_log(install(), logger="current")
