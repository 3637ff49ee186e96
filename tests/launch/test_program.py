"""Blanks say what follows from a form, and refuse everything else, so that what cannot be recorded is run as it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from cce_numba.launch.blank import Blank, NotBlank, Place, form_of, require_memory
from cce_numba.launch.program import _views_of


class Library:
    device = 0


def blank(array, beginning=0):
    return Blank(Library(), form_of(array), Place(3, 0, beginning))


def told(place):
    return place.base, place.offset


def test_views_lie_where_numpy_puts_them():
    host = np.zeros((6, 40), np.float32)
    whole = blank(host)
    assert (whole.shape, whole.dtype, whole.strides, len(whole)) == ((6, 40), np.float32, (160, 4), 6)
    views = (whole[2], host[2]), (whole[1:, 3::2], host[1:, 3::2]), (whole.view(np.uint8)[:, 5:], host.view(np.uint8)[:, 5:])
    for ours, its in (*views, (whole.reshape(-1)[7:], host.reshape(-1)[7:]), (whole[::-1], host[::-1])):
        assert (ours.shape, ours.dtype, ours.strides, ours.flags.c_contiguous) == (
            its.shape,
            its.dtype,
            its.strides,
            its.flags.c_contiguous,
        )
        assert told(ours.data.ptr) == (3, its.ctypes.data - host.ctypes.data)
    assert blank(host[0])[3].shape == (), "an array, even of one element"


def test_a_place_knows_how_it_is_aligned_and_no_more():
    place = Place(0, 0, beginning=8)
    assert told(place + 16) == told(16 + place) == (0, 16)
    assert (place % 16, (place + 4) % 8, (place + 8) % 16, (place - 9) % 256) == (8, 4, 0, 255)
    for asked in (
        lambda: place % 512,
        lambda: Place(0, 0, None) % 2,
        lambda: place == 0,
        lambda: bool(place),
        lambda: int(place),
        lambda: place < 5,
        lambda: place // 16,
        lambda: place.mapped(lambda address: (address,), 1)[0] + 8,
    ):
        with pytest.raises(NotBlank):
            asked()


def test_a_blank_refuses_what_needs_numbers():
    array = blank(np.zeros((4, 6), np.float32))
    for asked in (
        lambda: array + 1,
        lambda: 2 * array,
        lambda: array.sum(),
        lambda: array.astype(np.float64),
        lambda: array.get(),
        lambda: bool(array),
        lambda: list(array),
        lambda: array == array,
        lambda: array.__setitem__(0, 1),
        lambda: array[:, ::2].reshape(-1),
        lambda: require_memory(array),
    ):
        with pytest.raises(NotBlank):
            asked()
    require_memory(np.zeros(3))


@dataclass
class Found:
    lse: object
    folded: dict


def test_arrays_in_a_mapping_are_no_program_s():
    """They would be handed out as blanks."""
    array = blank(np.zeros(4, np.float32))
    assert list(_views_of(Found(array, {}))[0]) == ["lse"]
    with pytest.raises(NotBlank):
        _views_of(Found(array, {"expected": array}))
