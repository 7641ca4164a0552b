"""FilterCriteria: the grammar, what each source shows to it, its refusals, its cost."""

import base64
import fnmatch
import ipaddress
import json
import re
import sys
from contextlib import suppress
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poller.core.filtercode import UNUSUAL, decider
from poller.core.filters import (
    INVALID_PATTERN,
    MAX_COMBINATIONS,
    MAX_DEPTH,
    MAX_PATTERN_CHARACTERS,
    Filter,
    PatternError,
    compile_filter,
)
from poller.core.model import Record, SourceKind
from tests.benchmarks.filters import stream_filters

SQS, KINESIS, DYNAMODB = SourceKind.SQS, SourceKind.KINESIS, SourceKind.DYNAMODB


def record(document):
    wire = document if isinstance(document, bytes) else json.dumps(document).encode()
    return Record("1", "", 0.0, wire)


def matches(pattern, event, kind=None):
    """The verdict, which the explanation must share."""
    text = pattern if isinstance(pattern, str) else json.dumps(pattern)
    compiled = Filter([text], kind)
    verdict = compiled.matches(record(event))
    if not isinstance(event, bytes):
        (decision,) = compiled.explain(event)
        assert decision.matched is verdict
        assert decision.leaves
        assert {leaf.matched for leaf in decision.leaves} == {verdict}
    return verdict


def rule(one, value):
    return matches({"k": [one]}, {"k": value})


def sqs(body, **more):
    return {"messageId": "m", "eventSource": "aws:sqs", "body": body, **more}


def kinesis(data, **more):
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    inner = {"partitionKey": "p", "sequenceNumber": "7", "data": base64.b64encode(raw).decode(), **more}
    return {"kinesis": inner, "eventSource": "aws:kinesis", "eventName": "aws:kinesis:record"}


def dynamodb(**image):
    return {
        "eventName": "INSERT",
        "eventSource": "aws:dynamodb",
        "dynamodb": {"ApproximateCreationDateTime": 1731681234.0, "Keys": {"id": {"S": "1"}}, "NewImage": image},
    }


# --- the grammar ----------------------------------------------------------------------------------------------------

A, B = {"a": 1}, {"b": 1}
GRAMMAR = [  # what, pattern, an event that matches, one that does not
    ("text", {"k": ["Alice"]}, {"k": "Alice"}, {"k": "alice"}),
    ("text is no number", {"k": ["1"]}, {"k": "1"}, {"k": 1}),
    ("number", {"k": [1]}, {"k": 1}, {"k": "1"}),
    ("number by value", {"k": [300]}, {"k": 3.0e2}, {"k": 300.5}),
    ("fraction by value", {"k": [300.0]}, {"k": 300}, {"k": 301}),
    ("whole numbers stay exact", {"k": [9007199254740993]}, {"k": 9007199254740993}, {"k": 9007199254740992}),
    ("true", {"k": [True]}, {"k": True}, {"k": 1}),
    ("false", {"k": [False]}, {"k": False}, {"k": 0}),
    ("one is not true", {"k": [1]}, {"k": 1.0}, {"k": True}),
    ("null", {"k": [None]}, {"k": None}, {}),
    ("null is no text", {"k": [None]}, {"k": None}, {"k": "null"}),
    ("empty text", {"k": [""]}, {"k": ""}, {"k": None}),
    ("or of values", {"k": ["a", 2, None]}, {"k": 2}, {"k": "b"}),
    ("and of fields", {"a": [1], "b": [1]}, {**A, **B}, A),
    ("nested", {"a": {"b": [1]}}, {"a": {"b": 1}}, {"a": 1}),
    ("prefix", {"k": [{"prefix": "us-"}]}, {"k": "us-east"}, {"k": "eu-us-"}),
    ("prefix of texts only", {"k": [{"prefix": ""}]}, {"k": "x"}, {"k": 1}),
    ("prefix, any case", {"k": [{"prefix": {"equals-ignore-case": "EventB"}}]}, {"k": "eVENTbridge"}, {"k": "even"}),
    ("suffix", {"k": [{"suffix": ".png"}]}, {"k": "a.png"}, {"k": "a.PNG"}),
    ("suffix, any case", {"k": [{"suffix": {"equals-ignore-case": ".png"}}]}, {"k": "a.PNG"}, {"k": "a.pn"}),
    ("any case", {"k": [{"equals-ignore-case": "alice"}]}, {"k": "ALICE"}, {"k": "ALICE "}),
    ("any case of the empty text", {"k": [{"equals-ignore-case": ""}]}, {"k": ""}, {"k": "a"}),
    ("anything-but text", {"k": [{"anything-but": "a"}]}, {"k": "b"}, {"k": "a"}),
    ("anything-but needs the field", {"k": [{"anything-but": "a"}]}, {"k": None}, {}),
    ("anything-but other types", {"k": [{"anything-but": "1"}]}, {"k": 1}, {"k": "1"}),
    ("anything-but number", {"k": [{"anything-but": 1}]}, {"k": True}, {"k": 1.0}),
    ("anything-but texts", {"k": [{"anything-but": ["a", "b"]}]}, {"k": "c"}, {"k": "b"}),
    ("anything-but numbers", {"k": [{"anything-but": [100, 200]}]}, {"k": 150}, {"k": 2e2}),
    ("anything-but prefix", {"k": [{"anything-but": {"prefix": "in"}}]}, {"k": 5}, {"k": "init"}),
    ("anything-but prefixes", {"k": [{"anything-but": {"prefix": ["a", "b"]}}]}, {"k": "c"}, {"k": "bc"}),
    ("anything-but suffix", {"k": [{"anything-but": {"suffix": ".txt"}}]}, {"k": ".txt."}, {"k": "a.txt"}),
    ("anything-but suffixes", {"k": [{"anything-but": {"suffix": ["a", "b"]}}]}, {"k": "ac"}, {"k": "cb"}),
    ("anything-but any case", {"k": [{"anything-but": {"equals-ignore-case": "a"}}]}, {"k": "b"}, {"k": "A"}),
    ("anything-but any cases", {"k": [{"anything-but": {"equals-ignore-case": ["a", "b"]}}]}, {"k": "c"}, {"k": "B"}),
    ("anything-but wildcard", {"k": [{"anything-but": {"wildcard": "*/lib/*"}}]}, {"k": "/li/"}, {"k": "a/lib/b"}),
    ("anything-but wildcards", {"k": [{"anything-but": {"wildcard": ["a*", "*b"]}}]}, {"k": "ba"}, {"k": "cb"}),
    ("numeric =", {"k": [{"numeric": ["=", 3.018e2]}]}, {"k": 301.8}, {"k": 301.9}),
    ("numeric <", {"k": [{"numeric": ["<", 10]}]}, {"k": 9.99}, {"k": 10}),
    ("numeric <=", {"k": [{"numeric": ["<=", 10]}]}, {"k": 10}, {"k": 10.01}),
    ("numeric >", {"k": [{"numeric": [">", 100]}]}, {"k": 101}, {"k": 100}),
    ("numeric >=", {"k": [{"numeric": [">=", -1]}]}, {"k": -1}, {"k": -2}),
    ("numeric, open below", {"k": [{"numeric": [">", 10, "<=", 20]}]}, {"k": 20}, {"k": 10}),
    ("numeric, open above", {"k": [{"numeric": [">=", 100, "<", 200]}]}, {"k": 100}, {"k": 200}),
    ("numeric, no text", {"k": [{"numeric": [">", 0]}]}, {"k": 5}, {"k": "5"}),
    ("numeric, no boolean", {"k": [{"numeric": ["=", 1]}]}, {"k": 1}, {"k": True}),
    ("numeric, not above five thousand million", {"k": [{"numeric": [">", 0]}]}, {"k": 5e9}, {"k": 5_000_000_001}),
    ("numeric, not below minus that", {"k": [{"numeric": ["<", 0]}]}, {"k": -5e9}, {"k": -5_000_000_001}),
    ("exists", {"k": [{"exists": True}]}, {"k": None}, {}),
    ("exists, leaves only", {"k": [{"exists": True}]}, {"k": 0}, {"k": {"a": 1}}),
    ("exists, not an empty array", {"k": [{"exists": True}]}, {"k": [0]}, {"k": []}),
    ("exists false", {"k": [{"exists": False}]}, {}, {"k": None}),
    ("exists false, of an object", {"k": [{"exists": False}]}, {"k": {"a": 1}}, {"k": 1}),
    ("exists false, parent absent", {"a": {"b": [{"exists": False}]}}, {}, {"a": {"b": 0}}),
    ("exists false, or a value", {"k": [{"exists": False}, "x"]}, {"k": "x"}, {"k": "y"}),
    ("exists false, or anything but", {"k": [{"anything-but": "x"}, {"exists": False}]}, {}, {"k": "x"}),
    ("wildcard", {"k": [{"wildcard": "dir/*.png"}]}, {"k": "dir/a/b.png"}, {"k": "dirs/a.png"}),
    ("wildcard, parts in order", {"k": [{"wildcard": "*a*b*"}]}, {"k": "xaxb"}, {"k": "ba"}),
    ("wildcard, parts do not overlap", {"k": [{"wildcard": "ab*ba"}]}, {"k": "abba"}, {"k": "aba"}),
    ("wildcard, middle not in the end", {"k": [{"wildcard": "*ab*b"}]}, {"k": "abb"}, {"k": "ab"}),
    ("wildcard, empty", {"k": [{"wildcard": ""}]}, {"k": ""}, {"k": "a"}),
    ("wildcard, all", {"k": [{"wildcard": "*"}]}, {"k": ""}, {"k": 1}),
    ("wildcard, escaped asterisk", {"k": [{"wildcard": "a\\*b*"}]}, {"k": "a*bc"}, {"k": "axbc"}),
    ("wildcard, escaped backslash", {"k": [{"wildcard": "a\\\\*"}]}, {"k": "a\\x"}, {"k": "a*"}),
    ("cidr 4", {"k": [{"cidr": "10.0.0.0/24"}]}, {"k": "10.0.0.255"}, {"k": "10.0.1.0"}),
    ("cidr 6", {"k": [{"cidr": "2001:db8::/32"}]}, {"k": "2001:DB8:0::1"}, {"k": "2001:db9::1"}),
    ("cidr, addresses only", {"k": [{"cidr": "0.0.0.0/0"}]}, {"k": "1.2.3.4"}, {"k": "1.2.3"}),
    ("cidr, no zones", {"k": [{"cidr": "fe80::/10"}]}, {"k": "fe80::1"}, {"k": "fe80::1%eth0"}),
    ("cidr, families apart", {"k": [{"cidr": "::/0"}]}, {"k": "::1"}, {"k": "1.2.3.4"}),
    ("$or", {"$or": [{"a": [1]}, {"b": [1]}]}, B, {"a": 2, "b": 2}),
    ("$or and fields", {"c": [1], "$or": [{"a": [1]}, {"b": [1]}]}, {"c": 1, "a": 1}, {"c": 2, "a": 1}),
    ("$or below", {"x": {"$or": [{"a": [1]}, {"b": [1]}]}}, {"x": B}, B),
    ("$or in $or", {"$or": [{"a": [1], "$or": [{"c": [1]}, {"d": [1]}]}, {"b": [1]}]}, {"a": 1, "d": 1}, A),
    ("$or twice", {"$or": [{"a": [1]}, {"b": [1]}], "x": {"$or": [{"a": [1]}, {"b": [1]}]}}, {**A, "x": B}, {"x": B}),
    ("$or about a field that is asked for too", {"a": [1, 2], "$or": [{"a": [2]}, {"b": [1]}]}, {"a": 2}, {"a": 1}),
    ("$or with exists false", {"$or": [{"a": [{"exists": False}]}, {"b": [1]}]}, {}, {"a": 1}),
    ("$or otherwise spelled is a field", {"$OR": {"a": [1]}}, {"$OR": A}, A),
    ("exists false, not of an array that holds a value", {"k": [{"exists": False}]}, {"k": [[]]}, {"k": [1]}),
    ("exists false, no object in the array", {"k": {"b": [{"exists": False}]}}, {"k": [5]}, {"k": [5, {"b": 1}]}),
    ("no object in the array", {"k": {"b": [1]}}, {"k": [5, {"b": 1}]}, {"k": [5]}),
    ("$or of a parent that is absent", {"x": {"$or": [{"a": [{"exists": False}]}, {"b": [1]}]}}, {}, {"x": {"a": 1}}),
    ("$or that singles out an element", {"k": {"$or": [{"a": [1]}, {"b": [1]}], "c": [{"exists": False}]}}, {"k": [{"a": 1}, {"c": 1}]}, {"k": [{"c": 1}]}),
    ("array in the event", {"k": ["a", "b"]}, {"k": ["x", "b"]}, {"k": ["x", "y"]}),
    ("array in an array", {"k": [3]}, {"k": [1, [2, [3]]]}, {"k": [1, [2]]}),
    ("anything-but of an array", {"k": [{"anything-but": "a"}]}, {"k": ["a", "b"]}, {"k": ["a"]}),
    ("an empty array holds no null", {"k": [None]}, {"k": [None]}, {"k": []}),
    ("array of objects", {"k": {"a": [2]}}, {"k": [{"a": 1}, {"a": 2}]}, {"k": [{"a": 1}]}),
    ("objects in arrays of arrays", {"k": {"a": [2]}}, {"k": [[{"a": 1}], [[{"a": 2}]]]}, {"k": [[2]]}),
    ("the same element", {"k": {"a": [1], "b": [2]}}, {"k": [{"a": 1, "b": 2}]}, {"k": [{"a": 1}, {"b": 2}]}),
    ("the same element, nested", {"k": {"a": {"x": [1]}, "b": [2]}}, {"k": [{"a": {"x": 1}, "b": 2}]}, {"k": [{"a": {"x": 1}}, {"a": {"x": 2}, "b": 2}]}),
    ("exists false in the same element", {"k": {"a": [1], "b": [{"exists": False}]}}, {"k": [{"a": 1}, {"b": 2}]}, {"k": [{"a": 1, "b": 2}, {}]}),
    ("exists false alone, of no element", {"k": {"b": [{"exists": False}]}}, {"k": [{"a": 1}, 5]}, {"k": [{"b": 2}, {"a": 1}]}),
    ("$or in the same element", {"k": {"a": [1], "$or": [{"b": [1]}, {"c": [1]}]}}, {"k": [{"a": 1, "c": 1}]}, {"k": [{"a": 1}, {"c": 1}]}),
    ("$or that reaches into it", {"k": {"a": [1]}, "$or": [{"k": {"b": [1]}}, {"c": [1]}]}, {"k": [{"a": 1, "b": 1}]}, {"k": [{"a": 1}, {"b": 1}]}),
    ("two $or that reach into it", {"$or": [{"k": {"a": [1]}}, {"x": [1]}], "k": {"$or": [{"b": [1]}, {"c": [1]}]}}, {"k": [{"a": 1, "c": 1}]}, {"k": [{"a": 1}, {"c": 1}]}),
    ("a value and objects", {"k": [1], "k.a": [2]}, {"k": [1, {"a": 2}]}, {"k": [{"a": 2}]}),
    ("dots in the pattern", {"a.b": [1]}, {"a": {"b": 1}}, {"a": {"b.c": 1}}),
    ("dots in the event", {"a": {"b": {"c": [1]}}}, {"a.b": {"c": 1}}, {"a.b": {"d": 1}}),
    ("dots in the event, deeper", {"a": {"b": {"c": [1]}}}, {"a": {"b.c": 1}}, {"a": {"b.d": 1}}),
    ("dots in both", {"a.b": [1], "a.c": [2]}, {"a.b": 1, "a": {"c": 2}}, {"a.b": 1, "a": {"b": 2}}),
    ("dots beside an array", {"a": {"b": [1], "c": [2]}}, {"a": [5], "a.b": 1, "a.c": 2}, {"a": [5], "a.b": 1}),
    ("dots and the same field twice", {"a": {"b": [2]}}, {"a": {"b": 1}, "a.b": 2}, {"a": {"b": 1}, "a.b": 3}),
    ("dots and the same field twice, the other", {"a": {"b": [1]}}, {"a": {"b": 1}, "a.b": 2}, {"a": {"b": 3}, "a.b": 2}),
    ("dots beside an array that matches", {"a": {"b": [1]}}, {"a": [{"b": 1}], "a.b": 2}, {"a": [{"b": 3}], "a.b": 2}),
    ("dots in the event, into $or", {"x": {"$or": [{"a": {"b": [1]}}, {"c": [1]}]}}, {"x.a": {"b": 1}}, {"x.a": {"c": 1}}),
    ("dots in an element", {"k": {"a.b": [1]}}, {"k": [{"a.b": 1}]}, {"k": [{"a": 1}]}),
    ("names are case-sensitive", {"k": [1]}, {"k": 1}, {"K": 1}),
    ("an empty name", {"": {"": [1]}}, {"": {"": 1}}, {"": 1}),
    ("any character", {"ключ": [{"prefix": 'π\u0000"\\'}]}, {"ключ": 'π\u0000"\\x'}, {"ключ": "p"}),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "good", "bad"), [row[1:] for row in GRAMMAR], ids=[row[0] for row in GRAMMAR])
def test_the_grammar(pattern, good, bad):
    """Every operator and form: one event that matches and one that does not."""
    assert matches(pattern, good)
    assert not matches(pattern, bad)


REFUSED = [  # pattern, the place, a part of the reason
    ('"x"', "", "is a text"),
    ("null", "", "is null"),
    ("5", "", "is a number"),
    ("[]", "", "is a list"),
    ("", "character 1", "not JSON"),
    ('{"a": [1}', "character 9", "not JSON"),
    ('{"a":\n [1}', "line 2, character 4", "not JSON"),
    ("{'a': [1]}", "character 2", "not JSON"),
    ('{"a": [NaN]}', "", "NaN is not JSON"),
    ('{"a": [1e999]}', "a[0]", "too large"),
    ("{}", "", "empty object"),
    ('{"a": {}}', "a", "empty object"),
    ('{"a": []}', "a", "empty"),
    ('{"a": "x"}', "a", "is a text"),
    ('{"a": 5}', "a", "is a number"),
    ('{"a": null}', "a", "is null"),
    ('{"a": {"b": true}}', "a.b", "is true or false"),
    ('{"a b": {"c.d": 5}}', '"a b"."c.d"', "is a number"),
    ('{"a": [[1]]}', "a[0]", "a list stands in a list"),
    ('{"a": [{}]}', "a[0]", "is empty"),
    ('{"a": ["x", {"prefix": "a", "suffix": "b"}]}', "a[1]", "has 2 keys"),
    ('{"a": [1], "b": [1], "a": [2]}', "a", "stands twice"),
    ('{"d": {"x": [1]}, "d": {"y": [1]}}', "d", "stands twice"),
    ('{"a": [{"prefix": "x", "prefix": "y"}]}', "a[0]", "has 2 keys"),
    ('{"a": {"b": [1]}, "a.b": [1]}', '"a.b"', "the field a.b is given twice"),
    ('{"a": [{"Prefix": "x"}]}', "a[0]", 'did you mean "prefix"?'),
    ('{"a": [{"equals_ignore_case": "x"}]}', "a[0]", 'did you mean "equals-ignore-case"?'),
    ('{"a": [{"regex": "x"}]}', "a[0]", "is no operator"),
    ('{"a": [{"$or": [{"b": [1]}, {"c": [1]}]}]}', "a[0]", "is no operator"),
    ('{"a": [{"prefix": 5}]}', "a[0].prefix", "is a number"),
    ('{"a": [{"prefix": null}]}', "a[0].prefix", "is null"),
    ('{"a": [{"prefix": ["x"]}]}', "a[0].prefix", "is a list"),
    ('{"a": [{"prefix": {"suffix": "x"}}]}', "a[0].prefix", "is no operator here"),
    ('{"a": [{"prefix": {"equals-ignore-case": ["x"]}}]}', "a[0].prefix.equals-ignore-case", "is a list"),
    ('{"a": [{"suffix": true}]}', "a[0].suffix", "is true or false"),
    ('{"a": [{"suffix": ["x"]}]}', "a[0].suffix", "is a list"),
    ('{"a": [{"suffix": {"prefix": "x"}}]}', "a[0].suffix", "is no operator here"),
    ('{"a": [{"suffix": {"equals-ignore-case": 5}}]}', "a[0].suffix.equals-ignore-case", "is a number"),
    ('{"a": [{"equals-ignore-case": ["x"]}]}', "a[0].equals-ignore-case", "is a list"),
    ('{"a": [{"equals-ignore-case": 5}]}', "a[0].equals-ignore-case", "is a number"),
    ('{"a": [{"anything-but": null}]}', "a[0].anything-but", "null"),
    ('{"a": [{"anything-but": true}]}', "a[0].anything-but", "true or false"),
    ('{"a": [{"anything-but": []}]}', "a[0].anything-but", "empty"),
    ('{"a": [{"anything-but": ["x", null]}]}', "a[0].anything-but", "null"),
    ('{"a": [{"anything-but": ["x", 5]}]}', "a[0].anything-but", "mixes"),
    ('{"a": [{"anything-but": [["x"]]}]}', "a[0].anything-but", "a list"),
    ('{"a": [{"anything-but": {}}]}', "a[0].anything-but", "is empty"),
    ('{"a": [{"anything-but": {"numeric": ["=", 1]}}]}', "a[0].anything-but", "is no operator here"),
    ('{"a": [{"anything-but": {"prefix": ""}}]}', "a[0].anything-but.prefix", "is empty"),
    ('{"a": [{"anything-but": {"prefix": ["x", ""]}}]}', "a[0].anything-but.prefix", "is empty"),
    ('{"a": [{"anything-but": {"prefix": []}}]}', "a[0].anything-but.prefix", "is empty"),
    ('{"a": [{"anything-but": {"prefix": 5}}]}', "a[0].anything-but.prefix", "is a number"),
    ('{"a": [{"anything-but": {"prefix": {"equals-ignore-case": "x"}}}]}', "a[0].anything-but.prefix", "an object"),
    ('{"a": [{"anything-but": {"suffix": ""}}]}', "a[0].anything-but.suffix", "is empty"),
    ('{"a": [{"anything-but": {"suffix": [null]}}]}', "a[0].anything-but.suffix", "null"),
    ('{"a": [{"anything-but": {"suffix": {"equals-ignore-case": "x"}}}]}', "a[0].anything-but.suffix", "an object"),
    ('{"a": [{"anything-but": {"equals-ignore-case": 5}}]}', "a[0].anything-but.equals-ignore-case", "a number"),
    ('{"a": [{"anything-but": {"equals-ignore-case": ["x", 5]}}]}', "a[0].anything-but.equals-ignore-case", "a number"),
    ('{"a": [{"anything-but": {"wildcard": 5}}]}', "a[0].anything-but.wildcard", "a number"),
    ('{"a": [{"anything-but": {"wildcard": ["a**"]}}]}', "a[0].anything-but.wildcard", "two asterisks"),
    ('{"a": [{"wildcard": "a**b"}]}', "a[0].wildcard", "at character 2"),
    ('{"a": [{"wildcard": "a\\\\b"}]}', "a[0].wildcard", "a backslash"),
    ('{"a": [{"wildcard": "a\\\\"}]}', "a[0].wildcard", "a backslash"),
    ('{"a": [{"wildcard": ["a*"]}]}', "a[0].wildcard", "is a list"),
    ('{"a": [{"cidr": "10.0.0.0"}]}', "a[0].cidr", "no address range"),
    ('{"a": [{"cidr": "10.0.0.0/33"}]}', "a[0].cidr", "no address range"),
    ('{"a": [{"cidr": "10.0.0/24"}]}', "a[0].cidr", "no address range"),
    ('{"a": [{"cidr": "10.0.0.0/255.0.0.0"}]}', "a[0].cidr", "no address range"),
    ('{"a": [{"cidr": "::1/129"}]}', "a[0].cidr", "no address range"),
    ('{"a": [{"cidr": "fe80::%x/64"}]}', "a[0].cidr", "no address range"),
    ('{"a": [{"cidr": "bad-/64filter"}]}', "a[0].cidr", "no address range"),
    ('{"a": [{"cidr": 5}]}', "a[0].cidr", "is a number"),
    ('{"a": [{"numeric": 5}]}', "a[0].numeric", "give a list"),
    ('{"a": [{"numeric": []}]}', "a[0].numeric", "give a list"),
    ('{"a": [{"numeric": ["="]}]}', "a[0].numeric", "give a list"),
    ('{"a": [{"numeric": ["=", 1, "="]}]}', "a[0].numeric", "give a list"),
    ('{"a": [{"numeric": ["==", 1]}]}', "a[0].numeric[0]", "give one of"),
    ('{"a": [{"numeric": [1, "="]}]}', "a[0].numeric[0]", "give one of"),
    ('{"a": [{"numeric": [["="], 1]}]}', "a[0].numeric[0]", "give one of"),
    ('{"a": [{"numeric": ["=", "1"]}]}', "a[0].numeric[1]", "a number from -5e9 to 5e9"),
    ('{"a": [{"numeric": ["=", true]}]}', "a[0].numeric[1]", "a number from -5e9 to 5e9"),
    ('{"a": [{"numeric": ["=", 5000000001]}]}', "a[0].numeric[1]", "a number from -5e9 to 5e9"),
    ('{"a": [{"numeric": [">", 0, "<", -5.1e9]}]}', "a[0].numeric[3]", "a number from -5e9 to 5e9"),
    ('{"a": [{"numeric": [">", 0, ">", 1]}]}', "a[0].numeric", "lower bound first"),
    ('{"a": [{"numeric": ["<", 9, ">", 1]}]}', "a[0].numeric", "lower bound first"),
    ('{"a": [{"numeric": ["=", 1, "<", 2]}]}', "a[0].numeric", "lower bound first"),
    ('{"a": [{"numeric": [">=", 5, "<=", 5]}]}', "a[0].numeric", "not below"),
    ('{"a": [{"exists": "true"}]}', "a[0].exists", "give true or false"),
    ('{"a": [{"exists": 1}]}', "a[0].exists", "give true or false"),
    ('{"$or": {"a": [1]}}', "$or", "two objects"),
    ('{"$or": []}', "$or", "two objects"),
    ('{"$or": [{"a": [1]}]}', "$or", "two objects"),
    ('{"x": {"$or": [{"a": [1]}, "b"]}}', "x.$or[1]", "is a text"),
    ('{"$or": [{"a": [1]}, {}]}', "$or[1]", "empty object"),
    ('{"$or": [{"a": [1]}, {"b": []}]}', "$or[1].b", "empty"),
    ('{"$or": [{"a": [1]}, {"prefix": ["x"]}]}', "$or[1].prefix", "cannot be the name of a field"),
    ('{"$or": [{"a": [1]}, {"b": {">": [5]}}]}', '$or[1].b.">"', "cannot be the name of a field"),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "place", "reason"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_is_refused_and_where(pattern, place, reason):
    """AWS's text for every bad pattern; for people the place in the pattern and the reason."""
    with pytest.raises(PatternError) as refused:
        Filter([pattern])
    assert refused.value.place == place
    assert reason in refused.value.reason
    assert not refused.value.reason.endswith(".")


def test_aws_says_the_same_to_every_bad_pattern():
    """semantics 1.4, word for word."""
    assert INVALID_PATTERN == "Invalid filter pattern definition."


def test_limits_of_a_pattern():
    """Length, depth and combinations of $or end at a number, and with a sentence."""
    assert Filter([json.dumps({"a": ["x" * (MAX_PATTERN_CHARACTERS - 11)]})])
    for text in (
        json.dumps({"a": ["x" * (MAX_PATTERN_CHARACTERS - 10)]}),
        '{"a":' * (MAX_DEPTH + 1) + "[1]" + "}" * (MAX_DEPTH + 1),
        json.dumps({"a" + ".a" * MAX_DEPTH: [1]}),
        "[" * MAX_PATTERN_CHARACTERS,
        '{"a":' * 800,
    ):
        with pytest.raises(PatternError):
            Filter([text])
    fork = {"$or": [{"x": [1]}, {"y": [1]}]}
    assert 2**9 <= MAX_COMBINATIONS < 2**10
    assert matches({f"k{n}": fork for n in range(9)}, {f"k{n}": {"y": 1} for n in range(9)})
    with pytest.raises(PatternError) as refused:
        Filter([json.dumps({f"k{n}": fork for n in range(10)})])
    assert "1024 combinations" in refused.value.reason


def test_the_deepest_pattern_is_matched():
    """At the limit of depth nothing overflows, with arrays and $or on the way down."""
    pattern = {"a": [1]}
    event = {"a": 1}
    for _ in range(MAX_DEPTH // 2 - 1):
        pattern = {"$or": [{"b": [1]}, {"a": pattern}]}
        event = {"a": [[event]]}
    assert matches(pattern, event)


# --- where the data is ----------------------------------------------------------------------------------------------

SQS_BODIES = [  # semantics 9.4: body, pattern, delivered
    ("plain", {"body": ["plain"]}, True),
    ("plain", {"body": [{"prefix": "pl"}]}, True),
    ("plain", {"body": ["other"]}, False),
    ("plain", {"eventSource": ["aws:sqs"]}, True),
    ("plain", {"body": {"a": [1]}}, False),
    ("plain", {"body": {"a": [{"exists": False}]}}, False),
    ('{"a": 1}', {"body": ['{"a": 1}']}, False),
    ('{"a": 1}', {"body": [{"prefix": "{"}]}, False),
    ('{"a": 1}', {"body": [{"exists": False}]}, False),
    ('{"a": 1}', {"body": [{"exists": True}]}, False),
    ('{"a": 1}', {"eventSource": ["aws:sqs"]}, True),
    ('{"a": 1}', {"eventSource": ["other"]}, False),
    ('{"a": 1}', {"body": {"a": [1]}}, True),
    ('{"a": 1}', {"body": {"a": [2]}}, False),
    (' \n{"a": 1} ', {"body": {"a": [1]}}, True),
    ('[{"a": 1}, {"a": 2}]', {"body": {"a": [2]}}, True),
    ('["plain"]', {"body": ["plain"]}, False),
    ("5", {"body": ["5"]}, True),
    ("5", {"body": [5]}, False),
    ('"quoted"', {"body": ['"quoted"']}, True),
    ("null", {"body": [None]}, False),
    ('{"a": 1', {"body": {"a": [1]}}, False),
    ('{"a": 1', {"body": ['{"a": 1']}, True),
    ('{"a": NaN}', {"body": {"a": [{"exists": True}]}}, False),
    ('{"a": "\\ud800", "b": 1}', {"body": {"b": [1]}}, True),
    ('{"a": 1e999, "b": 1}', {"body": {"b": [1]}}, True),
    ("", {"body": [""]}, True),
]


@pytest.mark.parametrize(("body", "pattern", "delivered"), SQS_BODIES)
def test_sqs_bodies(body, pattern, delivered):
    """semantics 9.4: text against text, JSON against JSON, all else is dropped; without `body` only metadata counts."""
    assert matches(pattern, sqs(body), SQS) is delivered


def test_sqs_matches_the_whole_record():
    """interface.md: attributes too, beside the body, and under $or."""
    message = sqs('{"a": 1}', attributes={"SenderId": "x"}, messageAttributes={"n": {"stringValue": "6"}})
    assert matches({"attributes": {"SenderId": ["x"]}, "body": {"a": [1]}}, message, SQS)
    assert matches({"messageAttributes": {"n": {"stringValue": ["6"]}}}, message, SQS)
    assert matches({"$or": [{"body": ["x"]}, {"body": {"a": [1]}}]}, message, SQS)
    assert matches({"body.a": [1]}, message, SQS)
    assert not matches({"$or": [{"body": ["x"]}, {"body": {"a": [2]}}]}, message, SQS)


def test_kinesis_matches_members_at_top_level_and_the_decoded_data():
    """interface.md: the members of `kinesis` and of the envelope side by side; `kinesis.data` stays base64."""
    one = kinesis({"a": 1})
    assert matches({"data": {"a": [1]}, "partitionKey": ["p"], "eventName": ["aws:kinesis:record"]}, one, KINESIS)
    assert matches({"kinesis": {"partitionKey": ["p"], "data": [base64.b64encode(b'{"a": 1}').decode()]}}, one, KINESIS)
    assert not matches({"data": {"a": [2]}}, one, KINESIS)
    assert not matches({"partitionKey": ["q"]}, one, KINESIS)
    assert matches({"data": {"a": [1]}}, kinesis([{"a": 1}]), KINESIS)


@pytest.mark.parametrize("data", [b"plain", b"", b"\xff\xfe", b'{"a": 1', b"5", b'"a"', b"null"])
def test_kinesis_data_that_is_no_json_object_is_skipped(data):
    """semantics 9.4: dropped by any pattern about `data`, delivered by one about metadata alone."""
    assert not matches({"data": {"a": [{"exists": False}]}}, kinesis(data), KINESIS)
    assert not matches({"data": {"a": [1]}}, kinesis(data), KINESIS)
    assert matches({"partitionKey": ["p"]}, kinesis(data), KINESIS)


@pytest.mark.parametrize(
    ("kind", "pattern", "place"),
    [
        (KINESIS, {"data": ["text"]}, "data"),
        (KINESIS, {"$or": [{"data": [{"prefix": "t"}]}, {"partitionKey": ["p"]}]}, "data"),
        (DYNAMODB, {"dynamodb": [{"exists": True}]}, "dynamodb"),
    ],
)
def test_stream_data_is_never_matched_as_text(kind, pattern, place):
    """semantics 9.4: an error at create and update; queues may."""
    with pytest.raises(PatternError) as refused:
        Filter([json.dumps(pattern)], kind)
    assert refused.value.place == place
    assert Filter([json.dumps(pattern)], SQS)


@pytest.mark.parametrize(
    ("pattern", "image", "delivered"),
    [
        ({"k": {"S": ["v"]}}, {"k": {"S": "v"}}, True),
        ({"k": ["v"]}, {"k": {"S": "v"}}, False),
        ({"k": {"N": [{"numeric": [">", 100]}]}}, {"k": {"N": "101"}}, False),
        ({"k": {"N": [{"numeric": [">", 100]}, {"anything-but": "101"}]}}, {"k": {"N": "42"}}, True),
        ({"k": {"N": [{"numeric": [">", 100]}, {"anything-but": "101"}]}}, {"k": {"N": "101"}}, False),
        ({"k": [{"exists": True}]}, {"k": {"S": "v"}}, False),
        ({"k": {"S": [{"exists": True}]}}, {"k": {"S": "v"}}, True),
        ({"k": [{"exists": False}]}, {"k": {"S": "v"}}, True),
        ({"k": {"S": [{"exists": False}]}}, {"k": {"N": "1"}}, True),
        ({"k": {"S": [{"exists": False}, {"anything-but": ["roses"]}]}}, {"k": {"S": "roses"}}, False),
        ({"k": {"L": {"S": [{"exists": True}]}}}, {"k": {"L": [{"N": "1"}, {"S": "v"}]}}, True),
        ({"k": {"SS": ["b"]}}, {"k": {"SS": ["a", "b"]}}, True),
        ({"k": {"BOOL": [True]}}, {"k": {"BOOL": True}}, True),
        ({"k": {"NULL": [True]}}, {"k": {"NULL": True}}, True),
        ({"k": {"M": {"x": {"S": ["v"]}}}}, {"k": {"M": {"x": {"S": "v"}}}}, True),
    ],
)
def test_dynamodb_images(pattern, image, delivered):
    """semantics 9.5, the recorded cases first: types are part of the path, numbers are text, exists sees leaves only."""
    assert matches({"dynamodb": {"NewImage": pattern}}, dynamodb(**image), DYNAMODB) is delivered


def test_dynamodb_matches_the_whole_record():
    """semantics 9.3 and 9.5: `eventName` works, and the creation time is a number."""
    pattern = {"eventName": ["INSERT"], "dynamodb": {"ApproximateCreationDateTime": [{"numeric": [">", 0]}]}}
    assert matches(pattern, dynamodb(), DYNAMODB)
    assert not matches({"eventName": ["REMOVE"]}, dynamodb(), DYNAMODB)


def test_filters_are_alternatives_and_none_is_no_filter():
    """Any filter passes a record; without patterns there is nothing to run."""
    texts = [json.dumps({"body": {"a": [number]}}) for number in range(10)]
    compiled = compile_filter(texts, SQS)
    assert compiled is not None
    assert compiled.matches(record(sqs('{"a": 9}')))
    assert not compiled.matches(record(sqs('{"a": 10}')))
    assert compile_filter([], SQS) is None


@pytest.mark.parametrize("wire", [b"", b"5", b"[]", b"null", b'{"body": 5}', b'{"body": null}', b'{"kinesis": 5}',
                                  b'{"kinesis": {"data": 5}}', b'{"kinesis": {"data": "\xc3\xa9"}}', b'{"kinesis": {"data": "a"}}',
                                  b"\xff", b'{"body": "{' + b"\\u0000" + b'"}'])  # fmt: skip
@pytest.mark.parametrize("kind", [SQS, KINESIS, DYNAMODB])
def test_a_malformed_record_matches_nothing(wire, kind):
    """Never an error, whatever the bytes are."""
    pattern = {"body": {"a": [1]}} if kind is SQS else {"data": {"a": [1]}}
    assert not matches(pattern, wire, kind)


@pytest.mark.parametrize("levels", [100, 900, 10_000, 200_000])
def test_deep_events_are_decided(levels):
    """A payload too deep to be read counts as no JSON; arrays in arrays are walked without recursion."""
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        body = opening * levels + "1" + closing * levels
        assert not matches({"body": {"b": [1]}}, sqs(body), SQS)
        assert matches({"eventSource": ["aws:sqs"]}, sqs(body), SQS)
        assert not matches({"data": {"b": [1]}}, kinesis(body.encode()), KINESIS)
    event = {"k": 1}
    for _ in range(levels):
        event = [event]
    (decision,) = Filter(['{"e": {"k": [1]}}']).explain({"e": event})
    assert decision.matched


# --- explanations ---------------------------------------------------------------------------------------------------


def leaves(pattern, event, kind=None):
    (decision,) = Filter([json.dumps(pattern)], kind).explain(event)
    return [tuple(leaf) for leaf in decision.leaves]


def test_a_match_shows_every_leaf_that_took_part():
    """Path, the rule that matched, the value; of a $or only the alternative that matched."""
    pattern = {"a": {"b": ["x", {"prefix": "op"}]}, "c.d": [{"exists": False}], "$or": [{"e": [1]}, {"f": [2]}]}
    assert leaves(pattern, {"a": [{"b": ["no", "open"]}], "f": 2}) == [
        ("a.b", '{"prefix": "op"}', '"open"', True),
        ("c.d", '{"exists": false}', "absent", True),
        ("f", "2", "2", True),
    ]


def test_no_match_shows_the_leaves_that_prevented_it():
    """The first that failed, with all its rules; under $or one of each alternative."""
    assert leaves({"a": [1], "b": ["x", None], "c": [3]}, {"a": 1, "b": "y"}) == [("b", '["x", null]', '"y"', False)]
    assert leaves({"a": [1]}, {}) == [("a", "[1]", "absent", False)]
    assert leaves({"a": [1]}, {"a": {"b": 1}}) == [("a", "[1]", "absent (an object, not a value)", False)]
    assert leaves({"a": [1]}, {"a": []}) == [("a", "[1]", "absent (an empty array)", False)]
    assert leaves({"a": [1]}, {"a": [2, 3]}) == [("a", "[1]", "[2, 3]", False)]
    assert leaves({"$or": [{"a": [1]}, {"b": [2]}]}, {"b": 3}) == [
        ("a", "[1]", "absent", False),
        ("b", "[2]", "3", False),
    ]
    assert leaves({"k": {"a": [1], "b": [2]}}, {"k": [{"a": 5}, {"a": 1, "b": 3}]}) == [("k.b", "[2]", "3", False)]


def test_a_payload_of_the_other_kind_is_named():
    """The two surprises of 9.4 are said: text against JSON and JSON against text."""
    assert leaves({"body": {"a": {"b": [1]}}}, sqs("text"), SQS) == [
        ("body.a.b", "[1]", "absent (the payload is not JSON)", False)
    ]
    assert leaves({"body": {"$or": [{"a": [1]}, {"b": [1]}]}}, sqs("text"), SQS) == [
        ("body.a", "[1]", "absent (the payload is not JSON)", False),
        ("body.b", "[1]", "absent (the payload is not JSON)", False),
    ]
    assert leaves({"body": ["x"]}, sqs("{}"), SQS) == [("body", '["x"]', "JSON (not plain text)", False)]


# --- properties -----------------------------------------------------------------------------------------------------

SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 1.0, 1e300]) | st.text("ab*\\A", max_size=4)
)
NAMES = st.sampled_from(["a", "b", "c", "a.b", "b.c", "a.b.c", "$or", ""])
EVENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=25
)
OBJECTS = st.dictionaries(NAMES, EVENTS, max_size=5)
TEXTS = st.text("abAB", max_size=3)
RULES = st.one_of(
    SCALARS,
    TEXTS.map(lambda text: {"prefix": text}),
    TEXTS.map(lambda text: {"suffix": {"equals-ignore-case": text}}),
    TEXTS.map(lambda text: {"anything-but": text}),
    st.integers(-3, 3).map(lambda number: {"numeric": [">=", number]}),
    st.booleans().map(lambda flag: {"exists": flag}),
)
LEAVES = st.lists(RULES, min_size=1, max_size=3)
PLAIN = st.recursive(
    st.dictionaries(st.sampled_from("abc"), LEAVES, min_size=1, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner | LEAVES, min_size=1, max_size=3),
    max_leaves=8,
)
PATTERNS = st.recursive(
    PLAIN,
    lambda inner: st.builds(
        lambda fields, alternatives: {**fields, "$or": alternatives},
        st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
        st.lists(inner, min_size=2, max_size=3),
    ),
    max_leaves=6,
)


@given(PATTERNS, OBJECTS)
def test_any_pattern_decides_any_event_and_explains_it_alike(pattern, event):
    """Never an error; the explanation comes to the verdict of the match."""
    try:
        matches(pattern, event)
    except PatternError as error:
        assert "combinations" in error.reason  # noqa: PT017 - the only reason that is left


@given(st.binary(max_size=60), st.sampled_from([SQS, KINESIS, DYNAMODB]))
def test_any_bytes_are_decided(wire, kind):
    """Never an error, whatever a record holds."""
    Filter(['{"eventSource": ["x"], "kinesis": {"a": [1]}}'], kind).matches(record(wire))
    assert not matches({"body": {"a": [1]}}, sqs(wire.decode("latin-1")), SQS)
    assert not matches({"data": {"a": [1]}}, kinesis(wire), KINESIS)


@given(st.text(max_size=60))
def test_any_text_is_a_pattern_or_refused(text):
    """`PatternError` and nothing else."""
    try:
        Filter([text])
    except PatternError as error:
        assert str(error)  # noqa: PT017 - both outcomes are fine


@given(EVENTS, LEAVES)
def test_any_json_is_a_pattern_or_refused(pattern, rules):
    """`PatternError` and nothing else, for JSON of every form."""
    for one in (
        pattern,
        {"a": pattern},
        {"a": [pattern]},
        {"a": [*rules, {"anything-but": pattern}]},
        {"a": [{"numeric": pattern}]},
    ):
        try:
            Filter([json.dumps(one)])
        except PatternError as error:
            assert error.reason  # noqa: PT017 - both outcomes are fine


@given(st.lists(st.sampled_from(["a", "b", "*", "\\*", "\\\\", "ab"]), max_size=7), st.text("ab*\\", max_size=9))
def test_wildcards_are_regular_expressions(pieces, text):
    """`*` is `.*`; an escape is the character itself."""
    pattern = "".join(one for at, one in enumerate(pieces) if one != "*" or pieces[at - 1 : at] != ["*"])
    expression = re.sub(r"\\(.)|(\*)|(.)", lambda one: ".*" if one[2] else re.escape(one[1] or one[3]), pattern)
    wanted = re.fullmatch(expression, text, re.DOTALL) is not None
    assert rule({"wildcard": pattern}, text) is wanted
    assert rule({"anything-but": {"wildcard": pattern}}, text) is not wanted
    if "\\" not in pattern:
        assert wanted is fnmatch.fnmatchcase(text, pattern)


@given(st.text(), st.text(), st.booleans())
def test_affixes_and_case_are_pythons(text, part, attach):
    """prefix, suffix and equals-ignore-case agree with str's own methods, for any characters."""
    text = part + text + part if attach else text
    assert rule({"prefix": part}, text) is text.startswith(part)
    assert rule({"suffix": part}, text) is text.endswith(part)
    folded, folded_part = text.casefold(), part.casefold()
    assert rule({"equals-ignore-case": part}, text) is (folded == folded_part)
    assert rule({"prefix": {"equals-ignore-case": part}}, text) is folded.startswith(folded_part)
    assert rule({"suffix": {"equals-ignore-case": part}}, text) is folded.endswith(folded_part)
    assert rule({"equals-ignore-case": text.swapcase().swapcase()}, text) or text.casefold() != text.lower()


@given(SCALARS, st.lists(TEXTS, min_size=1, max_size=3) | st.lists(st.integers(-3, 3), min_size=1, max_size=3))
def test_anything_but_is_the_negation_of_a_value_that_is_there(value, items):
    """Whatever type the value has."""
    assert rule({"anything-but": items}, value) is not matches({"k": items}, {"k": value})
    if isinstance(items[0], str):
        for name in ("prefix", "suffix", "equals-ignore-case"):
            texts = [item or "x" for item in items]
            plain = matches({"k": [{name: text} for text in texts]}, {"k": value})
            assert rule({"anything-but": {name: texts}}, value) is not plain


@given(st.floats(-6e9, 6e9) | st.integers(-6_000_000_000, 6_000_000_000), st.integers(-100, 100), st.integers(1, 100))
def test_numeric_is_arithmetic(value, low, width):
    """All operators, within the bounds of EventBridge."""
    for near in (value, low, low + width, low + 0.5):
        fits = -5e9 <= near <= 5e9
        assert rule({"numeric": ["=", low]}, near) is (near == low)
        assert rule({"numeric": [">", low]}, near) is (fits and near > low)
        assert rule({"numeric": [">=", low]}, near) is (fits and near >= low)
        assert rule({"numeric": ["<", low]}, near) is (fits and near < low)
        assert rule({"numeric": ["<=", low]}, near) is (fits and near <= low)
        assert rule({"numeric": [">", low, "<", low + width]}, near) is (low < near < low + width)
        assert rule({"numeric": [">=", low, "<=", low + width]}, near) is (low <= near <= low + width)


@given(st.ip_addresses(), st.ip_addresses(), st.integers(0, 32))
def test_cidr_is_the_network(address, other, bits):
    """Any address and mask, the mask's own bits not counting."""
    network = ipaddress.ip_network(f"{other}/{bits}", strict=False)
    assert rule({"cidr": f"{other}/{bits}"}, str(address)) is (address in network)
    assert rule({"cidr": f"{other}/{bits}"}, str(other))


def reference(pattern, event):
    """EventBridge's definition: all fields of one combination of $or are found, and no two of them in different
    elements of one array. Tries everything; without exists false.
    """

    def combinations(pattern, path):
        sets = [[]]
        for name, item in pattern.items():
            if name == "$or":
                options = [one for part in item for one in combinations(part, path)]
            elif isinstance(item, dict):
                options = combinations(item, f"{path}{name}.")
            else:
                options = [[(path + name, item)]]
            sets = [one + option for one in sets for option in options]
        return sets

    def fields(value, path, places):
        if isinstance(value, dict):
            for name, item in value.items():
                yield from fields(item, f"{path}.{name}" if path else name, places)
        elif isinstance(value, list):
            for at, item in enumerate(value):
                inside = {**places, id(value): at} if isinstance(item, dict | list) else places
                yield from fields(item, path, inside)
        else:
            yield path, value, places

    found = list(fields(event, "", {}))

    def fits(leaves, places):
        if not leaves:
            return True
        (path, rules), *rest = leaves
        return any(
            fits(rest, {**places, **own})
            for name, value, own in found
            if name == path
            and all(places.get(array, at) == at for array, at in own.items())
            and any(matches({"k": [one]}, {"k": value}) for one in rules)
        )

    return any(fits(leaves, {}) for leaves in combinations(pattern, ""))


SMALL_EVENTS = st.recursive(
    st.integers(0, 1) | st.just("a"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=12,
)
SMALL_LEAVES = st.lists(st.integers(0, 1) | st.just({"anything-but": "a"}), min_size=1, max_size=1)
SMALL_PLAIN = st.recursive(
    st.dictionaries(st.sampled_from("abc"), SMALL_LEAVES, min_size=1, max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner | SMALL_LEAVES, min_size=1, max_size=2),
    max_leaves=4,
)
SMALL_PATTERNS = st.recursive(
    SMALL_PLAIN,
    lambda inner: st.builds(
        lambda fields, alternatives: {**fields, "$or": alternatives},
        st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
        st.lists(inner, min_size=2, max_size=2),
    ),
    max_leaves=3,
)


@given(SMALL_PATTERNS, st.dictionaries(st.sampled_from("abc"), SMALL_EVENTS, max_size=3))
def test_arrays_and_or_agree_with_the_definition(pattern, event):
    """The tree decides as EventBridge's own definition does, which tries every combination of fields and elements."""
    assert matches(pattern, event) is reference(pattern, event)


@given(st.lists(PLAIN, min_size=2, max_size=3), OBJECTS, LEAVES)
def test_or_is_the_union(alternatives, event, rules):
    """At the top, below a field and beside another field."""
    apart = [matches(one, event) for one in alternatives]
    assert matches({"$or": alternatives}, event) is any(apart)
    assert matches({"x": {"$or": alternatives}}, {"x": event}) is any(apart)
    both = [matches({**one, "x": rules}, {**event, "x": 1}) for one in alternatives]
    assert matches({"x": rules, "$or": alternatives}, {**event, "x": 1}) is any(both)


@given(PATTERNS, PATTERNS, OBJECTS)
def test_order_does_not_matter(one, other, event):
    """Neither of the fields, of the event's keys, of the rules, of the alternatives nor of the filters."""

    def backwards(value):
        if isinstance(value, dict):
            return {name: backwards(item) for name, item in reversed(value.items())}
        return [backwards(item) for item in reversed(value)] if isinstance(value, list) else value

    try:
        verdict = matches(one, event)
    except PatternError:
        return
    if "numeric" not in json.dumps(one):  # its operand is a list with an order
        assert matches(backwards(one), event) is verdict
    assert matches(one, {name: event[name] for name in reversed(event)}) is verdict
    try:
        texts = [json.dumps(one), json.dumps(other)]
        assert Filter(texts).matches(record(event)) is Filter(texts[::-1]).matches(record(event))
    except PatternError:
        pass


@given(
    PATTERNS,
    PLAIN,
    st.recursive(SCALARS, lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3)),
)
def test_dots_are_levels(forked, pattern, value):
    """A pattern or an event written flat, its names joined by dots, is the nested one."""

    def flat(value, path=""):
        for name, item in value.items():
            yield from flat(item, f"{path}{name}.") if isinstance(item, dict) else [(path + name, item)]

    event = {"a": value, "b": 1}
    verdict = matches(pattern, event)
    assert matches(dict(flat(pattern)), event) is verdict
    assert matches(pattern, dict(flat(event))) is verdict
    assert matches(dict(flat(pattern)), dict(flat(event))) is verdict
    with suppress(PatternError):  # too many combinations
        assert matches(forked, dict(flat(event))) is matches(forked, event)


# --- the function and the walk --------------------------------------------------------------------------------------


def code(patterns, kind=None):
    return decider(Filter([json.dumps(one) for one in patterns], kind)._roots, kind)


def wrapped(kind, document):
    """A pattern or an event at the place where a source has its payload."""
    return {SQS: {"body": document}, KINESIS: {"data": document}}.get(kind, document)


def event_of(kind, document):
    return {SQS: lambda: sqs(json.dumps(document)), KINESIS: lambda: kinesis(document)}.get(kind, lambda: document)()


FORKS = st.recursive(  # as most patterns are: values are asked for at x, y and z, fields below a, b and c
    st.dictionaries(st.sampled_from("xyz"), LEAVES, min_size=1, max_size=3),
    lambda inner: st.builds(
        lambda leaves, fields, alternatives: {**leaves, **fields, **alternatives},
        st.dictionaries(st.sampled_from("xyz"), LEAVES, max_size=2),
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=2),
        st.just({}) | st.lists(inner, min_size=2, max_size=3).map(lambda several: {"$or": several}),
    ),
    max_leaves=6,
)
FORKED = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*"abcxyz", "a.x", "b.a"]), inner, max_size=5)
    ),
    max_leaves=25,
)


@given(
    st.sampled_from([None, SQS, KINESIS, DYNAMODB]),
    st.lists(FORKS, min_size=1, max_size=4),
    st.dictionaries(st.sampled_from([*"abcxyz", "a.x"]), FORKED, max_size=6),
)
def test_the_function_decides_as_the_patterns_explain(kind, patterns, document):
    """For every source, with several patterns in one function; what it leaves to the walk is decided alike."""
    event = event_of(kind, document)
    try:
        compiled = Filter([json.dumps(wrapped(kind, one)) for one in patterns], kind)
    except PatternError as error:
        assert "combinations" in error.reason  # noqa: PT017 - the only reason that is left
        return
    wanted = any(one.matched for one in compiled.explain(event))
    wire = json.dumps(event).encode()
    assert compiled.matches(record(wire)) is wanted
    assert compiled._walk(wire) is wanted
    decide = decider(compiled._roots, kind)
    with suppress(*UNUSUAL):
        assert decide is None or decide(wire) is wanted


USUAL = [  # patterns and events that have to be decided by the function
    ({"a": [1], "b": {"x": ["y"]}}, {"a": 1, "b": {"x": "y"}}, True),
    ({"a": [1]}, {"a": [[1]]}, True),
    ({"a": [1]}, {"a": {"b": 1}}, False),
    ({"a": {"x": [1]}}, {"a": [{"x": 2}, {}, {"x": [3, 1]}]}, True),
    ({"a": {"x": [1], "y": [1]}}, {"a": [{"x": 1}, {"y": 1}]}, False),
    ({"a": {"x": [1]}}, {"a": "text"}, False),
    ({"a": {"x": [1]}}, {}, False),
    ({"a": {"x": [None]}}, {"a": {"x": None}}, True),
    ({"a": {"x": [None]}}, {"a": {}}, False),
    ({"a": {"x": [{"exists": False}]}}, {"a": 5}, True),
    ({"a": {"x": [{"exists": False}]}}, {}, True),
    ({"a": {"x": [{"exists": False}]}}, {"a": [{}, {"x": 1}]}, False),
    ({"a": {"x": [{"exists": False}], "y": [1]}}, {"a": [{"x": 1}, {"y": 1}]}, True),
    ({"a": {"x": [{"exists": False}, 1]}}, {"a": [{"y": 1}, {"x": 1}, {"x": 2}]}, True),
    ({"a": {"$or": [{"x": [{"exists": False}]}, {"y": [1]}]}}, {"a": [{"x": 1}, {"x": 1, "y": 1}]}, True),
    ({"$or": [{"a": [1]}, {"$or": [{"b": [1]}, {"c": {"x": [1]}}]}]}, {"c": {"x": 1}}, True),
    (reduce(lambda inner, _: {"a": inner}, range(20), {"x": [1]}),
     reduce(lambda inner, _: {"a": [inner]}, range(20), {"x": 1}), True),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "document", "verdict"), USUAL)
@pytest.mark.parametrize("kind", [None, SQS, KINESIS])
def test_usual_records_are_not_walked(kind, pattern, document, verdict):
    """Values, objects, arrays of objects and what is absent, for every source: the function itself decides."""
    wire = json.dumps(event_of(kind, document)).encode()
    assert code([wrapped(kind, pattern)], kind)(wire) is verdict


UNTOUCHED = [  # a document whose member `z` nobody asks for, and whether it is JSON
    (b'{"a": 1, "z": "\xc3\xa4"}', True),
    (b'{"a": 1, "z": "\xff"}', False),
    (b'{"a": 1, "\xff": 2}', False),
    (b'{"a": 1, "z": "\\ud800"}', True),
    (b'{"a": 1, "z": "\x01"}', False),
    (b'{"a": 1, "z": NaN}', False),
    (b'{"a": 1, "z": 01}', False),
    (b'{"a": 1, "z": 1e999}', True),
    (b'{"a": 1, "z": %b}' % (b"9" * 5000), True),
    (b'{"a": 2, "a": 1}', True),
    (b'{"a": 1, "a": 2}', False),
    (b'{"\\u0061": 1}', True),
    (b' \n{"a": 1}\t', True),
    (b'{"a": 1} x', False),
    (b'{"a": 1', False),
]


@pytest.mark.parametrize(("text", "is_match"), UNTOUCHED)
def test_a_payload_is_json_as_a_whole(text, is_match):
    """Members that are skipped while it is decoded count for that, and explanations say the same."""
    assert matches({"data": {"a": [1]}}, kinesis(text), KINESIS) is is_match
    with suppress(UnicodeDecodeError):  # else it is no body of a message
        assert matches({"body": {"a": [1]}}, sqs(text.decode()), SQS) is is_match


@pytest.mark.parametrize("digits", [641, 5000])
def test_a_number_of_any_length_is_a_number(digits):
    """Also where Python refuses to read it: no record is lost for it."""
    text = b'{"n": %b, "s": "\\ud800"}' % (b"9" * digits)
    assert matches({"n": [{"anything-but": [1]}]}, text)
    assert not matches({"n": [1]}, text)
    assert matches({"data": {"n": [{"exists": True}]}}, kinesis(text), KINESIS)


@pytest.mark.parametrize(
    "event",
    [
        {"kinesis": {"data": "eyJhIjoxfQ=="}, "data.a": 2},
        {"kinesis": {"data": "eyJhIjoyfQ==", "data.a": 1}},
        {"kinesis": {"data": "eyJhIjoyfQ=="}, "data.a": 1},
        {"kinesis": {"data": "eyJhIjoxfQ=="}, "data": {"a": 2}},
        {"kinesis": {}, "data": {"a": 1}},
        {"kinesis": {"data": " eyJhIj\noxfQ==\n"}},
        {"kinesis": {"data": {"a": 1}}},
    ],
)
def test_odd_kinesis_records_match(event):
    """`data` wherever it can stand, with dots, beside `kinesis`, in lines, not encoded."""
    assert matches({"data": {"a": [1]}}, event, KINESIS)


@pytest.mark.parametrize(
    "patterns",
    [
        [{"a": ["x"]}, {"a": {"b": [1]}}],
        [{"ä": {"b": [1]}, "a": [1]}],
        [{'"]; raise SystemExit #': [1]}, {"a": [2]}],
        [{"a\n": [1]}],
        [{f"k{n}": {"x": [n]} for n in range(150)} for _ in range(4)],
        [reduce(lambda inner, _: {"a": inner}, range(95), {"x": [1]})],
    ],
)
def test_patterns_without_a_function_are_walked(patterns):
    """Values and fields at one place, names that cannot be decoded, too many fields: slower, and right."""
    assert code(patterns) is None
    compiled = Filter([json.dumps(one) for one in patterns])

    def event(pattern):
        return {name: event(item) if isinstance(item, dict) else item[0] for name, item in pattern.items()}

    for pattern in patterns:
        assert compiled.matches(record(event(pattern)))
    assert not compiled.matches(record({"b": 1}))


@given(st.dictionaries(st.text(min_size=1), st.lists(st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False), min_size=1), min_size=1, max_size=3))  # fmt: skip
def test_no_text_of_a_pattern_is_code(pattern):
    """Whatever names and values are, they are only compared."""
    event = {name: items[-1] for name, items in pattern.items()}
    with suppress(PatternError):
        assert matches(pattern, event)
        assert not matches(pattern, {})


# --- cost -----------------------------------------------------------------------------------------------------------


def steps(compiled, event):
    """Calls that one decision makes, of Python and of C functions."""
    count = 0

    def note(_frame, what, _argument):
        nonlocal count
        count += what in {"call", "c_call"}

    one = record(event)
    compiled.matches(one)  # the first record makes the function
    sys.setprofile(note)
    try:
        compiled.matches(one)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    ("pattern", "event"),
    [
        ({"k": {"a": [1], "b": [2]}}, lambda n: {"k": [{"a": 1, "b": 3}] * n}),
        ({"k": {"a": {"b": {"c": [1]}}}}, lambda n: {"k": [[{"a": [[{"b": [{"c": 2}] * n}]]}]] * 3}),
        ({"k": {"$or": [{"a": [1]}, {"a": [2]}, {"$or": [{"a": [3]}, {"a": [4]}]}]}}, lambda n: {"k": [{"a": 9}] * n}),
        ({"k": {"a": [1]}, "$or": [{"k": {"b": [n]}} for n in range(9)]}, lambda n: {"k": [{"a": 1, "b": 10}] * n}),
        ({"a": {"b": {"c": [1]}}}, lambda n: {"a": [{"b.c": 2}] * n, "a.b": [{"c": 3}] * n, "a.b.c": [4] * n}),
        ({"k": ["a" * 9, {"prefix": "a"}]}, lambda n: {"k": ["b"] * n}),
        ({"k": {"a": [1]}}, lambda n: {"k": reduce(lambda inner, _: [inner], range(n // 8), {"a": 2})}),
    ],
)
def test_cost_grows_with_the_event_and_no_faster(pattern, event):
    """Four times the event takes at most four times the steps, on events made to be searched in vain."""
    compiled = Filter([json.dumps(pattern)])
    base, small, large = (steps(compiled, event(n)) for n in (0, 1000, 4000))
    assert large - base <= 4.2 * (small - base)


def test_cost_of_a_wildcard_is_its_parts():
    """Each part is searched for once, however often it almost fits: no backtracking."""
    compiled = Filter([json.dumps({"k": [{"wildcard": "*a" * 200 + "*b"}]})])
    assert steps(compiled, {"k": "a" * 100_000}) < 1_000
    compiled = Filter([json.dumps({"k": [{"wildcard": "*" + "a*" * 1500 + "b"}]})])
    assert steps(compiled, {"k": "a" * 1_000}) < 5_000


def test_the_widest_or_is_bounded():
    """As many combinations as there may be, all reaching into one array: the steps are the combinations' at most."""
    wide = {"e": {f"k{n}": [1] for n in range(5)}, "$or": [{"e": {f"x{n}": [1]}} for n in range(100)]}
    compiled = Filter([json.dumps(wide)])
    assert steps(compiled, {"e": {f"k{n}": 1 for n in range(5)}}) < 100 * 100


def test_the_filters_of_the_benchmark_take_few_calls():
    """Five filters over an array of eight objects: a call for each element was several times this."""
    patterns = [one["Pattern"] for one in stream_filters()]
    items = [{"sku": f"sku-{n}", "quantity": n, "path": f"dir/{n}/picture.png"} for n in range(8)]
    order = {"state": "shipped", "total": 301.8, "customer": {"country": "DE", "ip": "10.0.0.33"}, "items": items}
    compiled = Filter(patterns, KINESIS)
    assert compiled.matches(record(kinesis(order)))
    assert steps(compiled, kinesis(order)) < 22
