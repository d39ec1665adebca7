"""Answers of solutions in words are compared with those of other solutions of the same problem."""

import dataclasses
import json
from typing import Any

import pytest
from test_filtering import CONFIG, problem, tool

from jz3.filtering.crosscheck import cross_check
from jz3.grading.answer import Grader


@pytest.fixture(scope="module")
def grader() -> Any:
    with Grader(workers=2) as opened:
        yield opened


def test_votes(grader: Grader) -> None:
    rows = [
        problem(solution="\\boxed{36}", id="a"),
        problem(solution="\\boxed{36.0}", id="b"),
        problem(solution="\\boxed{35}", id="c"),
        problem(question="Alone: how many pens?", id="d"),
        problem(question="Others: how many pens?", id="e", meta={"answers": json.dumps(["36", "7"])}),
        problem(question="Tie: how many pens?", id="f", meta={"answers": json.dumps(["7"])}),
        problem(question="Damaged: how many pens?", id="g", meta={"answers": "no list"}),
    ]
    vote = cross_check(rows, CONFIG, grader)
    assert [f["reason"] for f in vote] == ["", "", "vote_lost", "", "", "vote_lost", ""]
    assert vote[0]["checks"] == {"vote": "2/3"} and vote[3]["checks"] == {"vote": "none"}
    strict = cross_check(rows, dataclasses.replace(CONFIG, require_cross_check=True), grader)
    assert strict[3]["reason"] == "no_cross_check"
    assert [f["detail"] for f in vote][2:4] == ["1/3", "none"]
    unchecked = cross_check(rows, dataclasses.replace(CONFIG, cross_check="none"), grader)
    assert unchecked == [{"reason": "", "detail": "", "checks": {}}] * len(rows)


def test_cross_check_by_tool(grader: Grader) -> None:
    rows = [
        tool("print(36)", "36", "36"),
        problem(),
        problem(solution="\\boxed{35}"),
        problem(question="Alone: how many pens?"),
    ]
    found = cross_check(rows, dataclasses.replace(CONFIG, cross_check="tool"), grader)
    assert [f["reason"] for f in found] == ["", "", "tool_disagrees", ""]
