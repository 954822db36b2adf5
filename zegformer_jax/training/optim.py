"""The optimiser: AdamW with parameter groups by path, gradient clipping and a schedule."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

Groups = Sequence[tuple[str, Mapping[str, float]]]


def path_name(path: tuple[Any, ...]) -> str:
    """Returns `backbone/stem/conv/kernel` for a key path of `jax.tree_util`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def group_factors(params: Any, groups: Groups, field: str) -> Any:
    """Returns each parameter's factor: the product over all groups that its path matches.

    Args:
        params: A tree of arrays.
        groups: Pairs of a regular expression, which must match the whole path, and factors by
            field: `("backbone/.*", {"learning_rate": 0.1})`.
        field: `learning_rate` or `weight_decay`.
    """

    def factor(path: tuple[Any, ...], _: jax.Array) -> float:
        name, product = path_name(path), 1.0
        for pattern, factors in groups:
            if re.fullmatch(pattern, name):
                product *= factors.get(field, 1.0)
        return product

    return jax.tree_util.tree_map_with_path(factor, params)


def scale_by_group(groups: Groups, field: str) -> optax.GradientTransformation:
    """Multiplies every update by its group's factor."""

    def update(updates, state, params=None):
        del params
        factors = group_factors(updates, groups, field)
        return jax.tree.map(lambda u, f: u * f, updates, factors), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def decay_by_group(weight_decay: float, groups: Groups) -> optax.GradientTransformation:
    """Adds the decoupled weight decay (Loshchilov & Hutter, 2019), scaled by group."""

    def update(updates, state, params=None):
        factors = group_factors(params, groups, "weight_decay")
        decayed = jax.tree.map(lambda u, p, f: u + weight_decay * f * p, updates, params, factors)
        return decayed, state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def poly_schedule(
    learning_rate: float, steps: int, power: float, warmup_steps: int = 0
) -> optax.Schedule:
    """Returns a polynomial decay to 0 at `steps`, after a linear warm-up."""
    decay = optax.polynomial_schedule(learning_rate, 0.0, power, steps - warmup_steps)
    if warmup_steps == 0:
        return decay
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def make_optimiser(
    *,
    learning_rate: float,
    steps: int,
    power: float,
    weight_decay: float,
    clip_norm: float,
    groups: Groups = (),
    warmup_steps: int = 0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Makes AdamW as the published system uses it; also returns its learning rate by step.

    Args:
        learning_rate: The largest learning rate.
        steps: Steps of the whole training; the learning rate is 0 there.
        power: Power of the polynomial decay.
        weight_decay: Decoupled weight decay, multiplied by the learning rate.
        clip_norm: Largest global norm of the gradient; 0 turns clipping off.
        groups: Factors for parameters by path, as for `group_factors`.
        warmup_steps: Steps in which the learning rate rises from 0.
    """
    schedule = poly_schedule(learning_rate, steps, power, warmup_steps)
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity()
    optimiser = optax.chain(
        clip,
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),  # Kingma & Ba, 2015, algorithm 1
        decay_by_group(weight_decay, groups),
        scale_by_group(groups, "learning_rate"),
        optax.scale_by_learning_rate(schedule),
    )
    return optimiser, schedule
