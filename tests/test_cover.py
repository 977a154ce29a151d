"""The cover of a cross product: nothing in pairs is left out, and it is much smaller."""

from itertools import combinations, product

import pytest
from cover import cover

AXES = {"mask": list("abcd"), "model": list("klmn"), "dtype": ["fp32", "bf16"], "dynamic": [False, True]}
ROWS = [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]


@pytest.mark.parametrize("strength, most", [(1, 4), (2, 22)])
def test_all_combinations_of_so_many_values_are_held(strength, most):
    chosen = [ROWS[i] for i in cover(ROWS, strength, {})]
    for names in combinations(AXES, strength):
        found = {tuple(row[n] for n in names) for row in chosen}
        assert found == set(product(*(AXES[n] for n in names)))
    assert len(chosen) <= most < len(ROWS)


def test_what_is_alike_is_one_in_combinations_and_still_occurs():
    rows = [{"entry": entry, "how": how} for entry in ("norm", "norm of a sum", "rope") for how in range(4)]
    chosen = [rows[i] for i in cover(rows, 2, {"entry": lambda e: e.split()[0]})]
    assert {r["entry"] for r in chosen} == {"norm", "norm of a sum", "rope"} and 8 <= len(chosen) <= 9
