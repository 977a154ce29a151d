"""Python run from the folder that holds a clone finds the clone's folder under the name `sloth`. The package is in src."""

from pathlib import Path

__path__ = [str(Path(__file__).parent / "src")]
__file__ = str(Path(__path__[0]) / "__init__.py")
exec(compile(Path(__file__).read_text(), __file__, "exec"))
