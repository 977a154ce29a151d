"""Make the name "sloth" known to accelerate, so that Trainer and TRL accept `torch_compile_backend="sloth"`, Accelerator
`dynamo_backend="sloth"`.

accelerate keeps the names of backends in a closed enum, `DynamoBackend`, and refuses the others before Dynamo is asked. torch
calls `register` at the end of `import torch` (entry point group "torch.backends"); it adds one member to the enum as soon as
accelerate is imported, and nothing else: no class, function or setting of anybody changes.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder

_MODULE = "accelerate.utils.dataclasses"


def register() -> None:
    """Add the name now, or when accelerate is imported. Never raises: this runs inside `import torch`."""
    if _MODULE in sys.modules:
        _add_name(sys.modules[_MODULE])
    elif not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _add_name(module) -> None:
    enum = getattr(module, "DynamoBackend", None)
    if enum is None or "SLOTH" in enum.__members__:
        return
    member = str.__new__(enum, "SLOTH")
    member._name_, member._value_ = "SLOTH", "SLOTH"
    enum._member_map_["SLOTH"] = enum._value2member_map_["SLOTH"] = member
    enum._member_names_.append("SLOTH")


class _Finder(MetaPathFinder):
    """Waits for one import, adds the name behind it, and is gone."""

    def find_spec(self, name, path=None, target=None):
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                _add_name(module)

            spec.loader.exec_module = exec_module
        return spec
