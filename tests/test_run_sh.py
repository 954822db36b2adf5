"""run.sh with a fake Python that records its calls: nothing is installed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zegformer_jax.cli.main import COMMANDS

REPOSITORY = Path(__file__).parent.parent
TOOLS = "bash cat cp dirname env flock ls mkdir mv readlink rm touch sleep".split()

FAKE_PYTHON = r"""#!/usr/bin/env bash
echo "$@" >>"$CALLS"
case "$1 $2" in
  -ISc\ *) echo "${FAKE_VERSION:-3.11}" ;;
  "-c import ensurepip, venv") exit "${FAKE_NO_VENV:-0}" ;;
  "-m venv") mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" && cp "$0" "$3/bin/python" ;;
  "-m pip") sleep "${FAKE_PIP_SECONDS:-0}" && exit "${FAKE_PIP_EXIT:-0}" ;;
  -c\ *site*) echo "${0%/bin/python}" ;;
  "-m ruff") exit "${FAKE_RUFF_EXIT:-0}" ;;
  "-m pytest") echo "1 passed" && exit "${FAKE_PYTEST_EXIT:-0}" ;;
  "-P -m") echo "$PWD|$ZEGFORMER_PROGRAM|$JAX_PLATFORMS|$XLA_FLAGS" && exit "${FAKE_EXIT:-0}" ;;
esac
"""


class Sandbox:
    """Copy of run.sh, a bin/ with the fake Python, and the calls that this records."""

    def __init__(self, folder: Path):
        self.folder, self.calls_file = folder, folder / "calls"
        self.repository, self.bin = folder / "repository", folder / "bin"
        self.venv = folder / "environments" / "venv"
        for made in (self.repository, self.bin, folder / "elsewhere"):
            made.mkdir()
        for name in ("run.sh", "requirements.txt"):
            shutil.copy(REPOSITORY / name, self.repository)
        cli = Path("zegformer_jax/cli")
        (self.repository / cli).mkdir(parents=True)
        shutil.copy(REPOSITORY / cli / "main.py", self.repository / cli)
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        self.add_command("python3", FAKE_PYTHON)

    def add_command(self, name: str, script: str) -> None:
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def environment(self, **changes: str) -> dict[str, str]:
        settings = {"PATH": str(self.bin), "CALLS": str(self.calls_file), "HOME": str(self.folder)}
        return settings | {"ZEGFORMER_VENV": str(self.venv), "ZEGFORMER_JAX": "cpu"} | changes

    def run(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
        self.calls_file.write_text("")
        return subprocess.run(
            [str(self.repository / "run.sh"), *arguments],
            env=self.environment(**changes),
            cwd=self.folder / "elsewhere",
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, start: str) -> list[str]:
        return [c for c in self.calls_file.read_text().splitlines() if c.startswith(start)]


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


def test_the_first_run_installs_and_the_second_does_not(sandbox):
    first = sandbox.run("train", "--workdir=x")
    assert first.returncode == 0, first.stderr
    assert len(sandbox.calls("-m venv")) == 1
    (pip,) = sandbox.calls("-m pip")
    assert pip.endswith(f"-r {sandbox.repository}/requirements.txt")
    assert sandbox.calls("-P -m") == ["-P -m zegformer_jax.cli.main train --workdir=x"]
    assert (sandbox.venv / "zegformer_jax.pth").read_text().strip() == str(sandbox.repository)

    second = sandbox.run("train")
    assert (second.returncode, second.stderr) == (0, "")
    assert not sandbox.calls("-m venv")
    assert not sandbox.calls("-m pip")


def test_a_ready_environment_costs_next_to_nothing(sandbox):
    sandbox.run()
    start = time.perf_counter()
    sandbox.run()
    assert time.perf_counter() - start < 1  # 0.03 s on an idle machine.


@pytest.mark.parametrize(
    "changes", [{"ZEGFORMER_JAX": "tpu"}, {"FAKE_VERSION": "3.12"}, {"requirements": "changed"}]
)
def test_a_change_of_python_jax_or_requirements_reinstalls(sandbox, changes):
    sandbox.run()
    (sandbox.venv / "left over").touch()
    if changes.pop("requirements", None):
        with (sandbox.repository / "requirements.txt").open("a") as file:
            file.write("one-more==1.0\n")
    assert sandbox.run(**changes).returncode == 0
    assert len(sandbox.calls("-m pip")) == 1
    assert not (sandbox.venv / "left over").exists()
    sandbox.run(**changes)
    assert not sandbox.calls("-m pip")


@pytest.mark.parametrize("command", ["compile", "test"])
def test_libtpu_is_installed_for_what_needs_it(sandbox, command):
    sandbox.run()
    sandbox.run("compile", "--help")
    assert not sandbox.calls("-m pip")
    assert "installing libtpu" in sandbox.run(command).stderr
    (pip,) = sandbox.calls("-m pip")
    assert pip.endswith("requirements.txt jax[tpu]")
    sandbox.run(command, TPU_LIBRARY_PATH="/elsewhere/libtpu.so")
    assert not sandbox.calls("-m pip")
    (sandbox.venv / "lib" / "python3.11" / "site-packages" / "libtpu").mkdir(parents=True)
    sandbox.run(command)
    assert not sandbox.calls("-m pip")


def test_an_environment_without_its_python_is_reinstalled(sandbox):
    sandbox.run()
    (sandbox.venv / "bin" / "python").unlink()
    assert sandbox.run().returncode == 0
    assert len(sandbox.calls("-m pip")) == 1


def test_an_activated_environment_can_be_reinstalled(sandbox):
    sandbox.run()
    shutil.copy(sandbox.venv / "bin" / "python", sandbox.venv / "bin" / "python3")
    done = sandbox.run(ZEGFORMER_JAX="tpu", PATH=f"{sandbox.venv}/bin:{sandbox.bin}")
    assert done.returncode == 0, done.stderr
    assert len(sandbox.calls("-m pip")) == 1


def test_a_failed_installation_is_not_taken_for_a_ready_one(sandbox):
    failed = sandbox.run(FAKE_PIP_EXIT="1")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("run.sh: pip could not install")
    assert not sandbox.calls("-P -m")
    assert sandbox.run().returncode == 0
    assert len(sandbox.calls("-m pip")) == 1


# What runs in a shell's background ignores SIGINT, and its children inherit that.
INTERRUPTIBLE = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_installation_is_not_taken_for_a_ready_one(sandbox, number):
    sandbox.calls_file.write_text("")
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, str(sandbox.repository / "run.sh")],
        env=sandbox.environment(FAKE_PIP_SECONDS="30"),
        cwd=sandbox.folder,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 20
    while not sandbox.calls("-m pip") and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, number)
    assert process.wait(20) != 0
    assert sandbox.run().returncode == 0
    assert len(sandbox.calls("-m pip")) == 1


def test_a_gpu_gets_the_cuda_build_that_its_driver_takes(sandbox):
    if list(Path("/dev").glob("accel*")) or list(Path("/dev/vfio").glob("*")):
        pytest.skip("this machine may have a TPU, which goes first")
    answer = '#!/usr/bin/env bash\ncase "$1" in -L) echo "%s" ;; *) echo %s ;; esac\n'
    for gpu, driver, build in (
        ("GPU 0: NVIDIA H100 (UUID: GPU-1)", "580.65.06", "jax[cuda13]"),
        ("GPU 0: NVIDIA H100 (UUID: GPU-1)", "550.54.15", "jax[cuda12]"),
        ("No devices found.", "580.65.06", "requirements.txt"),
    ):
        sandbox.add_command("nvidia-smi", answer % (gpu, driver))
        shutil.rmtree(sandbox.venv, ignore_errors=True)
        assert sandbox.run(ZEGFORMER_JAX="").returncode == 0
        assert sandbox.calls("-m pip")[0].endswith(build)


def test_the_build_of_jax_can_be_chosen(sandbox):
    sandbox.run(ZEGFORMER_JAX="tpu")
    assert sandbox.calls("-m pip")[0].endswith("jax[tpu]")
    wrong = sandbox.run(ZEGFORMER_JAX="gpu")
    assert wrong.returncode == 2
    assert wrong.stderr == "run.sh: ZEGFORMER_JAX is 'gpu'; use cpu, cuda12, cuda13 or tpu\n"


def test_an_old_python_or_none_is_one_clear_line(sandbox):
    old = sandbox.run(FAKE_VERSION="3.10")
    assert old.returncode == 1
    assert old.stderr.count("\n") == 1
    assert "needs Python 3.11, 3.12 or 3.13" in old.stderr
    assert "found: python3 is 3.10" in old.stderr
    (sandbox.bin / "python3").unlink()
    none = sandbox.run()
    assert none.returncode == 1
    assert none.stderr.endswith("found: none\n")


def test_a_later_candidate_is_taken_when_the_first_is_too_old(sandbox):
    sandbox.add_command("python3.12", FAKE_PYTHON.replace("${FAKE_VERSION:-3.11}", "3.12"))
    assert sandbox.run(FAKE_VERSION="3.9").returncode == 0
    assert sandbox.calls("-m venv")


def test_a_python_without_venv_says_which_package_to_install(sandbox):
    done = sandbox.run(FAKE_NO_VENV="1")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "apt install python3.11-venv" in done.stderr


def test_another_folder_is_never_emptied(sandbox):
    sandbox.venv.mkdir(parents=True)
    (sandbox.venv / "thesis.tex").touch()
    done = sandbox.run()
    assert done.returncode == 1
    assert "is not a Python environment" in done.stderr
    assert (sandbox.venv / "thesis.tex").exists()


def test_without_a_command_it_is_the_demo_and_the_users_folder_stays(sandbox):
    done = sandbox.run()
    assert sandbox.calls("-P -m") == ["-P -m zegformer_jax.cli.main demo"]
    assert done.stdout.startswith(f"{sandbox.folder}/elsewhere|./run.sh|")
    sandbox.run("--workdir=x")
    assert sandbox.calls("-P -m") == ["-P -m zegformer_jax.cli.main demo --workdir=x"]


def test_trainings_on_a_cpu_multiply_by_ynnpack_unless_the_user_has_flags(sandbox):
    def flags(*arguments, **changes):
        return sandbox.run(*arguments, **changes).stdout.rstrip("\n").split("|")[-1]

    assert flags("train") == flags() != ""
    assert flags("train").startswith("--xla_cpu_experimental_ynn_fusion_type=")
    assert flags("train", XLA_FLAGS="--mine") == "--mine"
    assert flags("predict") == flags("train", ZEGFORMER_JAX="tpu") == ""


def test_a_cpu_environment_looks_for_no_other_device(sandbox):
    """With libtpu installed, jax would log that it finds no TPU."""

    def platforms(**changes):
        return sandbox.run("predict", **changes).stdout.split("|")[2]

    assert platforms() == "cpu" and platforms(JAX_PLATFORMS="mine") == "mine"
    assert platforms(ZEGFORMER_JAX="tpu") == ""


@pytest.mark.parametrize("command", ["train", "evaluate", "unknown"])
def test_commands_pass_their_arguments_and_exit_status_on(sandbox, command):
    assert sandbox.run(command, "a b.png", "--classes=x, y", FAKE_EXIT="3").returncode == 3
    assert sandbox.calls("-P -m") == [
        f"-P -m zegformer_jax.cli.main {command} a b.png --classes=x, y"
    ]


@pytest.mark.parametrize("word", ["help", "--help", "-h"])
def test_help_names_every_command_and_installs_nothing(sandbox, word):
    asked = sandbox.run(word)
    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout.startswith("usage: ") and "./run.sh COMMAND --help" in asked.stdout
    assert f"\ncommands: {' '.join(COMMANDS)}\n" in asked.stdout
    assert not sandbox.calls("-m")


def test_test_runs_ruff_first_then_pytest_with_the_users_options(sandbox):
    (sandbox.folder / "elsewhere" / "test_x.py").touch()
    done = sandbox.run("test", "--fast", "-k", "name", "test_x.py::test_one")
    assert done.stdout.splitlines()[-1] == "1 passed"
    (pytest_call,) = sandbox.calls("-m pytest")
    assert pytest_call.endswith(
        f"-m not slow -k name {sandbox.folder}/elsewhere/test_x.py::test_one"
    )
    calls = sandbox.calls_file.read_text().splitlines()
    assert calls[-3:-1] == ["-m ruff check .", "-m ruff format --check ."]
    sandbox.run("test")
    assert "not slow" not in sandbox.calls("-m pytest")[0]


def test_test_fails_when_ruff_or_pytest_does(sandbox):
    assert sandbox.run("test", FAKE_RUFF_EXIT="1").returncode == 1
    assert not sandbox.calls("-m pytest")
    assert sandbox.run("test", FAKE_PYTEST_EXIT="5").returncode == 5


def test_it_works_through_a_link_and_from_a_folder_with_a_space(tmp_path):
    (tmp_path / "with space").mkdir()
    sandbox = Sandbox(tmp_path / "with space")
    link = sandbox.folder / "zegformer"
    link.symlink_to(sandbox.repository / "run.sh")
    done = subprocess.run([str(link), "train"], env=sandbox.environment(), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert sandbox.calls("-P -m") == ["-P -m zegformer_jax.cli.main train"]
