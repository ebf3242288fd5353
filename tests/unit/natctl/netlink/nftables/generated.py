"""Hypothesis strategies of what goes to and comes from nftables."""

from __future__ import annotations

from hypothesis import strategies as st

from natctl.ruleset.values import Element, Limit

NO_TIMEOUT = st.just(0)
NOT_DEFERRING = st.none()


def elements(
    timeouts_ms: st.SearchStrategy[int] = NO_TIMEOUT,
    deferring: st.SearchStrategy[int | None] = NOT_DEFERRING,
) -> st.SearchStrategy[Element]:
    """Elements that lead to no chain; by default without what is not read back as it was."""
    return st.builds(
        Element,
        st.binary(min_size=1, max_size=16),
        st.binary(max_size=16),
        st.binary(max_size=16),
        st.just(""),
        st.binary(max_size=255),
        st.booleans(),
        st.none() | st.integers(0, 65535),
        timeouts_ms,
        deferring,
        st.none(),
    )


def limits() -> st.SearchStrategy[Limit]:
    """Limits of both kinds."""
    number = st.integers(1, 2**31)
    return st.builds(Limit, number, st.sampled_from([1, 60, 3600]), number, st.none() | st.integers(0, 2**31))
