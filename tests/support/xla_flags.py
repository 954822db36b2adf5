"""XLA's flags in the processes of the tests."""

# Most of the time goes into compiling, and most programs run once. This halves it.
FAST_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false"
# A device may wait in several collectives at once, each in a thread. If no thread is left for the
# other devices, all of them wait, and after 40 seconds XLA aborts the process.
THREADS_A_DEVICE = 4


def xla_flags(devices: int) -> str:
    """Returns the flags for a number of virtual devices."""
    return f"--xla_force_host_platform_device_count={devices} {FAST_TO_COMPILE}"


def threads(devices: int) -> str:
    """Returns the value of NPROC, the number of XLA's threads, for a number of virtual devices."""
    return str(THREADS_A_DEVICE * devices)
