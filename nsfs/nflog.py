"""NFLOG: packets of `-j NFLOG` and of nft's `log group N`, as lines in the form of LOG.  Pure.

Messages: linux/netfilter/nfnetlink_log.h and nfnetlink.h.  The form of the lines is that of
net/netfilter/nf_log_syslog.c.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

GROUP_MAX = 65535

_SUBSYS_ULOG = 4
_PACKET, _CONFIG = 0, 1
_NLM_F_REQUEST, _NLM_F_ACK = 1, 4
_NLMSG_ERROR = 2
_CFG_CMD, _CFG_MODE, _CFG_TIMEOUT, _CFG_QTHRESH = 1, 2, 4, 5
_BIND, _COPY_PACKET = 1, 2
_COPY_BYTES = 256

_HEADER = struct.Struct("=IHHII")
_GENERIC = struct.Struct(">BBH")
_ATTRIBUTE = struct.Struct("=HH")
_MARK, _INDEV, _OUTDEV, _PAYLOAD, _PREFIX, _HWHEADER = 2, 4, 5, 9, 10, 16
_TYPE_MASK = 0x3FFF


class Logged(NamedTuple):
    """A packet that a rule logged."""

    prefix: bytes
    incoming: int
    """Index of the interface; 0: none."""
    outgoing: int
    link: bytes
    """The link layer's header."""
    mark: int
    payload: bytes


def _attribute(kind: int, data: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), kind) + data + bytes(-len(data) & 3)


def bind_messages(group: int) -> Iterator[bytes]:
    """What makes a socket get the packets of a group, each message to be acknowledged."""
    for attributes in (
        _attribute(_CFG_CMD, bytes((_BIND,))),
        _attribute(_CFG_MODE, struct.pack(">IBx", _COPY_BYTES, _COPY_PACKET))
        # One message a packet, and none waits for others.
        + _attribute(_CFG_QTHRESH, struct.pack(">I", 1))
        + _attribute(_CFG_TIMEOUT, struct.pack(">I", 1)),
    ):
        body = _GENERIC.pack(socket.AF_UNSPEC, 0, group) + attributes
        kind = _SUBSYS_ULOG << 8 | _CONFIG
        flags = _NLM_F_REQUEST | _NLM_F_ACK
        yield _HEADER.pack(_HEADER.size + len(body), kind, flags, 0, 0) + body


def parse(data: bytes) -> Iterator[Logged | int]:
    """The packets in what was received; for an answer, 0 or the errno."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return
        body = data[at + _HEADER.size : at + length]
        if kind == _NLMSG_ERROR and len(body) >= 4:
            yield -struct.unpack_from("=i", body)[0]
        elif kind == _SUBSYS_ULOG << 8 | _PACKET:
            yield _logged(dict(_attributes(body[_GENERIC.size :])))
        at += length + (-length & 3)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += length + (-length & 3)


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _logged(found: Mapping[int, bytes]) -> Logged:
    return Logged(
        found.get(_PREFIX, b"").partition(b"\0")[0],
        _number(found.get(_INDEV, b"")),
        _number(found.get(_OUTDEV, b"")),
        found.get(_HWHEADER, b""),
        _number(found.get(_MARK, b"")),
        found.get(_PAYLOAD, b""),
    )


def line(logged: Logged, names: Mapping[int, str]) -> bytes:
    """The line; `names` are those of interfaces by index."""
    incoming, outgoing = (names.get(each, "") for each in (logged.incoming, logged.outgoing))
    text = f"IN={incoming} OUT={outgoing} "
    if logged.incoming:
        text += f"MAC={logged.link.hex(':')} "
    text += _network(logged.payload)
    if logged.mark:
        text += f"MARK=0x{logged.mark:x} "
    return logged.prefix + text.encode()


def _network(data: bytes) -> str:
    version = data[0] >> 4 if data else 0
    if version == 4 and len(data) >= 20:
        _, tos, length, ident, fragment, ttl, protocol, _ = struct.unpack_from(">BBHHHBBH", data)
        text = f"SRC={_address(data[12:16])} DST={_address(data[16:20])} LEN={length} "
        text += f"TOS=0x{tos & 0x1E:02X} PREC=0x{tos & 0xE0:02X} TTL={ttl} ID={ident} "
        for bit, name in ((0x8000, "CE"), (0x4000, "DF"), (0x2000, "MF")):
            text += f"{name} " if fragment & bit else ""
        if fragment & 0x1FFF:
            return f"{text}FRAG:{fragment & 0x1FFF} PROTO={_NAMES.get(protocol, protocol)} "
        return text + _transport(protocol, data[(data[0] & 15) * 4 :])
    if version == 6 and len(data) >= 40:
        first, length, protocol, hops = struct.unpack_from(">IHBB", data)
        text = f"SRC={_address(data[8:24])} DST={_address(data[24:40])} LEN={length + 40} "
        text += f"TC={first >> 20 & 0xFF} HOPLIMIT={hops} FLOWLBL={first & 0xFFFFF} "
        return text + _transport(protocol, data[40:])
    return ""


_NAMES = {1: "ICMP", 6: "TCP", 17: "UDP", 50: "ESP", 51: "AH", 58: "ICMPv6", 136: "UDPLITE"}
_TCP_FLAGS = ("CWR", "ECE", "URG", "ACK", "PSH", "RST", "SYN", "FIN")


def _address(raw: bytes) -> str:
    if len(raw) == 4:
        return socket.inet_ntoa(raw)
    return ":".join(raw[at : at + 2].hex() for at in range(0, 16, 2))


def _transport(protocol: int, data: bytes) -> str:
    text = f"PROTO={_NAMES.get(protocol, protocol)} "
    if protocol == 6 and len(data) >= 20:
        source, destination, _, _, bits, window, _, urgent = struct.unpack_from(">HHIIHHHH", data)
        text += f"SPT={source} DPT={destination} WINDOW={window} RES=0x{bits >> 6 & 0x3C:02x} "
        for at, name in enumerate(_TCP_FLAGS):
            text += f"{name} " if bits & 0x80 >> at else ""
        text += f"URGP={urgent} "
    elif protocol in (17, 136) and len(data) >= 8:
        source, destination, length, _ = struct.unpack_from(">HHHH", data)
        text += f"SPT={source} DPT={destination} LEN={length} "
    elif protocol in (1, 58) and len(data) >= 8:
        kind, code, _, ident, sequence = struct.unpack_from(">BBHHH", data)
        text += f"TYPE={kind} CODE={code} "
        if kind in (0, 8, 128, 129):
            text += f"ID={ident} SEQ={sequence} "
    return text
