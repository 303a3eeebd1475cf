"""The wire: every message there and back, the bytes of protocol 1, and what is no message."""

import asyncio
import os
import pickle
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from dsd.ipc import channel
from dsd.ipc.channel import AsyncChannel, BlockingChannel, ChannelError
from dsd.ipc.messages import (
    PROTOCOL,
    Chunk,
    Failed,
    FromWorker,
    Grow,
    Hello,
    Join,
    Load,
    LogprobEntry,
    Progress,
    Ready,
    Sampling,
    Step,
    StepOutput,
    Stop,
    ToWorker,
    pack_int32,
    unpack_int32,
)

SAMPLING = Sampling(
    temperature=0.5,
    top_p=0.25,
    top_k=7,
    min_p=0.125,
    presence_penalty=-1.0,
    frequency_penalty=2.0,
    repetition_penalty=1.5,
    seed=2**64 - 1,
    logit_bias=((5, -100.0),),
    min_tokens=3,
    masked_token_ids=(1,),
    num_logprobs=20,
    num_prompt_logprobs=0,
)
JOIN = Join(0, pack_int32([5, 6, 7]), 3, 0, (1, 2), SAMPLING)
MESSAGES: dict[str, Any] = {
    "hello": Hello(1, 4242, 0),
    "load": Load(
        1,
        "/m",
        "auto",
        "float32",
        "none",
        8,
        256,
        4096,
        64,
        1.5,
        0.875,
        "dummy",
        False,
        (1, 8),
        8,
        4,
        2,
        True,
        "fp8",
        True,
        "torch",
        3,
        0.5,
        10,
        0.25,
        5,
        1,
    ),
    "progress": Progress(1, "loading", 10, 2**40),
    "ready": Ready(
        1,
        "cpu",
        "float32",
        512,
        8,
        256,
        4096,
        129,
        64,
        10**12,
        2**40,
        ("a", "b"),
        (1, 2, 4),
        3,
        5000,
    ),
    "failed": Failed(1, "no such file", True),
    "step": Step(
        2,
        3,
        "mixed",
        4,
        (JOIN,),
        (Grow(1, (9,)),),
        pack_int32([1, 2]),
        (Chunk(0, 0, 3, True),),
        2,
        3,
        ((7, 0), (8, 200)),
        ((1, 2),),
    ),
    "step_output": StepOutput(
        2,
        3,
        pack_int32([300, 301, 302]),
        {1: LogprobEntry(301, -0.5, ((301, -0.5), (7, -1.5)))},
        {0: (LogprobEntry(6, -0.25, ()),)},
        1234,
        17,
        pack_int32([2, 1]),
    ),
    "stop": Stop(2),
}
GOLDEN = {
    "hello": "94a568656c6c6f01cd109200",
    "load": (
        "dc001ca46c6f616401a22f6da46175746fa7666c6f61743332a46e6f6e6508cd0100cd100040cb3ff800"
        "0000000000cb3fec000000000000a564756d6d79c2920108080402c3a3667038c3a5746f72636803cb3f"
        "e00000000000000acb3fd00000000000000501"
    ),
    "progress": "95a870726f677265737301a76c6f6164696e670acf0000010000000000",
    "ready": (
        "dc0010a5726561647901a3637075a7666c6f61743332cd020008cd0100cd1000cc8140cf000000e8d4a5"
        "1000cf000001000000000092a161a1629301020403cd1388"
    ),
    "failed": "94a66661696c656401ac6e6f20737563682066696c65c3",
    "step": (
        "9da4737465700203a56d6978656404919600c40c05000000060000000700000003009201029dcb3fe000"
        "0000000000cb3fd000000000000007cb3fc0000000000000cbbff0000000000000cb4000000000000000"
        "cb3ff8000000000000cfffffffffffffffff919205cbc05900000000000003910114009192019109c408"
        "01000000020000009194000003c30203929207009208ccc891920102"
    ),
    "step_output": (
        "99ab737465705f6f75747075740203c40c2c0100002d0100002e010000810193cd012dcbbfe000000000"
        "00009292cd012dcbbfe00000000000009207cbbff80000000000008100919306cbbfd000000000000090"
        "cd04d211c4080200000001000000"
    ),
    "stop": "92a473746f7002",
}
"""Protocol 1, byte for byte. A change here is a change of the protocol: grow at the end, with
defaults, or raise PROTOCOL."""
TO_WORKER = (Load, Step, Stop)


def union_of(message: Any) -> Any:
    return ToWorker if isinstance(message, TO_WORKER) else FromWorker


@pytest.mark.parametrize("name", MESSAGES)
def test_message_comes_back_as_it_was(name) -> None:
    message = MESSAGES[name]
    data = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(data, type=union_of(message)) == message


@pytest.mark.parametrize("name", MESSAGES)
def test_message_has_the_bytes_of_protocol_1(name) -> None:
    assert PROTOCOL == 1
    assert msgspec.msgpack.encode(MESSAGES[name]).hex() == GOLDEN[name]
    message = MESSAGES[name]
    decoded = msgspec.msgpack.decode(bytes.fromhex(GOLDEN[name]), type=union_of(message))
    assert decoded == message


def test_every_message_of_both_unions_is_tested() -> None:
    tags = {struct.__struct_config__.tag for struct in (*TO_WORKER, Hello, Progress, Ready, Failed,
                                                        StepOutput)}  # fmt: skip
    assert tags == MESSAGES.keys() == GOLDEN.keys()
    assert set(ToWorker.__args__) | set(FromWorker.__args__) == {
        type(message) for message in MESSAGES.values()
    }


@pytest.mark.parametrize("name", MESSAGES)
def test_message_of_a_later_protocol_with_more_fields_is_understood(name) -> None:
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(MESSAGES[name]))
    later = msgspec.msgpack.encode([*fields, "something new", {"more": [1]}])
    assert msgspec.msgpack.decode(later, type=union_of(MESSAGES[name])) == MESSAGES[name]


@pytest.mark.parametrize(
    ("name", "num_defaults"), [("load", 16), ("ready", 4), ("step", 4), ("step_output", 5)]
)
def test_message_of_an_earlier_protocol_without_the_last_fields_is_understood(
    name, num_defaults
) -> None:
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(MESSAGES[name]))
    earlier = msgspec.msgpack.encode(fields[:-num_defaults])
    decoded = msgspec.msgpack.decode(earlier, type=union_of(MESSAGES[name]))
    assert decoded.epoch == MESSAGES[name].epoch
    too_few = msgspec.msgpack.encode(fields[: -num_defaults - 1])
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(too_few, type=union_of(MESSAGES[name]))


@pytest.mark.parametrize("values", [[], [0], [-1, 2**31 - 1, -(2**31)], list(range(1000))])
def test_int32_vectors_come_back(values) -> None:
    assert unpack_int32(pack_int32(values)).tolist() == values
    assert len(pack_int32(values)) == 4 * len(values)


def test_int32_vector_out_of_range_or_torn_raises() -> None:
    with pytest.raises(OverflowError):
        pack_int32([2**31])
    with pytest.raises(ValueError, match="multiple"):
        unpack_int32(b"abc")


# ---- the channel --------------------------------------------------------------------------------

Raw = zmq.Socket[bytes]


@asynccontextmanager
async def raw_peer(
    path: Path, send: Callable[[Raw], object]
) -> AsyncIterator[AsyncChannel[FromWorker, ToWorker]]:
    """The daemon's end, and a stranger at the other one who sends what it likes."""
    address = f"ipc://{path / 's.sock'}"
    ours = AsyncChannel[FromWorker, ToWorker](address, FromWorker)
    context = zmq.Context()
    peer = context.socket(zmq.PAIR)
    peer.setsockopt(zmq.LINGER, 0)
    peer.connect(address)
    try:
        send(peer)
        yield ours
    finally:
        peer.close()
        context.term()
        ours.close()


def receive(path: Path, send: Callable[[Raw], object]) -> FromWorker:
    async def work() -> FromWorker:
        async with raw_peer(path, send) as ours, asyncio.timeout(5):
            return await ours.receive()

    return asyncio.run(work())


GARBAGE = {
    "empty": b"",
    "never used in msgpack": b"\xc1",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "no tag": msgspec.msgpack.encode([1, 2, 3]),
    "unknown tag": msgspec.msgpack.encode(["exec", "rm"]),
    "a map": msgspec.msgpack.encode({"tag": "hello"}),
    "wrong types": msgspec.msgpack.encode(["hello", "one", 2, 3]),
    "too few fields": msgspec.msgpack.encode(["hello", 1]),
    "the other direction": msgspec.msgpack.encode(MESSAGES["stop"]),
    "truncated": msgspec.msgpack.encode(MESSAGES["ready"])[:-3],
    "trailing": msgspec.msgpack.encode(MESSAGES["hello"]) + b"\x00",
    "a length that lies": b"\xdd\xff\xff\xff\xff",
    "bytes that lie": b"\x92\xa5hello\xc6\x7f\xff\xff\xff",
    "deep": b"\x91" * 100_000,
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_raises_channel_error(tmp_path, name) -> None:
    with pytest.raises(ChannelError, match="cannot be read"):
        receive(tmp_path, lambda peer: peer.send(GARBAGE[name]))


def test_multipart_message_raises_channel_error(tmp_path) -> None:
    data = msgspec.msgpack.encode(MESSAGES["hello"])
    with pytest.raises(ChannelError, match="2 frames"):
        receive(tmp_path, lambda peer: peer.send_multipart([data, data]))


def test_oversized_frame_is_never_delivered(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(channel, "MAX_MESSAGE_BYTES", 1024)

    async def work() -> None:
        async with raw_peer(tmp_path, lambda peer: peer.send(b"a" * 2048)) as ours:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await ours.receive()

    asyncio.run(work())


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickle_sent_to_the_socket_does_nothing(tmp_path) -> None:
    mark = tmp_path / "exploded"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(Bomb(mark), protocol)
        with pytest.raises(ChannelError):
            receive(tmp_path, lambda peer, data=data: peer.send(data))
    assert not mark.exists()
    pickle.loads(data)
    assert mark.exists(), "the bomb is live, so the test above means something"


def test_both_ends_talk(tmp_path) -> None:
    address = f"ipc://{tmp_path / 's.sock'}"

    async def work() -> None:
        ours = AsyncChannel[FromWorker, ToWorker](address, FromWorker)
        try:
            with BlockingChannel[ToWorker, FromWorker](address, ToWorker) as theirs:
                theirs.send(MESSAGES["hello"])
                assert await ours.receive() == MESSAGES["hello"]
                for name in ("load", "step", "stop"):
                    await ours.send(MESSAGES[name])
                    assert theirs.receive() == MESSAGES[name]
        finally:
            ours.close()

    asyncio.run(work())


def test_send_to_nobody_raises_at_once(tmp_path) -> None:
    """A send that waited would be cancelled by `close`, and its task would end unnoticed."""

    async def work() -> None:
        ours = AsyncChannel[FromWorker, ToWorker](f"ipc://{tmp_path / 's.sock'}", FromWorker)
        try:
            async with asyncio.timeout(1):
                with pytest.raises(ChannelError, match="gone"):
                    await ours.send(Stop(1))
        finally:
            ours.close()

    asyncio.run(work())
