"""Environment variables: of this package, and of libraries that read them when imported."""

import os
from collections.abc import Mapping
from pathlib import Path

CACHE_VARIABLE = "ZEGFORMER_CACHE"
# The program that users call, for messages that name a command; run.sh sets it to its own name.
PROGRAM = os.environ.get("ZEGFORMER_PROGRAM", "zegformer")


def cache_folder(environment: Mapping[str, str] = os.environ) -> str:
    """Returns the folder for text embeddings, compiled programs and fetched weights.

    It is $ZEGFORMER_CACHE, else $XDG_CACHE_HOME/zegformer_jax, else ~/.cache/zegformer_jax.

    Args:
        environment: The environment variables.

    Raises:
        RuntimeError: Neither variable is set, and the user has no home.
    """
    if environment.get(CACHE_VARIABLE):
        return environment[CACHE_VARIABLE]
    caches = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(caches) / "zegformer_jax")


def programs_folder(environment: Mapping[str, str] = os.environ) -> str:
    """Returns the folder for compiled programs; see `cache_folder`."""
    return f"{cache_folder(environment)}/xla"


def missing_defaults(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns defaults of unset variables: fewer notices, and compiled programs on disk.

    Args:
        environment: The environment variables.
    """
    defaults = {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TF_ENABLE_ONEDNN_OPTS": "0",  # avoids a notice; TensorFlow only reads files here
    }
    try:
        defaults["JAX_COMPILATION_CACHE_DIR"] = programs_folder(environment)
    except RuntimeError:
        pass
    return {name: value for name, value in defaults.items() if name not in environment}
