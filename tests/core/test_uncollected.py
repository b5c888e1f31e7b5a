"""Collection of cycles is off meanwhile, and afterwards as it was."""

import gc

import pytest

from thrifty.core.uncollected import uncollected


@uncollected()
def _fails():
    with uncollected():
        assert not gc.isenabled()
    assert not gc.isenabled()
    raise KeyError


def test_it_is_off_inside_and_as_before_afterwards():
    with pytest.raises(KeyError):
        _fails()
    assert gc.isenabled()
