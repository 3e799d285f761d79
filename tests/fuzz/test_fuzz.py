"""Damaged inputs, by the hundred, for everything that reads what a user hands in.

The folder mirrors no module: one harness tries the readers of all of them. An input must be read as
valid or be refused with an exception that its reader documents and words that name what is wrong,
without a hang, a crash, much memory, a program being run, or a file written elsewhere. `readers.py`
lists the readers, `mutate.py` damages, `worker.py` reads and judges in a process of its own, and
`campaign.py` repeats a case that failed, which its first line tells how to.
"""

import os
from collections.abc import Iterator

import pytest

from tests.fuzz.campaign import Campaign
from tests.fuzz.readers import READERS

SEED = int(os.environ.get("EMOE_FUZZ_SEED", "0"))
"""Other seeds damage in other ways."""


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    with Campaign(tmp_path_factory.mktemp("fuzz")) as campaign:
        yield campaign


def share(reader: str, total: int) -> int:
    """How many of all cases a reader gets."""
    return -(-total * READERS[reader].share // sum(each.share for each in READERS.values()))


def check(campaign: Campaign, reader: str, cases: range) -> set[str]:
    """Fails if anything is wrong; what came of the cases."""
    verdicts = [campaign.run(reader, SEED, case) for case in cases]
    wrong = [str(verdict) for verdict in verdicts if verdict.wrong]
    assert not wrong, f"{len(wrong)} of {len(cases)} cases, again by\n" + "\n".join(wrong[:10])
    return {verdict.came for verdict in verdicts}


@pytest.mark.parametrize("reader", READERS)
def test_some_hundred(campaign: Campaign, reader: str) -> None:
    check(campaign, reader, range(share(reader, 500)))


@pytest.mark.soak
@pytest.mark.parametrize("reader", READERS)
def test_ten_thousand(campaign: Campaign, reader: str) -> None:
    came = check(campaign, reader, range(share(reader, 10_000)))
    # Damage that nothing notices, or that leaves nothing to read, would try nothing.
    assert "valid" in came
    assert came != {"valid"}
