"""What runs rewritten graphs in tests of what is rewritten: nothing but Python, which takes a third less time than AOTAutograd.

AOTAutograd is behind one test of each construct (`patterns/test_entries.py`, "static"), behind checkpoints, and behind all that
is tested of the compiler's part; in `make nightly`, which sets the variable, behind these tests too.
"""

import os

INNER = os.environ.get("SLOTH_TESTS_INNER", "eager")
OPTIONS = {"sloth.inner_backend": INNER}
