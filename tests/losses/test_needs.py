"""Needs: every one explained, and what each world lacks."""

from typing import get_args

from ctrlrl.losses.needs import FLAT, NEEDS, PROVIDES, SLOTS, WORLDS, Need, Slot, missing


def test_every_need_is_explained_and_provided_somewhere_or_by_the_user():
    assert set(get_args(Need)) == set(NEEDS) and set(get_args(Slot)) == set(SLOTS)
    assert set(NEEDS) - set().union(*PROVIDES.values()) == {"teacher"}
    assert set(PROVIDES) == set(WORLDS) and all(provided >= FLAT for provided in PROVIDES.values())


def test_what_is_missing_is_named_in_order():
    assert missing({"turns", "groups", "demonstrations"}, "discrete") == ["demonstrations", "turns"]
    assert missing({"turns", "groups", "demonstrations"}, "tokens") == []


def test_a_teacher_is_there_when_the_user_names_one():
    assert missing({"teacher", "gaussian"}, "continuous") == ["teacher"]
    assert missing({"teacher", "gaussian"}, "continuous", teacher=True) == []
    assert missing({"teacher", "gaussian"}, "tokens", teacher=True) == ["gaussian"]
