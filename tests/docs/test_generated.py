"""Generated documents are what ``make docs`` would write."""

import make_docs
import pytest

from megatron_xielu import catalog


@pytest.mark.parametrize("name", make_docs.DOCUMENTS)
def test_is_not_stale(name):
    assert (make_docs.TOP / name).read_text() == make_docs.DOCUMENTS[name](), "run make docs"


def test_every_refusal_has_a_reason():
    lists = (
        catalog.WITH_OURS,
        catalog.BY_ENTRY,
        catalog.UNREAD,
        catalog.WITH_RECOMPUTE_OUTPUT,
        catalog.WITH_SHARED_ALPHAS,
        catalog.WITH_DOCUMENTS,
        catalog.BEFORE_0_19,
        catalog.BY_PLAN,
    )
    assert all(refusal.reason for refusals in lists for refusal in refusals)
