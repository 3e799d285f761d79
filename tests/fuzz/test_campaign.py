"""The harness of the fuzzer tells of everything that a reader may not do."""

from collections.abc import Iterator

import pytest

from tests.fuzz import campaign as campaign_module
from tests.fuzz.campaign import Campaign

TOLD = {
    "refuses": "",
    "foreign": "KeyError is not documented",
    "panics": "GeneratorExit is not documented",
    "wordless": "ValueError without words",
    "nameless": "names neither file nor key: unexpected end",
    "endless": "ValueError of 100009 characters",
    "allocates": "took 1",
    "overallocates": "MemoryError is not documented",
    "writes": "did open ",
    "climbs": "did os.mkdir ",
    "runs": "did subprocess.Popen",
    "shells": "did os.system",
    "calls": "did socket.",
    "unpickles": "did pickle.find_class",
    "evaluates": "did exec of a",
    "crashes": "ended the process: Aborted",
    "leaves": "ended the process: exit 3",
    "spins": "ended the process: Profiling timer expired",
    "sleeps": "hangs: no answer in 5 s",
}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    with Campaign(tmp_path_factory.mktemp("misread"), "tests.fuzz.misread") as campaign:
        yield campaign


@pytest.mark.parametrize("reader", TOLD)
def test_what_is_done_wrong_is_told(
    campaign: Campaign, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reader == "sleeps":
        monkeypatch.setattr(campaign_module, "PATIENCE_S", 5.0)
    verdict = campaign.run(reader, 0, 1)
    assert TOLD[reader] in verdict.wrong
    assert bool(verdict.wrong) == bool(TOLD[reader])
    assert f"campaign {reader} 0 1\n" in str(verdict)
