"""`nflog`: the NFLOG groups of its network namespace whose packets become lines of its `kmsg`.

Group numbers (0 to 65535) separated by blanks; nothing for none.  A rule `-j NFLOG --nflog-group N`
or nft's `log group N` then logs in the form of LOG.  ERANGE for a number that is none; EBUSY when
another program has the group; EOPNOTSUPP for a container without a network namespace of its own,
or where the host's kernel log cannot be read.  EINVAL for what is no list of numbers.
"""

from __future__ import annotations

import errno

from nsfs.attribute import NOT_ON_ROOT, Attribute, Caller, parse_int
from nsfs.container import Face
from nsfs.nflog import GROUP_MAX


def nflog_show(face: Face) -> str:
    """The groups."""
    groups = face.container.nflog
    return " ".join(map(str, groups)) + "\n" if groups else ""


async def nflog_store(face: Face, value: str, caller: Caller) -> None:
    """Get the packets of just these groups."""
    container = face.container
    container.check_alive()
    groups = tuple(sorted({parse_int(word, 0, GROUP_MAX) for word in value.split()}))
    if not container.own("net"):
        raise OSError(errno.EOPNOTSUPP, "its network is another's", container.name)
    try:
        await container.world.subscribe(container, groups)
    except OSError:
        # Those that it had were given up first: two sockets cannot have one.
        await container.world.subscribe(container, container.nflog)
        raise
    container.nflog = groups
    container.save()


FILES = (Attribute("nflog", show=nflog_show, store=nflog_store, flags=NOT_ON_ROOT),)
