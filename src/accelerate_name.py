"""Make the name "sloth" known to accelerate, so that Trainer and TRL accept `torch_compile_backend="sloth"`, Accelerator
`dynamo_backend="sloth"`.

accelerate keeps the names of backends in a closed enum, `DynamoBackend`, and refuses the others before Dynamo is asked. torch
calls `register` at the end of `import torch` (entry point group "torch.backends"); it adds one member to the enum as soon as
accelerate is imported, and nothing else: no class, function or setting of anybody changes.
"""

from sloth.when_imported import when_imported


def register() -> None:
    """Add the name now, or when accelerate is imported. Never raises: this runs inside `import torch`."""
    when_imported("accelerate.utils.dataclasses", _add_name)


def _add_name(module) -> None:
    enum = getattr(module, "DynamoBackend", None)
    if enum is None or "SLOTH" in enum.__members__:
        return
    member = str.__new__(enum, "SLOTH")
    member._name_, member._value_ = "SLOTH", "SLOTH"
    enum._member_map_["SLOTH"] = enum._value2member_map_["SLOTH"] = member
    enum._member_names_.append("SLOTH")
