import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pushforward.messages import (
    MAX_FRAME_BYTES,
    FrameReader,
    Result,
    Work,
    decode_from_worker,
    decode_to_worker,
    frame,
)


def test_arrays_arrive_bit_for_bit() -> None:
    rows = np.array([[0.1, -0.0], [np.nan, -np.inf]])
    work = Work("id", "m", 3, "encode", False, "float64", rows, rows[:, ::-1], 1e-3, 1e-4, 1e-5, 9, 0.5, 1.5)
    sent = decode_to_worker(frame(work)[4:])
    assert isinstance(sent, Work)
    assert sent.rows.tobytes() == rows.tobytes()
    assert sent.context is not None
    assert sent.context.tobytes() == rows[:, ::-1].tobytes()
    assert (sent.id, sent.version, sent.t_end, sent.deadline) == ("id", 3, 0.5, 1.5)


def test_other_byte_orders_and_empty_arrays_are_carried_too() -> None:
    ints, floats = np.array([1, 2], ">i4"), np.empty((0, 3))
    result = Result(
        "r", floats, floats[:, 0], floats[:, 0], ints, ints, ints, np.array([1], np.uint8), floats[:, 0]
    )
    sent = decode_from_worker(frame(result)[4:])
    assert isinstance(sent, Result)
    assert sent.steps.tolist() == [1, 2]
    assert sent.value.shape == (0, 3)


def test_only_arrays_of_numbers_are_carried() -> None:
    work = Work("id", "m", 1, "encode", False, "float64", np.zeros((1, 1)), None, 1, 1, 1, 1)
    body = frame(work)[4:].replace(b"<f8", b"|O8")
    with pytest.raises(msgspec.ValidationError, match=r"cannot carry an array of '\|O8'"):
        decode_to_worker(body)
    with pytest.raises(NotImplementedError, match="cannot carry object"):
        frame(Work(object(), "m", 1, "encode", False, "float64", np.zeros((1, 1)), None, 1, 1, 1, 1))  # type: ignore[arg-type]


def test_a_message_of_the_other_direction_is_refused() -> None:
    work = Work("id", "m", 1, "encode", False, "float64", np.zeros((1, 1)), None, 1, 1, 1, 1)
    with pytest.raises(msgspec.ValidationError, match="Work"):
        decode_from_worker(frame(work)[4:])


@given(bodies=st.lists(st.binary(max_size=20), max_size=8), cuts=st.lists(st.integers(0, 200), max_size=6))
def test_frames_are_cut_the_same_however_they_arrive(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(len(body).to_bytes(4, "little") + body for body in bodies)
    reader, found, start = FrameReader(), [], 0
    for end in [*sorted(cut for cut in cuts if cut < len(stream)), len(stream)]:
        found += reader.feed(stream[start:end])
        start = end
    assert found == bodies


def test_a_frame_that_claims_too_much_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than"):
        FrameReader().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
