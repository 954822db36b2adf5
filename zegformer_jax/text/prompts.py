"""Prompt templates and the prompts of a class."""

import json
from collections.abc import Sequence

from zegformer_jax.runtime.assets import DATA
from zegformer_jax.runtime.errors import UserError


def load_templates(name: str) -> tuple[str, ...]:
    """Reads a set of prompt templates of `data/prompts.json`.

    Args:
        name: Name of the set, such as "single".

    Returns:
        Templates with `{}` in place of the class name.

    Raises:
        UserError: There is no such set; the message lists the existing ones.
    """
    path = DATA / "prompts.json"
    sets = json.loads(path.read_text(encoding="utf-8"))
    if name not in sets:
        raise UserError(f"{path}: no prompt set '{name}'; there are {', '.join(sorted(sets))}")
    return tuple(sets[name])


def class_prompts(name: str, templates: Sequence[str]) -> list[str]:
    """Returns the prompts of a class: every synonym in every template.

    Args:
        name: The class name; "sofa, couch" is two synonyms.
        templates: Prompts with `{}` in place of a synonym.

    Raises:
        UserError: There is no name or no template.
    """
    synonyms = [x.strip() for x in name.split(",") if x.strip()]
    if not synonyms or not templates:
        raise UserError(f"class '{name}': nothing to embed: give a name and a template")
    return [template.format(synonym) for synonym in synonyms for template in templates]
