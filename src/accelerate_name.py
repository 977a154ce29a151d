"""Where the entry point of version 0.1.0 is: an installation of then, over sources of now, must not break `import torch`."""

from sloth.integrations.accelerate import register  # noqa: F401
