"""Parameters of a test of which only some run among the fast tests."""

import pytest


def slow_but(fast, values):
    """Returns the values, all but those of `fast` marked as slow; tuples are several arguments."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=[pytest.mark.slow] * (value not in fast),
        )
        for value in values
    ]
