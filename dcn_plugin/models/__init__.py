"""Models for timm: every file `dcn_<family>.py` of this folder, which importing the folder registers.

A family's module begins with `dcn_` because timm files models under the last part of their module's name.
"""

from importlib import import_module
from pkgutil import iter_modules

#: The modules of the families, which `timm.list_models(module=...)` knows by the same names.
FAMILIES = sorted(module.name for module in iter_modules(__path__) if module.name.startswith("dcn_"))

for _name in FAMILIES:
    import_module(f"{__name__}.{_name}")
