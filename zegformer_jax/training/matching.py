"""Bipartite matching: the minimum-cost one-to-one assignment of queries to targets."""

import jax
import jax.numpy as jnp
import optax

from zegformer_jax.runtime.errors import UserError
from zegformer_jax.training.losses import DICE_SMOOTH, FOCAL_ALPHA
from zegformer_jax.training.targets import Targets


def focal_cost(logits_qp: jax.Array, masks_np: jax.Array) -> jax.Array:
    """Returns the focal loss, averaged over pixels, of every query and target, [Q, N]."""
    probability = jax.nn.sigmoid(logits_qp)
    inside_qp = FOCAL_ALPHA * (1 - probability) ** 2 * jax.nn.softplus(-logits_qp)
    outside_qp = (1 - FOCAL_ALPHA) * probability**2 * jax.nn.softplus(logits_qp)
    cost_qn = inside_qp @ masks_np.T + outside_qp @ (1 - masks_np).T
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
    cost_nq = jnp.where(valid_n[:, None], cost_qn.T, 0.0)
    target_n, query_n = optax.assignment.hungarian_algorithm(cost_nq)
    return jnp.zeros(targets, jnp.int32).at[target_n].set(query_n.astype(jnp.int32))


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
    batch, queries, height, width = mask_logits_bqhw.shape
    full_height, full_width = targets.masks_bnhw.shape[2:]
    masks_bnhw = targets.masks_bnhw[:, :, :: full_height // height, :: full_width // width]
    masks_bnp = masks_bnhw.astype(jnp.float32).reshape(batch, -1, height * width)
    logits_bqp = mask_logits_bqhw.reshape(batch, queries, height * width)

    def match_image(class_logits_qc, logits_qp, ids_n, masks_np, valid_n):
        cost_qn = cost_matrix(class_logits_qc, logits_qp, ids_n, masks_np, mask_weight, dice_weight)
        return assign(jnp.nan_to_num(cost_qn), valid_n)

    matched_bn = jax.vmap(match_image)(
        class_logits_bqc, logits_bqp, targets.ids_bn, masks_bnp, targets.valid_bn
    )
    return jax.lax.stop_gradient(matched_bn)
