"""Files from the web: fetched once, checked, and nothing is left of what fails."""

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from web import serve

from zegformer_jax.runtime.errors import MissingFile, UserError
from zegformer_jax.runtime.fetch import cached_path, expected_hash, fetch

ROOT = Path(__file__).resolve().parents[2]
DATA = bytes(range(256)) * 5000  # longer than a block
SHA = hashlib.sha256(DATA).hexdigest()
OTHER = hashlib.sha256(b"another file").hexdigest()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache's folder."""
    monkeypatch.setenv("ZEGFORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def web(folder, monkeypatch):
    with serve(monkeypatch) as web:
        yield web


def kept(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_file_is_fetched_once_and_its_hash_is_printed(web, folder, capsys):
    web.files["weights/R-101.pkl"] = DATA
    path = fetch(web.address("weights/R-101.pkl"))
    assert path.read_bytes() == DATA and kept(folder) == [path]
    err = capsys.readouterr().err
    assert "R-101.pkl: 100%" in err and f"SHA-256 {SHA}" in err and f"into {path}" in err
    assert fetch(web.address("weights/R-101.pkl")) == path
    assert web.requests == ["GET weights/R-101.pkl"] and capsys.readouterr().err == ""


def test_files_of_one_name_are_kept_apart(web):
    web.files.update({"a/R-101.pkl": b"a", "b/R-101.pkl": b"b", "b/R-101.pkl?v=2": b"c"})
    paths = [fetch(web.address(name), progress=False) for name in web.files]
    assert [path.read_bytes() for path in paths] == list(web.files.values())


@pytest.mark.parametrize("name", [f"resnet50-{SHA[:8]}.pth", f"x.pth#sha256={SHA}", f"x-{SHA}.pth"])
def test_a_file_with_the_hash_of_its_address_is_taken(web, name):
    web.files[name.partition("#")[0]] = DATA
    for _ in range(2):
        assert fetch(web.address(name), progress=False).read_bytes() == DATA
    assert len(web.requests) == 1


@pytest.mark.parametrize(
    "name", [f"resnet50-{OTHER[:8]}.pth", f"resnet50-{SHA[:8]}.pth#sha256={OTHER}"]
)
def test_a_file_with_another_hash_is_refused(web, folder, name):
    web.files[name.partition("#")[0]] = DATA
    with pytest.raises(UserError, match=f"{name}: its SHA-256 is {SHA}, and should .* {OTHER[:8]}"):
        fetch(web.address(name), progress=False)
    assert kept(folder) == []


def test_a_damaged_file_in_the_cache_is_refused(web):
    address = web.address(f"resnet50-{SHA[:8]}.pth")
    path = cached_path(address)
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA[:-1])
    with pytest.raises(UserError, match=f"{path}: its SHA-256 is .*: remove it, and it is fetched"):
        fetch(address)
    assert web.requests == []


def test_addresses_with_and_without_a_hash():
    start = "https://host/"
    assert expected_hash(f"{start}resnet101-63fe2227.pth") == "63fe2227"
    assert expected_hash(f"{start}a-63fe2227.pth#SHA256={SHA.upper()}") == SHA
    for name in ("R-101.pkl", "a-20230612.pth", "a-cafe.pth", "63fe2227-a.pth", "a-63fe2227x.pth"):
        assert expected_hash(start + name) == ""
    with pytest.raises(UserError, match="x.pth#md5=3: after # comes sha256= with 64 hexadecimal"):
        expected_hash(f"{start}x.pth#md5=3")


def fail(web, folder, reason):
    """Fetches a file in vain: one line with the reason and the place of the file."""
    address = web.address("weights/R-101.pkl")
    path = folder / "weights" / f"127.0.0.1:{web.server_port}" / "weights" / "R-101.pkl"
    with pytest.raises(MissingFile, match=reason) as problem:
        fetch(address, progress=False)
    line = str(problem.value)
    assert line.startswith(f"{address}: cannot be fetched (") and "\n" not in line
    assert line.endswith(f"get the file on another machine and copy it to {path}")
    assert kept(folder) == []
    return path


def test_a_missing_file(web, folder):
    fail(web, folder, "404")


def test_a_file_that_is_cut_off(web, folder):
    web.files["weights/R-101.pkl"], web.missing = DATA, 7
    fail(web, folder, f"cut off after {len(DATA) - 7:,} of {len(DATA):,} bytes")
    web.missing = 0
    assert fetch(web.address("weights/R-101.pkl"), progress=False).read_bytes() == DATA


def test_a_web_page_is_no_file(web, folder):
    web.files["weights/R-101.pkl"], web.kind = b"<html>Sign in</html>", "text/html; charset=utf-8"
    fail(web, folder, "a web page, not a file")


def test_offline_the_line_says_where_to_put_the_file(web, folder):
    web.shutdown()
    web.server_close()
    path = fail(web, folder, "refused")
    path.write_bytes(DATA)  # brought from another machine
    assert fetch(web.address("weights/R-101.pkl")) == path


def test_two_processes_fetch_a_file_at_the_same_time(web, folder):
    web.files["x.pth"], web.together = DATA, threading.Barrier(2)
    code = f"from zegformer_jax.runtime.fetch import fetch; print(fetch({web.address('x.pth')!r}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    (path,) = kept(folder)
    assert outputs == [f"{path}\n".encode()] * 2 and path.read_bytes() == DATA
    assert web.requests == ["GET x.pth"] * 2


@pytest.mark.parametrize(
    "address", ["https://", "https://host", "https://host/a/", "https:///x", "http://[1/x", "x.pth"]
)
def test_addresses_of_no_file(folder, address):
    with pytest.raises(UserError, match="no address of a file"):
        fetch(address)
    assert not folder.exists()


def test_no_address_leads_out_of_the_cache(folder):
    path = cached_path("https://me:secret@host/../../a/./%2e%2e/..//x.pth")
    assert path == folder / "weights" / "host" / "a" / "%2e%2e" / "x.pth"


def test_weights_are_kept_on_a_local_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("ZEGFORMER_CACHE", "gs://bucket/cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = tmp_path / "zegformer_jax" / "weights" / "host" / "x.pth"
    assert cached_path("https://host/x.pth") == expected


def test_without_a_home_the_line_names_the_variable(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for name in ("ZEGFORMER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="https://host/x.pth: no folder .*: set ZEGFORMER_CACHE"):
        fetch("https://host/x.pth")
