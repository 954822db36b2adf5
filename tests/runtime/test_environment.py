"""Defaults of environment variables, and what the user has set instead."""

from pathlib import Path

import pytest

from zegformer_jax.runtime.environment import cache_folder, missing_defaults

COMPILED = "JAX_COMPILATION_CACHE_DIR"


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"ZEGFORMER_CACHE": "/z", "XDG_CACHE_HOME": "/x"}, "/z"),
        ({"ZEGFORMER_CACHE": "gs://bucket/x"}, "gs://bucket/x"),
        ({"ZEGFORMER_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/zegformer_jax"),
        ({}, f"{Path.home()}/.cache/zegformer_jax"),
    ],
)
def test_the_cache_folder(environment, expected):
    assert cache_folder(environment) == expected
    assert missing_defaults(environment)[COMPILED] == f"{expected}/xla"


def test_what_is_set_stays():
    environment = {COMPILED: "/c", "TF_CPP_MIN_LOG_LEVEL": "0"}
    assert missing_defaults(environment) == {"TF_ENABLE_ONEDNN_OPTS": "0"}


def test_without_a_home_nothing_is_kept(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert missing_defaults({}).keys() == {"TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS"}
