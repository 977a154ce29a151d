"""Tests for patterns, from the entry alone; and the judge that they share.

check_pattern      everything that sloth's own entries are tested for, on any entry
assert_no_worse    ours, eager, exact: an error of at most 1.05 times eager's
compare            an operator beside the code it replaces: values, dtypes, strides, gradients
"""

from sloth.testing.check_pattern import check_pattern
from sloth.testing.judge import assert_no_worse, compare

__all__ = ["assert_no_worse", "check_pattern", "compare"]
