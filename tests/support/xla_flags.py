"""XLA's flags in the processes of the tests."""

# Most of the time goes into compiling, and most programs run once. This halves it.
FAST_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false"


def xla_flags(devices: int) -> str:
    """Returns the flags for a number of virtual devices."""
    return f"--xla_force_host_platform_device_count={devices} {FAST_TO_COMPILE}"
