"""The scope `dcn_plugin` in MMEngine: one node under each of its root registries."""

import mmengine.registry as _mmengine

SCOPE = "dcn_plugin"

# One node per root registry, so that `default_scope = "dcn_plugin"` finds a registry for everything it builds.
# Hooks and optimizers live in modules of their own because importing MMEngine's takes seconds: MMEngine imports them on
# first use.
LOCATIONS = {"HOOKS": "dcn_plugin.mm.hooks", "OPTIM_WRAPPER_CONSTRUCTORS": "dcn_plugin.mm.optim"}
NODES = {
    name: _mmengine.Registry(
        root.name, parent=root, scope=SCOPE, locations=[LOCATIONS[name]] if name in LOCATIONS else []
    )
    for name, root in vars(_mmengine).items()
    if isinstance(root, _mmengine.Registry)
}
MODELS = NODES["MODELS"]
"""Layers and backbones of the scope `dcn_plugin`."""
HOOKS = NODES["HOOKS"]
"""Hooks of the scope `dcn_plugin`, for MMEngine's Runner."""
OPTIM_WRAPPER_CONSTRUCTORS = NODES["OPTIM_WRAPPER_CONSTRUCTORS"]
"""Constructors of optimizers of the scope `dcn_plugin`."""
