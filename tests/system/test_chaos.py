"""Studies under attack, briefly; ``python -m tests.chaos`` does it for as long as one likes."""

import pytest

from tests import chaos


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_studies_under_attack_end_with_exactly_what_was_asked_for(seed: int) -> None:
    report = chaos.attack(30, seed)
    assert report.findings == {}, report.as_markdown()
    assert len(report.faults) >= 5
    assert report.facts["attempts that went on from a checkpoint"] > 0


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [2, 3])
def test_studies_under_attack_for_long(seed: int) -> None:
    report = chaos.attack(300, seed, models=chaos.ALL)
    assert report.findings == {}, report.as_markdown()
