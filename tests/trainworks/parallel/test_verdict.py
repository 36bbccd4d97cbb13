"""Who is named when ranks cannot go on, by what each of them said last."""

from __future__ import annotations

from dataclasses import asdict, replace
from json import dumps, loads
from typing import Any

import pytest

from trainworks.parallel.verdict import HOLD, Report, Seen, Sign, Verdict, judge

NOW, TIMEOUT = 1000.0, 60.0
KILLED, LEFT_BY_ITSELF = "was killed by SIGKILL", "exited with 0"
BROKE = Report("complaint", 1, "RuntimeError: gloo/transport: Connection closed by peer")


def seen(rank: int, *, heard: float = NOW, reported: float = NOW, **signed: Any) -> Seen:
    """Return a rank that was heard of just now, at work in step 7."""
    given = {"host": "box", "pid": 100 + rank, "step": 7, "place": "training > loop", **signed}
    return Seen(Sign(rank=rank, **given), heard, reported=reported)


def gone(rank: int, how: str, *, at: float = NOW, **signed: Any) -> Seen:
    return replace(seen(rank, heard=at, **signed), gone=at, how=how)


def judged(*ranks: Seen, now: float = NOW) -> Verdict | None:
    return judge({one.sign.rank: one for one in ranks}, now=now, timeout=TIMEOUT)


def test_ranks_that_work_or_wait_are_left_alone() -> None:
    assert judged(seen(0), seen(1, waited=TIMEOUT - 1)) is None
    assert judged(seen(0), seen(1, waited=100 * TIMEOUT, since=100 * TIMEOUT, patient=True)) is None
    assert judged(seen(0), seen(1, heard=NOW - TIMEOUT + 1)) is None


def test_a_rank_that_was_killed_is_named_at_once() -> None:
    verdict = judged(seen(0), gone(1, KILLED))
    assert verdict is not None
    assert (verdict.ranks, verdict.code) == ((1,), 3)
    assert verdict.reason == (
        "rank 1 (host box, process 101; last seen after step 7 in training > loop) was killed by SIGKILL"
    )


def test_the_one_that_died_first_is_named_and_not_what_its_launcher_ended_for_it() -> None:
    verdict = judged(seen(0), gone(1, "was killed by SIGTERM", at=NOW - 1), gone(2, KILLED))
    assert verdict is not None
    assert verdict.ranks == (2,)
    verdict = judged(seen(0), gone(1, "exited with 1", at=NOW - 1), gone(2, KILLED))
    assert verdict is not None
    assert verdict.ranks == (1,)


@pytest.mark.parametrize("how", [LEFT_BY_ITSELF, ""])
def test_a_rank_that_ended_well_is_missed_only_once_another_needs_it(how: str) -> None:
    ended = gone(1, how, at=NOW - 5)
    assert judged(seen(0), ended) is None
    assert judged(seen(0, waited=0.1), ended) is None
    assert judged(seen(0, waited=9.0, heard=NOW - 4.5), ended) is None, "what it said came too soon after the end"
    for needing in (seen(0, waited=2 * HOLD), seen(0, waited=9.0, patient=True), seen(0, report=BROKE)):
        verdict = judged(needing, ended)
        assert verdict is not None
        assert verdict.ranks == (1,)


def test_a_rank_that_left_is_not_missed() -> None:
    assert judged(seen(0, waited=9.0), gone(1, "", at=NOW - 5, left=True)) is None


def test_an_error_is_held_back_for_a_moment_and_a_death_goes_before() -> None:
    failed = seen(1, report=Report("error", 1, "ValueError: no"))
    assert judged(seen(0), failed) is None
    verdict = judged(seen(0), failed, now=NOW + HOLD)
    assert verdict is not None
    assert (verdict.code, verdict.report) == (1, failed.sign.report)
    assert verdict.reason.endswith("training > loop): ValueError: no")
    verdict = judged(seen(0), failed, gone(2, KILLED))
    assert verdict is not None
    assert verdict.ranks == (2,)


def test_an_error_that_all_have_is_the_main_ranks() -> None:
    same = Report("error", 2, "rows.jsonl:3: no text")
    verdict = judged(seen(0, report=same), seen(1, report=same, reported=NOW - 0.1))
    assert verdict is not None
    assert (verdict.ranks, verdict.code, verdict.is_told_by_rank_0) == ((0,), 2, True)


def test_a_broken_exchange_is_put_down_to_who_did_not_come() -> None:
    one, other = seen(0, report=BROKE), seen(1, waited=3.0)
    assert judged(one, other, seen(2)) is None
    verdict = judged(one, other, seen(2), now=NOW + HOLD)
    assert verdict is not None
    assert (verdict.ranks, verdict.code) == ((2,), 3)
    verdict = judged(one, other, now=NOW + HOLD)
    assert verdict is not None
    assert verdict.reason.endswith(BROKE.text)


def test_an_error_goes_before_the_exchanges_it_breaks() -> None:
    failed = seen(1, report=Report("error", 1, "ValueError: no"), reported=NOW + 0.2)
    verdict = judged(seen(0, report=BROKE), failed, now=NOW + 2 * HOLD)
    assert verdict is not None
    assert verdict.ranks == (1,)


def test_silence_is_a_hang_once_the_timeout_is_over() -> None:
    verdict = judged(seen(0, waited=TIMEOUT), seen(1, heard=NOW - TIMEOUT - 1))
    assert verdict is not None
    assert (verdict.ranks, verdict.code) == ((1,), 3)
    assert verdict.reason.endswith("gave no sign of life for 61 s")


def test_those_who_have_come_to_the_fewest_exchanges_let_the_others_wait() -> None:
    waiting = {"waited": TIMEOUT + 1, "since": TIMEOUT + 1, "exchanges": 8}
    verdict = judged(seen(0, **waiting), seen(1, exchanges=7), seen(2, **waiting), seen(3, exchanges=7, waited=2.0))
    assert verdict is not None
    assert verdict.ranks == (1, 3)
    verdict = judged(seen(0, **waiting), seen(1, **waiting))
    assert verdict is not None
    assert "what joins them hangs" in verdict.reason


def test_who_does_not_come_is_late_though_the_others_wait_outside_of_the_exchange() -> None:
    came = {"since": TIMEOUT + 1, "exchanges": 8}
    verdict = judged(seen(0, **came), seen(1, exchanges=7, since=TIMEOUT + 5))
    assert verdict is not None
    assert verdict.ranks == (1,)
    assert "let rank 0 wait for 61 s" in verdict.reason
    assert judged(seen(0, **came), seen(1, **came)) is None, "all work on what comes next"
    assert judged(seen(0, **came, patient=True), seen(1, exchanges=7)) is None


def test_a_rank_that_alone_is_asked_to_stop_stops_all() -> None:
    stop = Report("stop", 75, "asked to stop")
    assert judged(seen(0), seen(1, report=stop)) is None
    verdict = judged(seen(0), seen(1, report=stop), now=NOW + HOLD)
    assert verdict is not None
    assert (verdict.code, verdict.is_fault) == (75, False)
    verdict = judged(seen(0, report=stop), seen(1, report=stop))
    assert verdict is not None
    assert verdict.is_told_by_rank_0


def test_signs_and_verdicts_travel_as_json() -> None:
    sign = seen(1, report=BROKE).sign
    assert Sign.read(loads(dumps(asdict(sign)))) == sign
    verdict = Verdict((1, 2), 3, "why", report=BROKE)
    assert Verdict.read(loads(dumps(asdict(verdict)))) == verdict
