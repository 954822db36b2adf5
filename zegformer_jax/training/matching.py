"""Bipartite matching: the minimum-cost one-to-one assignment of queries to targets."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from zegformer_jax.runtime.errors import UserError
from zegformer_jax.runtime.target import target_device
from zegformer_jax.training.losses import DICE_SMOOTH, FOCAL_ALPHA
from zegformer_jax.training.targets import Targets

TARGETS_AT_ONCE = 128  # of an image, whose costs are computed together
TARGETS_AT_ONCE_ON = {"cpu": 32}  # most images have few; elsewhere a loop costs more than it saves
NOBODY = -1  # index of a target or query that there is not yet


def focal_cost(logits_qp: jax.Array, masks_np: jax.Array) -> jax.Array:
    """Returns the focal loss, averaged over pixels, of every query and target, [Q, N]."""
    probability, minus_log_outside = jax.nn.sigmoid(logits_qp), jax.nn.softplus(logits_qp)
    minus_log_inside = minus_log_outside - logits_qp
    inside_qp = FOCAL_ALPHA * (1 - probability) ** 2 * minus_log_inside
    outside_qp = (1 - FOCAL_ALPHA) * probability**2 * minus_log_outside
    cost_qn = (inside_qp - outside_qp) @ masks_np.T + outside_qp.sum(-1)[:, None]
    return cost_qn / logits_qp.shape[-1]


def dice_cost(logits_qp: jax.Array, masks_np: jax.Array) -> jax.Array:
    """Returns the dice loss of every query and target, [Q, N]."""
    probability = jax.nn.sigmoid(logits_qp)
    overlap_qn = 2 * probability @ masks_np.T
    total_qn = probability.sum(-1)[:, None] + masks_np.sum(-1)[None]
    return 1 - (overlap_qn + DICE_SMOOTH) / (total_qn + DICE_SMOOTH)


def cost_matrix(
    class_logits_qc: jax.Array,
    mask_logits_qp: jax.Array,
    ids_n: jax.Array,
    masks_np: jax.Array,
    mask_weight: float,
    dice_weight: float,
) -> jax.Array:
    """Returns the cost of matching query q to target n, float32 [Q, N] (MaskFormer, section 3.2).

    Args:
        class_logits_qc: Class logits [Q, C + 1]; the last column is "no object".
        mask_logits_qp: Mask logits [Q, P] of the pixels at the logits' own resolution.
        ids_n: Class of each target, int [N].
        masks_np: Masks of the targets, {0, 1} float32 [N, P].
        mask_weight: Weight of the focal cost.
        dice_weight: Weight of the dice cost.
    """
    cost_class = -jax.nn.softmax(class_logits_qc.astype(jnp.float32))[:, ids_n]
    logits_qp = mask_logits_qp.astype(jnp.float32)
    return (
        cost_class
        + mask_weight * focal_cost(logits_qp, masks_np)
        + dice_weight * dice_cost(logits_qp, masks_np)
    )


def assign(cost_qn: jax.Array, valid_n: jax.Array) -> jax.Array:
    """Returns the query of each target, int32 [N], at the least total cost of the valid targets.

    The shortest augmenting path of each valid target in turn (Crouse, "On implementing 2D
    rectangular assignment algorithms", 2016, algorithm 1), so padding costs no time.

    Args:
        cost_qn: Finite costs [Q, N], N <= Q.
        valid_n: False for padding, bool [N]; padded targets get queries that no valid target has.

    Raises:
        UserError: There are more targets than queries.
    """
    queries, targets = cost_qn.shape
    if targets > queries:
        raise UserError(
            f"{targets} targets for {queries} queries: loss.max_targets must not exceed "
            "model.transformer.queries"
        )
    order_n = jnp.argsort(~valid_n, stable=True)

    def add(index: jax.Array, assignment: _Assignment) -> _Assignment:
        return _augment(cost_qn.T, order_n[index], assignment)

    start = _Assignment(
        jnp.full(queries, NOBODY), jnp.full(targets, NOBODY), jnp.zeros(targets), jnp.zeros(queries)
    )
    assignment = jax.lax.fori_loop(0, valid_n.sum(), add, start)
    free_q = jnp.argsort(assignment.target_q != NOBODY, stable=True)
    return jnp.where(valid_n, assignment.query_n, free_q[jnp.cumsum(~valid_n) - 1]).astype(
        jnp.int32
    )


class _Assignment(NamedTuple):
    """Pairs so far, and the dual variables that prove them to be the cheapest."""

    target_q: jax.Array
    query_n: jax.Array
    dual_n: jax.Array
    dual_q: jax.Array


class _Search(NamedTuple):
    """A search for the cheapest way from a target to a free query.

    Attributes:
        target: The target that is looked at.
        query: The last query that was reached; at the end a free one.
        cost: Cost of the way to it.
        cost_q: Cost of the cheapest way to each query that is known.
        before_q: The target before each query on this way.
        passed_n: Targets that were looked at.
        reached_q: Queries that were reached.
    """

    target: jax.Array
    query: jax.Array
    cost: jax.Array
    cost_q: jax.Array
    before_q: jax.Array
    passed_n: jax.Array
    reached_q: jax.Array


def _augment(cost_nq: jax.Array, target: jax.Array, before: _Assignment) -> _Assignment:
    """Matches one more target to a query; other targets may change theirs."""
    targets, queries = cost_nq.shape

    def look(search: _Search) -> _Search:
        at = search.target
        cost_q = search.cost + cost_nq[at] - before.dual_n[at] - before.dual_q
        better_q = ~search.reached_q & (cost_q < search.cost_q)
        cost_q = jnp.where(better_q, cost_q, search.cost_q)
        query = jnp.argmin(jnp.where(search.reached_q, jnp.inf, cost_q)).astype(jnp.int32)
        return _Search(
            before.target_q[query],
            query,
            cost_q[query],
            cost_q,
            jnp.where(better_q, at, search.before_q),
            search.passed_n.at[at].set(True),
            search.reached_q.at[query].set(True),
        )

    start = _Search(
        target.astype(jnp.int32), jnp.int32(0), jnp.float32(0), jnp.full(queries, jnp.inf),
        jnp.full(queries, NOBODY), jnp.zeros(targets, bool), jnp.zeros(queries, bool),
    )  # fmt: skip
    found = jax.lax.while_loop(lambda search: search.target != NOBODY, look, start)

    own_n = jnp.where(jnp.arange(targets) == target, 0.0, found.cost_q[before.query_n])
    dual_n = before.dual_n + jnp.where(found.passed_n, found.cost - own_n, 0.0)
    dual_q = before.dual_q - jnp.where(found.reached_q, found.cost - found.cost_q, 0.0)

    def hand_over(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        query, target_q, query_n = state
        giver = found.before_q[query]
        return query_n[giver], target_q.at[query].set(giver), query_n.at[giver].set(query)

    state = (found.query, before.target_q, before.query_n)
    _, target_q, query_n = jax.lax.while_loop(lambda x: x[0] != NOBODY, hand_over, state)
    return _Assignment(target_q, query_n, dual_n, dual_q)


def match(
    class_logits_bqc: jax.Array,
    mask_logits_bqhw: jax.Array,
    targets: Targets,
    mask_weight: float,
    dice_weight: float,
) -> jax.Array:
    """Matches every target of every image to a query, int32 [B, N]; no gradient flows.

    The targets' masks are sampled to the logits' resolution by nearest neighbour, which at an
    integer factor k is every k-th pixel. Costs that are not finite give an arbitrary assignment;
    the loss is then not finite either, and the training step reports it.

    Args:
        class_logits_bqc: Class logits [B, Q, C + 1]; the last column is "no object".
        mask_logits_bqhw: Mask logits [B, Q, h, w].
        targets: Targets of the batch, at an integer multiple of (h, w).
        mask_weight: Weight of the focal cost.
        dice_weight: Weight of the dice cost.
    """
    return match_layers(
        class_logits_bqc[None], mask_logits_bqhw[None], targets, mask_weight, dice_weight
    )[0]


def match_layers(
    class_logits_lbqc: jax.Array,
    mask_logits_lbqhw: jax.Array,
    targets: Targets,
    mask_weight: float,
    dice_weight: float,
) -> jax.Array:
    """Matches the targets after every decoder layer, int32 [L, B, N]; see `match`.

    The layers' costs are computed one after the other, and in each those of `TARGETS_AT_ONCE`
    targets, to bound the memory, and as most images have few; the assignments of all layers and
    images together, as each is a long chain of tiny operations.

    Args:
        class_logits_lbqc: Class logits [L, B, Q, C + 1]; the last column is "no object".
        mask_logits_lbqhw: Mask logits [L, B, Q, h, w].
        targets: Targets of the batch, at an integer multiple of (h, w).
        mask_weight: Weight of the focal cost.
        dice_weight: Weight of the dice cost.
    """
    batch, queries, height, width = mask_logits_lbqhw.shape[1:]
    full_height, full_width = targets.labels_bhw.shape[1:]
    labels_bhw = targets.labels_bhw[:, :: full_height // height, :: full_width // width]
    every, columns = targets._replace(labels_bhw=labels_bhw), targets.valid_bn.shape[1]
    at_once = TARGETS_AT_ONCE_ON.get(target_device().platform, TARGETS_AT_ONCE)
    at_once = min(columns, at_once)
    parts = -(-targets.valid_bn.sum(1).max() // at_once)

    def cost_of_image(class_logits_qc, logits_qhw, ids_n, masks_nhw):
        logits_qp = logits_qhw.reshape(queries, height * width)
        masks_np = masks_nhw.astype(jnp.float32).reshape(-1, height * width)
        cost_qn = cost_matrix(class_logits_qc, logits_qp, ids_n, masks_np, mask_weight, dice_weight)
        return jnp.nan_to_num(cost_qn)

    def cost_of_layer(layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        if columns == at_once:
            return jax.vmap(cost_of_image)(*layer, every.ids_bn, every.masks_bnhw)

        def add(index: jax.Array, cost_bqn: jax.Array) -> jax.Array:
            first = index * at_once  # the last part begins earlier and computes some costs again

            def cut(array_bn: jax.Array) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(array_bn, first, at_once, axis=1)

            part = every._replace(ids_bn=cut(every.ids_bn), valid_bn=cut(every.valid_bn))
            cost = jax.vmap(cost_of_image)(*layer, part.ids_bn, part.masks_bnhw)
            return jax.lax.dynamic_update_slice_in_dim(cost_bqn, cost, first, axis=2)

        return jax.lax.fori_loop(0, parts, add, jnp.zeros((batch, queries, columns)))

    cost_lbqn = jax.lax.map(cost_of_layer, (class_logits_lbqc, mask_logits_lbqhw))
    assign_batch = jax.vmap(assign)
    matched_lbn = jax.vmap(assign_batch, (0, None))(cost_lbqn, targets.valid_bn)
    return jax.lax.stop_gradient(matched_lbn)
