"""The search of `python -m ldm_jax.plan --suggest`, with compilations that are a formula."""

import pytest

from ldm_jax.runtime.suggestions import Choice, Outcome, fsdp_sizes, ranked, search

CHIPS = 8
KEPT = {"": 8.0, "products": 5.0, "dots": 4.0, "blocks": 1.0}  # bytes of a picture


def compiling(capacity, state=16.0, saturates=64, log=None):
    """A model whose speed grows with the batch up to `saturates`, less with recomputation."""

    def compiled(choice):
        needed = states(state)(choice.fsdp) + KEPT[choice.remat] * choice.batch / CHIPS
        if log is not None:
            log.append(choice)
        slower = 1.0 - 0.1 * list(KEPT).index(choice.remat) - 0.01 * (choice.fsdp > 1)
        speed = slower * min(choice.batch, saturates) / CHIPS
        return Outcome(choice, needed, speed if needed <= capacity else 0.0)

    return compiled


def states(state):
    return lambda fsdp: state / fsdp


def find(capacity, batch=16, state=16.0, limit=30, saturates=64):
    log = []
    compiled = compiling(capacity, state, saturates, log)
    found = list(search(compiled, batch, CHIPS, (1, 8), states(state), capacity, limit))
    assert [outcome.choice for outcome in found] == log and len(set(log)) == len(log)
    return found


def test_a_batch_grows_while_it_is_worth_it():
    found = find(capacity=1e9)
    batches = [o.choice.batch for o in found if (o.choice.fsdp, o.choice.remat) == (1, "")]
    assert batches == [16, 32, 64, 128]  # of 128 a chip is no faster
    # Memory gains nothing, so all others are compiled once.
    assert {o.choice.batch for o in found[4:]} == {64} and len(found) == 4 + 7
    assert ranked(found)[0].choice == Choice(1, "", 64)


def test_what_would_not_fit_is_not_compiled():
    # 64 bytes: without recomputation 32 pictures fit, and 64 would need 80.
    found = find(capacity=64.0, saturates=10**6)
    own = {o.choice.batch for o in found if (o.choice.fsdp, o.choice.remat) == (1, "")}
    assert own == {16, 32}
    # The next one begins with twice the most that fitted.
    assert found[2].choice == Choice(1, "products", 64)
    assert ranked(found)[0].choice == Choice(1, "blocks", 256)
    # Another policy's memory is not known before: at most one of each is in vain.
    vain = [(o.choice.fsdp, o.choice.remat) for o in found if not o.fits]
    assert len(vain) == len(set(vain)) and (1, "") not in vain


def test_a_first_batch_that_does_not_fit_leads_to_one_that_does_at_once():
    found = find(capacity=64.0, batch=1024, saturates=10**6)
    assert [o.choice.batch for o in found[:2]] == [1024, 32] and found[1].fits


def test_a_state_that_fills_a_chip_is_left_out():
    found = find(capacity=64.0, state=64.0)
    assert {outcome.choice.fsdp for outcome in found} == {8}


@pytest.mark.parametrize("limit", [1, 3, 8])
def test_the_number_of_compilations_is_bounded(limit):
    assert len(find(capacity=64.0, limit=limit)) == limit


def test_nothing_fits():
    found = find(capacity=2.5, state=16.0)  # the state needs 2, and a picture of a chip 1 or more
    assert not any(outcome.fits for outcome in found)
    assert {outcome.choice.batch for outcome in found} >= {8}


def test_sizes_of_fsdp():
    assert fsdp_sizes(1) == (1,) and fsdp_sizes(8) == (1, 8)
    assert fsdp_sizes(6) == (1, 6) and fsdp_sizes(256) == (1, 8, 256)
