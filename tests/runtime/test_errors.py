"""The errors that the user can mend are also the built-in errors that callers expect."""

import pickle

import pytest

from zegformer_jax.runtime.errors import MissingFile, UserError


def test_a_missing_file_is_caught_as_each_of_its_kinds():
    for kind in (UserError, ValueError, FileNotFoundError, OSError):
        with pytest.raises(kind, match="^x.json: no such file$"):
            raise MissingFile("x.json: no such file")


@pytest.mark.parametrize("kind", [UserError, MissingFile])
def test_errors_come_back_from_other_processes(kind):
    error = pickle.loads(pickle.dumps(kind("x.json: cut off")))
    assert type(error) is kind and str(error) == "x.json: cut off"


def test_the_text_of_an_error_is_one_printable_line_whatever_it_quotes():
    error = UserError("x.json: 'a\nb\x1b[31m\ud800'" + "x" * 5000 + ": remove it")
    assert str(error).startswith(r"x.json: 'a b\x1b[31m\ud800'xxx")
    assert str(error).endswith("xxx: remove it") and len(str(error)) < 1000
