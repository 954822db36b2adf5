"""Prompt templates and the prompts of a class."""

import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from zegformer_jax.runtime.assets import DATA
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.runtime.files import read_text
from zegformer_jax.text.cleaning import is_writable
from zegformer_jax.text.synonyms import split_synonyms

PROMPTS_FILE = DATA / "prompts.json"
FORM = '{"mine": ["a photo of a {}.", "a drawing of a {}."]}'


def split_prompts(prompts: str) -> tuple[str, str]:
    """Returns the file of a prompt set and the set's name.

    Args:
        prompts: NAME, whose file is "", or FILE.json:NAME.
    """
    if prompts.endswith(".json"):
        return prompts, ""
    file, _, name = prompts.rpartition(":")
    return file, name


def load_templates(prompts: str) -> tuple[str, ...]:
    """Reads a set of prompt templates.

    Args:
        prompts: NAME, a set in `data/prompts.json`, such as "single"; or FILE.json:NAME, a set in a
            file of the same form: a JSON object of lists of templates by name.

    Returns:
        Templates with one `{}` in place of the class name.

    Raises:
        MissingFile: There is no such file.
        UserError: There is no such set, and the message lists the existing ones; or the file has
            another form, and the message says where.
    """
    file, name = split_prompts(prompts)
    path = epath.Path(file or PROMPTS_FILE)
    sets = _read_sets(path)
    if name not in sets:
        known = ", ".join(sorted(sets))
        if not name:
            form = f", {file}:NAME" if file else ""
            raise UserError(f"{path}: name a prompt set{form}; there are {known}")
        raise UserError(f"{path}: no prompt set '{name}'; there are {known}")
    _check_templates(sets[name], f"{path}: prompt set '{name}'")
    return tuple(sets[name])


def class_prompts(name: str, templates: Sequence[str]) -> list[str]:
    """Returns the prompts of a class: every synonym in every template.

    Args:
        name: The class name; "sofa, couch" is two synonyms.
        templates: Prompts with `{}` in place of a synonym.

    Raises:
        UserError: There is no name or no template.
    """
    synonyms = split_synonyms(name)
    if not synonyms or not templates:
        raise UserError(f"class '{name}': nothing to embed: give a name and a template")
    return [template.format(synonym) for synonym in synonyms for template in templates]


def _read_sets(path: epath.Path) -> dict[str, Any]:
    text = read_text(path)
    try:
        sets = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(sets, dict) or not sets:
        raise UserError(f"{path}: expected an object of prompt sets, such as {FORM}")
    return sets


def _check_templates(templates: Any, where: str) -> None:
    if not isinstance(templates, list) or not templates:
        raise UserError(f"{where}: expected a list of templates, as in {FORM}, got {templates!r}")
    for entry, template in enumerate(templates, 1):
        if not isinstance(template, str):
            raise UserError(f"{where}: template {entry} must be text, got {template!r}")
        if not is_writable(template):
            raise UserError(f"{where}: template {entry}, {template!a}, has a control character")
        before, braces, after = template.partition("{}")
        if not braces or set("{}") & set(before + after):
            raise UserError(
                f"{where}: template {entry}, {template!r}, needs exactly one {{}} in place of the "
                "class name, and no other braces"
            )
