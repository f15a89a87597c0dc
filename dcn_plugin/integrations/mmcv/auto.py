"""Importing this module is `install()`: for `custom_imports` of a config and `python -c`.

    custom_imports = dict(imports=["dcn_plugin.integrations.mmcv.auto"])

It says once what was replaced. A config is read after the program's own imports. `tools/train.py` of mmdet and mmseg
import a part of theirs before, which needs no operators but refuses mmcv 2.2.0: there, `python -m dcn_plugin
--accelerate mmcv tools/train.py` is in time, with 2.1.0 this is, too.
"""

from mmengine.logging import print_log

from . import install

print_log(install(), logger="current")
