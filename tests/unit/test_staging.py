"""Is a buffer never handed out while anybody still uses its memory, and again as soon as nobody does?"""

from __future__ import annotations

import torch

from dtrain.staging import Pool

CPU = torch.device("cpu")


def test_a_buffer_comes_back_when_its_last_user_is_gone() -> None:
    pool = Pool(CPU)
    first = pool.take(100)
    address = first.data_ptr()
    second = pool.take(100)
    assert second.data_ptr() != address
    del first
    assert pool.take(100).data_ptr() == address


def test_views_slices_and_other_types_keep_it() -> None:
    uses = (lambda x: x[8:40], lambda x: x[:64].view(torch.bfloat16), lambda x: x.detach(), lambda x: [x])
    for keep in uses:
        pool = Pool(CPU)
        taken = pool.take(64)
        address, kept = taken.data_ptr(), keep(taken)
        del taken
        assert pool.take(64).data_ptr() != address
        del kept
        assert pool.take(64).data_ptr() == address


def test_lengths_do_not_mix() -> None:
    pool = Pool(CPU)
    assert {pool.take(n).numel() for n in (0, 1, 32, 33)} == {0, 1, 32, 33}


def test_one_that_is_hardly_longer_serves_too() -> None:
    pool = Pool(CPU)
    address = pool.take(1_000_000).data_ptr()
    assert pool.take(1_010_000).data_ptr() == address
    longer = pool.take(1_100_000)
    assert longer.data_ptr() != address
    assert longer.untyped_storage().nbytes() <= 1_100_000 * 17 / 16
