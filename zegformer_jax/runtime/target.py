"""The kind of device that programs are compiled for."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_TARGET: ContextVar[jax.Device | None] = ContextVar("target", default=None)


def target_device() -> jax.Device:
    """Returns a device of the kind that programs are compiled for: this process's first one."""
    return _TARGET.get() or jax.local_devices()[0]


@contextlib.contextmanager
def compiling_for(device: jax.Device) -> Iterator[None]:
    """Makes `target_device` return a device that this machine may lack."""
    token = _TARGET.set(device)
    try:
        yield
    finally:
        _TARGET.reset(token)
