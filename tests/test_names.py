"""Names that people type."""

import collections

import pytest

from ctrlrl import names


def test_loads_what_a_path_names():
    assert names.load("collections:OrderedDict", "thing") is collections.OrderedDict


@pytest.mark.parametrize("path", ["collections", "collections:Nothing", "no.such.module:X", ":X", ""])
def test_a_wrong_path_says_what_was_wanted(path):
    with pytest.raises(ValueError, match=r"cannot load the wrapper .*package\.module:Class"):
        names.load(path, "wrapper")


def test_hints_at_near_names_only():
    assert names.hint("bppo", ["ppo", "bpo", "mdpo", "zebra"]).startswith(" Did you mean ")
    assert names.hint("qqq", ["ppo", "bpo"]) == ""
