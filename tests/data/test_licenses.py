import pytest

from mmkd.data.licenses import (
    NO_DERIVATIVES,
    NON_COMMERCIAL,
    NON_COMMERCIAL_NO_DERIVATIVES,
    NONE_DECLARED,
    OPEN,
    SHARE_ALIKE,
    UNREAD,
    USE_LIST,
    hub_id,
    is_open,
    strictest,
    terms,
)
from mmkd.encoders.zoo import TEACHERS


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        ("MIT", OPEN),
        ("Apache-2.0 (the original's; the package declares none)", OPEN),
        ("BSD (the code's)", OPEN),
        ("CC BY 4.0", OPEN),
        ("cc0-1.0", OPEN),
        ("own model", OPEN),
        ("CC BY-SA 4.0", SHARE_ALIKE),
        ("GPLv3", SHARE_ALIKE),
        ("creativeml-openrail-m", USE_LIST),
        ("cc_by_nd_4.0", NO_DERIVATIVES),
        ("CC BY-NC 4.0", NON_COMMERCIAL),
        ("CC-BY-NC-SA-4.0", NON_COMMERCIAL),
        ("research only", NON_COMMERCIAL),
        ("Non-commercial use", NON_COMMERCIAL),
        ("CC BY-NC-ND 4.0", NON_COMMERCIAL_NO_DERIVATIVES),
        ("see the hospital's agreement", UNREAD),
        ("internal", UNREAD),
        ("", NONE_DECLARED),
        ("not declared for the weights; code MIT", NONE_DECLARED),
        ("not stated", NONE_DECLARED),
    ],
)
def test_terms_by_the_words_of_the_owner(license, expected):
    assert terms(license) is expected
    assert is_open(license) == (expected is OPEN)


def test_the_strictest_of_many_is_found():
    assert strictest(["MIT", "CC BY-NC 4.0", "CC BY-SA 4.0"]) is NON_COMMERCIAL
    assert strictest([]) is OPEN
    assert strictest(row.license for row in TEACHERS.values()) is NONE_DECLARED


def test_licences_that_the_hub_has_a_word_for():
    assert [hub_id(name) for name in ("Apache-2.0", "CC BY-NC 4.0", "MIT", "CC0", "own model")] == [
        "apache-2.0",
        "cc-by-nc-4.0",
        "mit",
        "cc0-1.0",
        None,
    ]
