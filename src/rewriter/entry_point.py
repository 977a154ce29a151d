"""What torch finds under the name "sloth": the backend; or Inductor, where this torch lacks what the rewriter needs: with a
torch that nobody tried a model trains without sloth, and is told so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from sloth.rewriter.notices import speak, warn_once

try:
    from sloth.rewriter.backend import sloth
except Exception as missing:
    WHY = f"nothing is rewritten, Inductor compiles alone: {type(missing).__name__}: {missing}"
    speak()

    def sloth(
        gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
    ) -> Any:
        """Inductor, with the options that are its own."""
        from sloth.compat.inductor import InductorOptions

        warn_once(WHY)
        theirs = {name: value for name, value in (options or {}).items() if not name.startswith("sloth.")}
        return InductorOptions(mode, theirs, None)(gm, example_inputs)
