"""sloth: a torch.compile backend that rewrites Hugging Face causal LMs with operators whose backward passes are derived by hand.

    model = torch.compile(model, backend="sloth")          # no import of sloth needed
    print(sloth.explain(model, batch))                     # what is rewritten, what is not, and why

    model, tokenizer = sloth.FastLanguageModel.from_pretrained("some/model", load_in_4bit=True)   # load, adapt, train, save

Everything is imported when first used: `import sloth` alone is free.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sloth.models.chart import TrainingChart
    from sloth.models.fast import FastLanguageModel, FastModel
    from sloth.models.precision import is_bfloat16_supported
    from sloth.rewriter.explain import explain
    from sloth.rewriter.match.cost import cost
    from sloth.rewriter.match.pattern import Construct, PatternError
    from sloth.rewriter.match.registry import pattern, unregister
    from sloth.rewriter.report import Report
    from sloth.rewriter.verify.report import Verification
    from sloth.rewriter.verify.verify import verify

_HOME = {
    "FastLanguageModel": "sloth.models.fast",
    "FastModel": "sloth.models.fast",
    "TrainingChart": "sloth.models.chart",
    "is_bfloat16_supported": "sloth.models.precision",
    "explain": "sloth.rewriter.explain",
    "Report": "sloth.rewriter.report",
    "Verification": "sloth.rewriter.verify.report",
    "verify": "sloth.rewriter.verify.verify",
    "Construct": "sloth.rewriter.match.pattern",
    "PatternError": "sloth.rewriter.match.pattern",
    "cost": "sloth.rewriter.match.cost",
    "pattern": "sloth.rewriter.match.registry",
    "unregister": "sloth.rewriter.match.registry",
}
__version__ = "0.2.0"
__all__ = [
    "Construct", "FastLanguageModel", "FastModel", "PatternError", "Report", "TrainingChart", "Verification", "__version__",
    "cost", "explain", "is_bfloat16_supported", "pattern", "unregister", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'sloth' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
