"""Pickled files of tensors (.pt, .pth, .bin): turned into safetensors by a sandboxed child.

What comes back is a stranger's file like any other, and is checked like one.
"""

from __future__ import annotations

from trtllm_workers.config.media import MediaSettings
from trtllm_workers.errors import MediaRejected
from trtllm_workers.media.descriptors import Descriptor, room_in_memory
from trtllm_workers.media.jobs import Kind, Refused, Unpickle, Unpickled, Why
from trtllm_workers.media.safetensors_file import LENGTH_BYTES, MAX_HEADER_BYTES
from trtllm_workers.media.sandbox import ChildFailed, Sandbox, TimedOut
from trtllm_workers.observe.logs import get_logger

log = get_logger(__name__)

MIB = 1 << 20

_MEMORY = 256 * MIB
_REASONS = {
    Why.NAMES: "the names of its tensors are not usable",
    Why.TENSORS: "it has to hold one plain tensor, or a dict of them",
}


class Pickles:
    """Opens pickled files. Belongs to one event loop; ``close`` ends its child."""

    def __init__(self, settings: MediaSettings) -> None:
        self._settings = settings
        self._sandbox = Sandbox(
            Kind.PICKLES,
            max_children=1,
            memory_bytes=_MEMORY + 6 * settings.max_file_bytes,
            wait_timeout_s=settings.timeout_s,
        )

    @property
    def pids(self) -> list[int]:
        """The children that run."""
        return self._sandbox.pids

    async def open(self, source: Descriptor, param: str) -> tuple[Descriptor, int]:
        """Return a .safetensors file in memory, and how much of it counts. Raises MediaRejected."""
        settings = self._settings
        limit = settings.max_file_bytes
        target = room_in_memory(LENGTH_BYTES + MAX_HEADER_BYTES + limit)
        try:
            job = Unpickle(limit, settings.timeout_s)
            fds = [source.fd, target.fd]
            try:
                found = await self._sandbox.run(job, fds, Unpickled, settings.timeout_s)
            except ChildFailed as error:
                raise _failed(error, param) from error
            if isinstance(found, Refused):
                raise _refused(found, param, limit)
            if not 0 <= found.num_bytes <= target.num_bytes:
                raise _broken(param)
            return target, found.num_bytes
        except BaseException:
            target.close()
            raise

    async def close(self) -> None:
        await self._sandbox.close()


def _refused(refused: Refused, param: str, limit: int) -> MediaRejected:
    log.info("a pickled file was refused", param=param, why=refused.why, details=refused.details)
    match refused.why:
        case Why.TOO_LARGE | Why.MEMORY:
            text = f"this file unpacks to more than the {limit} bytes that are taken"
        case Why.NAMES | Why.TENSORS:
            text = f"this file is not taken: {_REASONS[refused.why]}"
        case _:
            return _broken(param)
    return MediaRejected(f"{param}: {text}", param=param)


def _broken(param: str) -> MediaRejected:
    return MediaRejected(
        f"{param}: this file is damaged, or holds other things than tensors", param=param
    )


def _failed(error: ChildFailed, param: str) -> MediaRejected:
    log.warning("a child failed on a pickled file", param=param, error=str(error))
    if isinstance(error, TimedOut):
        return MediaRejected(f"{param}: this file takes too long to open", param=param)
    return _broken(param)
